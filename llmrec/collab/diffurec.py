"""DiffuRec: the next item's vector, recovered from noise by a transformer over the history.

Sources: Li, Sun and Li, "DiffuRec: A Diffusion Model for Sequential Recommendation" (TOIS 2023), arXiv
2304.00686, and WHUIR/DiffuRec. Differs from the release, where it would let padding or chance into a score:
padding is hidden from attention, row 0 takes no part in the softmax, and scoring uses the mean of the
injection strength and noise drawn once at construction, the same for everyone. Ours too: item vectors start
ten times smaller (``init_std``), without which hundreds of epochs are spent on undoing their random scores,
and epochs are chosen by rankings of a single step back (``valid_reverse_steps``).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.layers import normal_like
from llmrec.collab.losses import Loss, Pooled, last_of, ratio
from llmrec.collab.noise import Diffusion, step_features
from llmrec.data.batches import Batch
from llmrec.item_softmax import item_cross_entropy


class DiffuRec(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    There are no positions: the last item is known by being the place that is read. Item vectors are input,
    diffusion space and output at once.
    """

    layout = "prefixes"
    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        dropout_rate: float,
        embed_dropout_rate: float,
        schedule: str,
        num_steps: int,
        reverse_steps: int,
        valid_reverse_steps: int,
        eval_samples: int,
        strength: float,
        rounding: str,
        init_std: float,
        max_history: int,
        loss: str = "ce",
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.strength, self.rounding = strength, rounding
        self.reverse_steps, self.valid_reverse_steps = reverse_steps, valid_reverse_steps
        self.item = item_table(num_items, embed_dim, init_std)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.dropout = nn.Dropout(embed_dropout_rate)
        self.step = StepEmbedding(embed_dim, num_steps)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, dropout_rate) for _ in range(num_layers))
        self.out_norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.out_dropout = nn.Dropout(dropout_rate)
        self.diffusion = Diffusion(schedule, num_steps, embed_dim, num_samples=eval_samples)

    def embed(self, history: Tensor) -> Tensor:
        """Vectors of the history, (B, T, D)."""
        return self.norm(self.dropout(self.item(history)))

    def estimate(self, hidden: Tensor, history: Tensor, noisy: Tensor, step: Tensor) -> Tensor:
        """The clean target vector (B, D) from the history's vectors and a noisy one (B, D) at steps (B,)."""
        injected = (noisy + self.step(step))[:, None]
        hidden = hidden + strength_of(self.strength, hidden, self.training) * injected
        return self.read(hidden, history)

    def read(self, hidden: Tensor, history: Tensor) -> Tensor:
        """What the blocks make of the last item's place, (B, D)."""
        mask = attention_mask(history)
        *first, last = self.blocks
        for block in first:
            hidden = block(hidden, hidden, mask)
        # Of the last block only the place that is read is needed.
        hidden = last(last_of(hidden, history)[:, None], hidden, mask)
        return self.out_norm(self.out_dropout(hidden))[:, 0]

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the item whose vector was recovered (paper Eq. 11)."""
        return diffusion_loss(self, batch)

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        return diffusion_scores(self, history, self.reverse_steps)

    def quick_score(self, history: Tensor) -> Tensor:
        """As `score`, by fewer steps back."""
        return diffusion_scores(self, history, self.valid_reverse_steps)

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return without_padding(self.item.weight)


class Block(nn.Module):
    """Self-attention and a feed-forward part, each added to its input (pre-norm), then dropout.

    As released: GELU by tanh, Xavier-normal output and feed-forward weights.
    """

    def __init__(self, width: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, dropout_rate)
        self.attention_norm = nn.LayerNorm(width)
        self.inner_norm = nn.LayerNorm(width)
        self.inner = FeedForward(width, dropout_rate)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, query: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """New vectors (B, S, D) of chosen places, S of the T places, or all of them.

        Args:
            query: vectors of those places, (B, S, D).
            hidden: vectors of all places, (B, T, D).
            mask: bool (B, 1, 1, T), places that may be looked at.
        """
        normed = self.attention_norm(hidden)
        asked = normed if query is hidden else self.attention_norm(query)
        query = query + self.dropout(self.attention(asked, normed, mask))
        return self.dropout(query + self.dropout(self.inner(self.inner_norm(query))))


class Attention(nn.Module):
    """Multi-head attention of (B, S, D) over (B, T, D)."""

    def __init__(self, width: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.num_heads, self.dropout_rate = num_heads, dropout_rate
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        nn.init.xavier_normal_(self.out.weight)

    def heads(self, hidden: Tensor) -> Tensor:
        """(B, T, D) to (B, heads, T, D / heads)."""
        return hidden.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, asked: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        found = F.scaled_dot_product_attention(
            self.heads(self.query(asked)),
            self.heads(self.key(hidden)),
            self.heads(self.value(hidden)),
            attn_mask=mask,
            dropout_p=self.dropout_rate if self.training else 0.0,
        )
        return self.out(found.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """D to 4 D to D with GELU."""

    def __init__(self, width: int, dropout_rate: float) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout_rate)
        for layer in (self.inner, self.out):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.dropout(F.gelu(self.inner(hidden), approximate="tanh")))


class StepEmbedding(nn.Module):
    """A vector (n, D) for steps int64 (n,)."""

    def __init__(self, width: int, num_steps: int) -> None:
        super().__init__()
        self.width, self.num_steps = width, num_steps
        self.inner, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, step: Tensor) -> Tensor:
        features = step_features(step, self.num_steps, self.width)
        return self.out(F.silu(self.inner(features.to(self.inner.weight.dtype))))


def item_table(num_items: int, width: int, init_std: float) -> nn.Embedding:
    table = nn.Embedding(num_items + 1, width, padding_idx=0)
    nn.init.normal_(table.weight, std=init_std)
    table.weight.data[0] = 0
    return table


def without_padding(table: Tensor) -> Tensor:
    """The table, detached, with row 0 zero."""
    table = table.detach().clone()
    table[0] = 0
    return table


def attention_mask(history: Tensor) -> Tensor:
    """Places that hold an item, bool (B, 1, 1, T); the first one of an empty history."""
    valid = history != 0
    valid[:, 0] = True
    return valid[:, None, None]


def strength_of(mean: float, like: Tensor, training: bool) -> Tensor | float:
    """How strongly noise is injected: N(mean, mean^2) for every number in training, else its mean."""
    return mean + mean * normal_like(like) if training else mean


class Denoiser(Protocol):
    """What `diffusion_loss` and `diffusion_scores` need of a model."""

    item: nn.Embedding
    diffusion: Diffusion
    rounding: str

    def embed(self, history: Tensor) -> Tensor:
        """Vectors of the history, (B, T, D)."""

    def estimate(self, hidden: Tensor, history: Tensor, noisy: Tensor, step: Tensor) -> Tensor:
        """The clean target vector (B, D) from the history's vectors and a noisy one (B, D) at steps (B,)."""


