"""SVAE: a recurrent network whose state at every step is drawn from a Gaussian.

Source: Sachdeva et al., "Sequential Variational Autoencoders for Collaborative Filtering" (WSDM 2019) and
noveens/svae_cf. Differs: batches of users instead of one, dropout as an option, item vectors that start at
N(0, 0.02) in place of N(0, 1), and one next item per position by default, for leave-one-out evaluation. The
release treats the encoder's second output as a log standard deviation in one place and as a log variance in
the other (``variance="released"``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.gmvae import gaussian_kl, latent_report
from llmrec.collab.layers import noise_free, normal_like
from llmrec.collab.losses import Loss, last_of
from llmrec.data.batches import Batch
from llmrec.item_softmax import item_cross_entropy


class SVAE(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Input and output tables differ. Scores use the mean of the latent state.
    """

    layout = "positions"
    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        hidden_dim: int,
        inner_dim: int,
        latent_dim: int,
        num_next: int,
        kl_cap: float,
        kl_steps: int,
        kl_scope: str,
        variance: str,
        vectors: str,
        dropout_rate: float,
        max_history: int,
        loss: str = "ce",
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.num_next = num_next
        self.kl_cap, self.kl_steps, self.kl_scope = kl_cap, kl_steps, kl_scope
        self.variance, self.vectors = variance, vectors
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout_rate)
        self.gru = nn.GRU(embed_dim, hidden_dim, batch_first=True)
        self.inner = nn.Linear(hidden_dim, inner_dim)
        self.latent = nn.Linear(inner_dim, 2 * latent_dim)
        self.decoder = nn.Linear(latent_dim, inner_dim)
        self.out = nn.Linear(inner_dim, num_items + 1)
        nn.init.normal_(self.item.weight, std=0.02)
        for layer in (self.inner, self.latent, self.decoder, self.out):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.item.weight[0] = 0
            self.out.weight[0] = 0

    def encode(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances (released: see `variance`) after each position, (B, T, latent) twice."""
        hidden, _ = self.gru(self.dropout(self.item(history)))
        return self.latent(torch.tanh(self.inner(hidden))).chunk(2, dim=-1)

    def decode(self, state: Tensor) -> Tensor:
        """Queries against the output table, (..., inner + 1); the last entry is for its bias."""
        return F.pad(torch.tanh(self.decoder(state)), (0, 1), value=1.0)

    def output_table(self) -> Tensor:
        """Output vectors with their biases as a last column, (N + 1, inner + 1)."""
        return torch.cat([self.out.weight, self.out.bias[:, None]], dim=1)

    def loss(self, batch: Batch) -> Loss:
        """Negative log likelihood of the next items, and the annealed divergence from N(0, I)."""
        mean, spread = self.encode(batch.item)
        state = mean
        if self.training:
            deviation = spread if self.variance == "released" else 0.5 * spread
            state = mean + torch.exp(deviation) * normal_like(mean)
        query = self.decode(state)
        at = batch.target != 0
        number = int(at.sum())
        total = query.new_zeros(())
        table = self.output_table()
        for ahead in range(min(self.num_next, batch.target.shape[1])):
            target = F.pad(batch.target[:, ahead:], (0, ahead))
            kept = (target != 0) & at
            share = item_cross_entropy(query[kept], table, target[kept])
            total = total + share / self.num_next
        if not number:
            return Loss(total=total, num_targets=0)
        each = gaussian_kl(mean, spread, 0.0, 0.0).sum(-1) * at
        kl = each.sum()
        weight = min(self.kl_cap, batch.step / self.kl_steps)
        penalty = kl if self.kl_scope == "target" else (each.sum(1) / at.sum(1).clamp(min=1)).sum()
        with noise_free(self):
            steady = self.encode(batch.item)[0] if self.dropout.p else mean
            sampled = 2 * spread if self.variance == "released" else spread
            parts = latent_report(steady[at], sampled[at])
        parts |= {"prediction_loss": total.detach(), "kl": kl.detach()}
        return Loss(total=total + weight * penalty, num_targets=number, parts=parts)

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        mean, _ = self.encode(history)
        return self.decode(last_of(mean, history)) @ self.output_table().T

    def item_embeddings(self) -> Tensor:
        """Vectors of the chosen table, (N + 1, D), row 0 zero."""
        table = self.item.weight if self.vectors == "input" else self.out.weight
        return table.detach()
