"""k-means in plain torch: on the device of the rows, equal results for equal seeds.

scikit-learn's adds partial sums in the order its threads finish, so more than two threads may give
other last digits each time, and it has no GPU. Without bounds on cluster sizes so far.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.semantic_ids.quantizer import ResidualQuantizer, squared_distances


@torch.no_grad()
def init_codebooks(
    quantizer: ResidualQuantizer, latent: Tensor, iterations: int, generator: torch.Generator
) -> None:
    """Set every level's codes to the k-means centres of what the levels before leave of latent (n, D)."""
    residual = latent
    for level, codebook in enumerate(quantizer.codebooks):
        centres = kmeans(residual, len(codebook), iterations, generator)
        quantizer.codebooks[level] = centres
        residual = residual - centres[squared_distances(residual, centres).argmin(dim=1)]


def kmeans(rows: Tensor, num_clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centres (K, D) of rows (n, D): k-means++ seeds, then Lloyd rounds until nothing moves."""
    return lloyd(rows, plus_plus(rows, num_clusters, generator), iterations)


def plus_plus(rows: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Rows chosen one after the other, with chances in proportion to the squared distance from those before.

    Once every distinct row is chosen, further ones are drawn uniformly.
    """
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    norms = rows.square().sum(dim=1)
    nearest = torch.ones_like(norms)
    chosen = []
    for draw in draws:
        total = nearest.double().cumsum(dim=0)
        if total[-1] <= 0:
            total = torch.arange(1, len(rows) + 1, device=rows.device, dtype=torch.float64)
        index = torch.searchsorted(total, total[-1:] * draw, right=True).clamp_max_(len(rows) - 1)
        sums = norms + norms[index]
        distance = sums - 2 * (rows @ rows[index[0]])
        # Inner products leave the chosen row and its copies a rounding error off themselves.
        distance[distance <= 1e-6 * sums] = 0
        nearest = distance if not chosen else torch.minimum(nearest, distance)
        chosen.append(index)
    return rows[torch.cat(chosen)]


def lloyd(rows: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Move centres to the means of their rows; an empty cluster takes one of the worst-served rows."""
    last = None
    for _ in range(iterations):
        distance, label = squared_distances(rows, centres).min(dim=1)
        if last is not None and torch.equal(label, last):
            break
        last = label
        member = F.one_hot(label, len(centres)).T.to(rows.dtype)
        count = member.sum(dim=1)
        # A product instead of index_add_, whose order of addition is open on a GPU.
        centres = torch.where(count[:, None] > 0, (member @ rows) / count[:, None].clamp_min(1), centres)
        empty = (count == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = rows[distance.topk(len(empty)).indices]
    return centres
