"""Residual quantiser: each level codes what the levels before left over (MME-SID Eq. 2 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.config import given
from llmrec.machine import running_sum


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
    diversity: Tensor | None = None
    """Scalar, see `ResidualQuantizer.diversity`; where codes have neighbours"""


LEAST_SIZE = 1e-6
"""Rows that a code's running mean stands for, below which it stays where it was."""


class ResidualQuantizer(nn.Module):
    """L codebooks of K code embeddings.

    Args:
        num_levels: L.
        num_codes: K.
        code_dim: width D of a code embedding.
        commitment_weight: weight of the commitment term.
        commitment: levels whose commitment term moves the input. all: r_l is the input less the codes
            before, as Eq. 5 reads. first: as in the published code (and LC-Rec, LETTER), where a level hands
            on r - (r + SG(q - r)), whose derivative is zero, so later levels train their codebooks alone.
        reduce: mean over B, L and D (published code), or squared norms summed over levels (Eq. 5).
        sinkhorn: levels that spread a training batch evenly over their codes: last, all or none.
        sinkhorn_eps: entropy of the even assignment.
        sinkhorn_iterations: scalings per batch.
        codebook_update: gradient, or ema: codes are running means of the residuals given to them.
        ema_decay: what a running mean keeps per batch.
        estimator: how the gradient passes the rounding: straight_through copies it; rotation turns it as
            the input would have to turn towards its codes (Fifty et al., ICLR 2025).
    """

    size: Tensor
    total: Tensor
    neighbours: Neighbours | None = None
    """Which codes belong together at the moment; set by who trains, for `diversity`"""

    def __init__(
        self,
        num_levels: int,
        num_codes: int,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        commitment: Literal["all", "first"] = "all",
        reduce: Literal["mean", "sum"] = "mean",
        sinkhorn: Literal["last", "all", "none"] = "last",
        sinkhorn_eps: float = 0.003,
        sinkhorn_iterations: int = 50,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        ema_decay: float = 0.99,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        self.commitment = commitment
        self.reduce = reduce
        self.spread_levels = {"last": [num_levels - 1], "all": range(num_levels), "none": []}[sinkhorn]
        self.sinkhorn_eps = sinkhorn_eps
        self.sinkhorn_iterations = sinkhorn_iterations
        self.ema_decay = ema_decay if codebook_update == "ema" else None
        self.estimator = estimator
        noise = torch.empty(num_levels, num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)
        self.codebooks = nn.Parameter(noise, requires_grad=self.ema_decay is None)
        if self.ema_decay is not None:
            self.register_buffer("size", torch.ones(num_levels, num_codes))
            self.register_buffer("total", noise.clone())

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise latent vectors (B, D); in training mode some levels spread evenly."""
        codes, residuals = self.assign(latent.detach(), spread=self.training)
        chosen = self.lookup(codes)
        fixed = chosen.detach()
        if self.commitment == "all":
            targets = latent[:, None] - (running_sum(fixed, 1) - fixed)
        else:
            targets = torch.cat([latent[:, None], residuals[:, 1:]], dim=1)
        loss = self.commitment_weight * self.distance(targets, fixed)
        if self.ema_decay is None:
            loss = loss + self.distance(chosen, residuals)
        elif self.training:
            self.follow(codes, residuals)
        sums = fixed.sum(dim=1)
        rotated = self.estimator == "rotation"
        vectors = rotate(latent, sums) if rotated else latent + (sums - latent).detach()
        diversity = None if self.neighbours is None else self.diversity(chosen, codes, self.neighbours)
        return Quantized(codes, vectors, loss, residuals, diversity)

    def diversity(self, chosen: Tensor, codes: Tensor, neighbours: Neighbours) -> Tensor:
        """LETTER's loss of diversity: a chosen code c shall pick out a random other one of its cluster.

            mean over rows and levels of  -log softmax over k != c of (e_c e_k), at a random k of c's cluster

        Moves the codes alone. Rows whose code is alone in its cluster add nothing.

        Source: LETTER (Wang et al., CIKM 2024), as in HonghuiBao2000/LETTER@0d4a115 RQ-VAE/models/vq.py.

        Args:
            chosen: the codes' embeddings (B, L, D).
            codes: int64 (B, L).
            neighbours: the clusters, and what draws from them.
        """
        target = neighbours.draw(codes)
        similarity = torch.einsum("bld,lkd->blk", chosen, self.codebooks)
        similarity = similarity.scatter(2, codes[..., None], -torch.inf)
        total = F.cross_entropy(
            similarity.flatten(0, 1), target.flatten(), ignore_index=NO_OTHER, reduction="sum"
        )
        return total / codes.numel()

    @torch.no_grad()
    def follow(self, codes: Tensor, residuals: Tensor) -> None:
        """Move every code to the running mean of what it was given; one that gets nothing stays."""
        levels, size, _ = self.codebooks.shape
        for level in range(levels):
            member = F.one_hot(codes[:, level], size).T.to(residuals.dtype)
            new = 1 - given(self.ema_decay)
            self.size[level].lerp_(member.sum(dim=1), new)
            self.total[level].lerp_(member @ residuals[:, level], new)
        # What has got nothing for long has no mean left that could be told from rounding.
        live = (self.size > LEAST_SIZE)[..., None]
        self.codebooks.copy_(torch.where(live, self.total / self.size[..., None], self.codebooks))

    @torch.no_grad()
    def place(self, level: int, codes: Tensor | slice, vectors: Tensor) -> None:
        """Put codes of one level where they are told; running means start anew there."""
        self.codebooks[level, codes] = vectors.to(self.codebooks.dtype)
        if self.ema_decay is not None:
            self.size[level, codes] = 1.0
            self.total[level, codes] = self.codebooks[level, codes]

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
            spread: use the even assignment at the levels that have it.

        Returns:
            Codes int64 (B, L), and residuals (B, L, D): what each level had to code.
        """
        codes, residuals = [], []
        residual = latent
        for level, codebook in enumerate(self.codebooks):
            distances = squared_distances(residual, codebook)
            if spread and level in self.spread_levels:
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
        """Move unused codes to the residuals of random rows of their level, as far as there are rows.

        Args:
            used: bool (L, K), on the CPU.
            residuals: (B, L, D).
            generator: on the CPU, chooses the rows.
        """
        for level, alive in enumerate(used):
            dead = (~alive).nonzero()[: len(residuals), 0]
            if len(dead):
                rows = torch.randperm(len(residuals), generator=generator)[: len(dead)]
                self.place(level, dead.to(self.codebooks.device), residuals[rows.to(residuals.device), level])


NO_OTHER = -100
"""In place of a code where a cluster has no other one."""


class Neighbours:
    """Clusters of each level's codes, and draws from them.

    Args:
        cluster: int64 (L, K), the cluster of every code.
        generator: draws, on the CPU, so that every device has the same draws.
        device: of the codes that are asked about.
    """

    def __init__(self, cluster: Tensor, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        order = cluster.argsort(dim=1, stable=True)
        size = torch.stack([torch.bincount(row, minlength=int(cluster.max()) + 1) for row in cluster])
        self.order = order.to(device)
        """Codes of each level, cluster by cluster, (L, K)"""
        self.place = order.argsort(dim=1).to(device)
        """Where each code stands in that, (L, K)"""
        self.first = (size.cumsum(1) - size).gather(1, cluster).to(device)
        """Where its cluster begins, (L, K)"""
        self.size = size.gather(1, cluster).to(device)
        """Codes of its cluster, (L, K)"""

    def draw(self, codes: Tensor) -> Tensor:
        """For codes (B, L) a random other one of each one's cluster, all with the same chance; NO_OTHER
        where there is none."""
        place, first, size = (table.T.gather(0, codes) for table in (self.place, self.first, self.size))
        others = (size - 1).clamp(min=1)
        drawn = torch.rand(codes.shape, generator=self.generator, dtype=torch.float64).to(codes.device)
        step = 1 + torch.minimum((drawn * others).long(), others - 1)
        found = self.order.T.gather(0, first + (place - first + step) % size)
        return torch.where(size > 1, found, NO_OTHER)


def rotate(latent: Tensor, target: Tensor) -> Tensor:
    """The target (B, D) in value; in gradient, latent turned and scaled to where target is.

    With unit vectors e, q of both and r = (e + q) / |e + q|, the map

        x  to  |target| / |latent| (x - 2 r <r, x> + 2 q <e, x>)

    is applied to the latent, all factors held fixed. One of length 0 gets a straight-through gradient.

    Source: Fifty et al., "Restructuring vector quantization with the rotation trick", section 4.
    """
    fixed = latent.detach()
    length = fixed.norm(dim=1, keepdim=True)
    e, q = F.normalize(fixed, dim=1), F.normalize(target, dim=1)
    middle = F.normalize(e + q, dim=1)
    along = (latent * middle).sum(dim=1, keepdim=True)
    onto = (latent * e).sum(dim=1, keepdim=True)
    tiny = torch.finfo(latent.dtype).tiny
    turned = (target.norm(dim=1, keepdim=True) / length.clamp_min(tiny)) * (
        latent - 2 * middle * along + 2 * q * onto
    )
    turned = torch.where(length > 0, turned, latent)
    return turned + (target - turned).detach()


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
        column = 1 / (codes * (kernel.T @ row))
    return kernel.mul_(row[:, None]).mul_(column * size)
