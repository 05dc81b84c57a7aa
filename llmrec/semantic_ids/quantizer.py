"""Residual quantiser: each level codes what the levels before left over (MME-SID Eq. 2 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Quantized:
    """What the quantiser makes of a batch."""

    codes: Tensor
    """int64 (B, L)"""
    vectors: Tensor
    """(B, D), sums of the chosen code embeddings; the gradient goes straight through to the input"""
    loss: Tensor
    """Scalar: codes move to residuals, and residuals, less strongly, to codes."""
    residuals: Tensor
    """(B, L, D), what each level was given to code; no gradient"""


class ResidualQuantizer(nn.Module):
    """L codebooks of K code embeddings.

    Gradients are those of the published code (and of LC-Rec and LETTER). There, a level hands on
    r - (r + SG(q - r)), whose derivative is zero, so the input learns from the first level's
    commitment term and through ``vectors`` alone; later levels train only their codebooks.

    Args:
        num_levels: L.
        num_codes: K.
        code_dim: width D of a code embedding.
        commitment_weight: weight of the commitment term.
        reduce: mean over B, L and D (published code), or squared norms summed over levels (Eq. 5).
        sinkhorn_eps: entropy of the even assignment at the last level while training; None: nearest
            codes everywhere.
        sinkhorn_iterations: scalings per batch.
    """

    def __init__(
        self,
        num_levels: int,
        num_codes: int,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        reduce: Literal["mean", "sum"] = "mean",
        sinkhorn_eps: float | None = 0.003,
        sinkhorn_iterations: int = 50,
    ) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        self.reduce = reduce
        self.sinkhorn_eps = sinkhorn_eps
        self.sinkhorn_iterations = sinkhorn_iterations
        noise = torch.empty(num_levels, num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)
        self.codebooks = nn.Parameter(noise)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise latent vectors (B, D); in training mode the last level spreads evenly."""
        codes, residuals = self.assign(
            latent.detach(), spread=self.training and self.sinkhorn_eps is not None
        )
        chosen = self.lookup(codes)
        # Only the first residual is the latent itself; see the class text.
        targets = torch.cat([latent[:, None], residuals[:, 1:]], dim=1)
        loss = self.distance(chosen, residuals) + self.commitment_weight * self.distance(
            targets, chosen.detach()
        )
        vectors = latent + (chosen.detach().sum(dim=1) - latent).detach()
        return Quantized(codes, vectors, loss, residuals)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared error of (B, L, D) pairs, reduced as configured."""
        if self.reduce == "mean":
            return F.mse_loss(a, b)
        return F.mse_loss(a, b, reduction="sum") / len(a)

    @torch.no_grad()
    def assign(self, latent: Tensor, *, spread: bool = False) -> tuple[Tensor, Tensor]:
        """Nearest codes, level by level.

        Args:
            latent: (B, D).
            spread: use the even assignment at the last level.

        Returns:
            Codes int64 (B, L), and residuals (B, L, D): what each level had to code.
        """
        codes, residuals = [], []
        residual = latent
        for level, codebook in enumerate(self.codebooks):
            distances = squared_distances(residual, codebook)
            if spread and level == len(self.codebooks) - 1:
                chosen = sinkhorn(distances, self.sinkhorn_eps, self.sinkhorn_iterations).argmax(dim=1)
            else:
                chosen = distances.argmin(dim=1)
            codes.append(chosen)
            residuals.append(residual)
            residual = residual - codebook[chosen]
        return torch.stack(codes, dim=1), torch.stack(residuals, dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code embeddings (B, L, D) of codes (B, L)."""
        levels, size, width = self.codebooks.shape
        start = torch.arange(levels, device=codes.device) * size
        return F.embedding(codes + start, self.codebooks.reshape(levels * size, width))

    @torch.no_grad()
    def restart(self, used: Tensor, residuals: Tensor, generator: torch.Generator) -> None:
        """Move unused codes to the residuals of random rows of their level.

        Args:
            used: bool (L, K), on the CPU.
            residuals: (B, L, D).
            generator: on the CPU, chooses the rows.
        """
        for level, alive in enumerate(used):
            dead = (~alive).nonzero()[:, 0]
            if len(dead):
                rows = torch.randint(len(residuals), (len(dead),), generator=generator)
                place = residuals[rows.to(residuals.device), level].to(self.codebooks.dtype)
                self.codebooks[level, dead.to(self.codebooks.device)] = place


def squared_distances(rows: Tensor, codebook: Tensor) -> Tensor:
    """|r|^2 + |c|^2 - 2 r c, (B, K), never below 0."""
    norms = rows.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    return torch.addmm(norms, rows, codebook.T, alpha=-2).clamp_min_(0)


def sinkhorn(distances: Tensor, eps: float, iterations: int) -> Tensor:
    """Soft assignment of B rows to K codes in equal shares, float64 (B, K).

    Distances are mapped to [-1, 1]; Q = exp(-D / eps) is scaled to row sums 1 / B, then to column
    sums 1 / K, again and again; the result is times B, so that every column sums to B / K. Only the
    scaling factors are iterated, since Q = diag(row) exp(-D / eps) diag(column) throughout.

    Source: LC-Rec, whose assignment MME-SID takes over for the last level.
    """
    size, codes = distances.shape
    low, high = distances.aminmax()
    middle, half = (high + low) / 2, (high - low) / 2 + 1e-5
    kernel = ((distances - middle) / half).double().div_(-eps).exp_()
    column = kernel.new_ones(codes)
    for _ in range(iterations):
        row = 1 / (size * (kernel @ column))
        column = 1 / (codes * (row @ kernel))
    return kernel.mul_(row[:, None]).mul_(column * size)
