"""The MIE-VAE of SIGMA-GMVAE: a user's items, sorted into hyper-categories, as a mixture of interests.

Source: arXiv 2502.16140 section 3.2, libeibei95/SIGMA. The release blanks the soft encoder and the call of
the GRU; the formulas here keep to the shapes that the loss around them needs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.layers import mean_cosine
from llmrec.collab.losses import Pooled, ratio
from llmrec.machine import running_sum


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A mixture per row, T' = 1, or per position, T' = T."""

    mean: Tensor
    """(B, T', K, D)"""
    log_variance: Tensor
    """(B, T', K, D)"""
    intensity: Tensor
    """(B, T', K), sums to 1 over K"""
    assignment: Tensor
    """(B, T, K), of each item to the hyper-categories; zero on padding"""

    def at(self, positions: Tensor) -> Prior:
        """The mixtures of chosen positions, bool (B, T): (n, K, D) and (n, K)."""
        row, place = positions.nonzero(as_tuple=True)
        if self.mean.shape[1] == 1:
            place = torch.zeros_like(place)
        return Prior(
            mean=self.mean[row, place],
            log_variance=self.log_variance[row, place],
            intensity=self.intensity[row, place],
            assignment=self.assignment,
        )


class Interests(nn.Module):
    """K prototypes (orthogonal hyper-categories) and the networks that make Gaussians of what they gather.

    Prototypes are scaled to length 1 before every use; item vectors are not.
    """

    def __init__(
        self,
        embed_dim: int,
        num_interests: int,
        assignment_temperature: float,
        gumbel_temperature: float,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.temperature = assignment_temperature
        self.gumbel_temperature = gumbel_temperature
        self.prototype = nn.Embedding(num_interests, embed_dim)
        sizes = [2 * embed_dim, 256, 512, 256]
        inner = [
            layer
            for first, second in itertools.pairwise(sizes)
            for layer in (nn.Linear(first, second), nn.ReLU(), nn.Dropout(dropout_rate))
        ]
        self.log_variance = nn.Sequential(*inner, nn.Linear(sizes[-1], embed_dim))
        self.gru = nn.GRU(embed_dim, embed_dim, num_layers=2, bias=False, batch_first=True)
        self.gru_out = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout_rate)

    def directions(self) -> Tensor:
        """The prototypes at length 1, (K, D)."""
        return F.normalize(self.prototype.weight, dim=-1)

    def orthogonality(self) -> Tensor:
        """||G G' - I||^2 / K^2: 0 if hyper-categories stand at right angles. The paper sums g_i . g_j, which
        can fall below any bound; the release squares."""
        unit = self.directions()
        square = unit @ unit.T - torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        return square.square().mean()

    def forward(self, items: Tensor, valid: Tensor, *, temporal: bool, prefix: bool) -> Prior:
        """The mixture of each row, or of each position's prefix.

        Args:
            items: vectors (B, T, D).
            valid: bool (B, T), False on padding.
            temporal: whether hard interests are half of the means.
            prefix: one mixture per position, of the items up to it.
        """
        assignment = self.assign(items, valid)
        if prefix:
            weight = running_sum(assignment, 1)
            gathered = running_sum(torch.einsum("btk,btd->btkd", assignment, items), 1)
        else:
            weight = assignment.sum(1, keepdim=True)
            gathered = torch.einsum("btk,btd->bkd", assignment, items)[:, None]
        mean = gathered / (weight[..., None] + 1e-9)
        intensity = weight / weight.sum(-1, keepdim=True).clamp(min=1e-9)
        if temporal:
            mean = (mean + self.in_order(items, valid, mean[:, 0])[:, None]) / 2
        prototypes = self.directions().expand(*mean.shape)
        log_variance = self.log_variance(torch.cat([prototypes, mean], -1)).clamp(-8, 8)
        return Prior(
            mean=self.dropout(self.norm(mean)) if temporal else mean,
            log_variance=log_variance,
            intensity=intensity,
            assignment=assignment,
        )

    def report(self, items: Tensor, valid: Tensor, *, temporal: bool) -> dict[str, Pooled]:
        """Share of the items in each hyper-category, (K,), and the mean cosine of a row's soft interests, 1
        if hyper-categories collapsed; once hard interests are half of the means, that of every fourth row's
        means too.

        For evaluation mode: the random assignment of training makes interests differ where nothing else does.
        """
        assignment = self.assign(items, valid)
        soft = torch.einsum("btk,btd->bkd", assignment, items)  # a cosine needs no mean
        rows = valid.any(1)
        found = {
            "category_use": Pooled((assignment.sum((0, 1)), valid.sum()), ratio),
            "interest_overlap": Pooled((mean_cosine(soft) * len(soft), rows.sum()), ratio),
        }
        if temporal:
            means = self(items[::4], valid[::4], temporal=True, prefix=False).mean[:, 0]
            found["interest_overlap_with_hard"] = Pooled(
                (mean_cosine(means) * len(means), rows[::4].sum()), ratio
            )
        return found

    def assign(self, items: Tensor, valid: Tensor) -> Tensor:
        """Soft assignment of items to hyper-categories, (B, T, K); random by Gumbel noise in training."""
        logits = F.normalize(items, dim=-1) @ self.directions().T / self.temperature
        noisy = F.gumbel_softmax(logits, tau=self.gumbel_temperature) if self.training else None
        return (logits.softmax(-1) if noisy is None else noisy) * valid[..., None]

    def in_order(self, items: Tensor, valid: Tensor, soft: Tensor) -> Tensor:
        """Hard interests (B, K, D): each item goes to one of them, which a GRU reads in order.

        The released line picks one position per interest; the paper's words are one interest per item,
        which is what is done, straight through. An interest without items stays its soft one.
        """
        batch, _, width = items.shape
        number = soft.shape[1]
        logits = F.normalize(items, dim=-1) @ self.directions().T / self.temperature
        if self.training:
            hard = F.gumbel_softmax(logits, hard=True)
        else:
            hard = F.one_hot(logits.argmax(-1), number).to(items.dtype)
        hard = (hard * valid[..., None]).transpose(1, 2).flatten(0, 1)  # (B x K, T)
        count = hard.detach().round().long().sum(1)
        order = hard.detach().argsort(dim=1, descending=True, stable=True)
        scaled = items[:, None].expand(-1, number, -1, -1).flatten(0, 1) * hard[..., None]
        read = scaled.gather(1, order[..., None].expand(-1, -1, width))
        states, _ = self.gru(read)  # causal, so what stands after an interest's items does not matter
        last = states[torch.arange(len(count), device=count.device), count.clamp(min=1) - 1]
        found = torch.relu(self.gru_out(last)).unflatten(0, (batch, number))
        return torch.where(count.view(batch, number, 1) > 0, found, soft)