def diffusion_loss(model: Denoiser, batch: Batch, *, skip_row_0: bool = True) -> Loss:
    """Recover each row's target from a random step, and name it by inner product with all items.

    The released code draws steps uniformly too (its loss-aware sampler is never fed).

    Args:
        skip_row_0: False lets the padding row compete as if it were an item, as the released codes do.
    """
    kept = (batch.target != 0).any(1)
    history = batch.item[kept]
    target = batch.target[kept].amax(1)
    number = len(target)
    if not number:
        return Loss(total=model.item.weight.sum() * 0.0, num_targets=0)
    clean = model.item(target)
    step = torch.randint(model.diffusion.num_steps, (number,), device=target.device)
    noisy = model.diffusion.forward_to(clean, step, model.diffusion.draw(clean))
    found = model.estimate(model.embed(history), history, noisy, step)
    total = item_cross_entropy(found, model.item.weight, target, skip_row_0=skip_row_0)
    with torch.no_grad():
        likeness = F.cosine_similarity(found, clean)
        quarter = F.one_hot(step * 4 // model.diffusion.num_steps, 4).to(likeness.dtype)
        by_noise = Pooled(((quarter * likeness[:, None]).sum(0), quarter.sum(0)), ratio)
    return Loss(total=total, num_targets=number, parts={"target_cosine_by_noise": by_noise})


def diffusion_scores(model: Denoiser, history: Tensor, reverse_steps: int) -> Tensor:
    """Scores (B, N + 1) of the vectors that the last reverse_steps steps back end at, averaged over starts.

    ``rounding="inner"`` takes inner products, ``"distance"`` ranks by Euclidean distance.
    """
    hidden = model.embed(history)

    def estimate(noisy: Tensor, step: int) -> Tensor:
        return model.estimate(hidden, history, noisy, torch.full_like(history[:, 0], step))

    clean = model.diffusion.reverse(estimate, len(history), reverse_steps).mean(0)
    scores = clean @ model.item.weight.T
    if model.rounding == "distance":
        scores = scores - 0.5 * model.item.weight.square().sum(1)
    return scores
