"""First codes by k-means on what the levels before leave, level by level.

The plain one is in torch: on the device of the rows, equal results for equal seeds. scikit-learn's adds
partial sums in the order its threads finish, so more than two threads may give other last digits each
time, and it has no GPU. The one with bounds on cluster sizes is that of the library k-means-constrained,
which solves each assignment as a flow problem on the CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.errors import ConfigError
from llmrec.machine import running_sum
from llmrec.semantic_ids.config import cluster_bounds, size_bounds
from llmrec.semantic_ids.quantizer import ResidualQuantizer, squared_distances

BLOCK_ROWS = 1 << 14
"""Rows whose distances to all centres are held at once."""

RELOCATIONS = 3
"""Times that idle centres are moved before the rounds of k-means."""


@torch.no_grad()
def init_codebooks(
    quantizer: ResidualQuantizer,
    latent: Tensor,
    iterations: int,
    generator: torch.Generator,
    *,
    method: Literal["kmeans", "kmeans_constrained"] = "kmeans",
    restarts: int = 1,
    relocate_idle: bool = False,
) -> None:
    """Set every level's codes to the k-means centres of what the levels before leave of latent (n, D).

    Args:
        quantizer: gets the codes.
        latent: (n, D), n at least the number of codes.
        iterations: most rounds of k-means.
        generator: on the CPU, draws the seeds.
        method: kmeans, or kmeans_constrained with the published bounds on cluster sizes (`size_bounds`).
        restarts: seeds tried; the tightest result is kept.
        relocate_idle: see `kmeans`.
    """
    residual = latent
    for level in range(len(quantizer.codebooks)):
        size = quantizer.codebooks.shape[1]
        if method == "kmeans_constrained":
            bounds = size_bounds(len(residual), size)
            asked_by = "learn_semantic_ids.init='kmeans_constrained'"
            centres, _ = constrained(residual, size, bounds, iterations, restarts, generator, asked_by)
        else:
            centres = kmeans(
                residual, size, iterations, generator, restarts=restarts, relocate_idle=relocate_idle
            )
        quantizer.place(level, slice(None), centres)
        residual = residual - centres[nearest(residual, centres)[1]]


def kmeans(
    rows: Tensor,
    num_clusters: int,
    iterations: int,
    generator: torch.Generator,
    *,
    restarts: int = 1,
    relocate_idle: bool = False,
) -> Tensor:
    """Centres (K, D) of rows (n, D): k-means++ seeds, then Lloyd rounds until nothing moves.

    Where centres are the result, not the beginning of training that restarts dead codes, seeds that serve
    hardly anything should be moved first (relocate_idle, see `relocated`).
    """
    tried = []
    for _ in range(max(restarts, 1)):
        seeds = plus_plus(rows, num_clusters, generator)
        tried.append(lloyd(rows, relocated(rows, seeds) if relocate_idle else seeds, iterations))
    if len(tried) == 1:
        return tried[0]
    return min(tried, key=lambda centres: float(nearest(rows, centres)[0].double().sum()))


def code_clusters(
    codebooks: Tensor, num_clusters: int, iterations: int, generator: torch.Generator
) -> Tensor:
    """Clusters of each level's codes, int64 (L, K), of code embeddings (L, K, D).

    Sizes are bounded by `cluster_bounds`. Source: LETTER (HonghuiBao2000/LETTER@0d4a115 RQ-VAE/trainer.py),
    which keeps the best of ten k-means; this is one.
    """
    bounds = cluster_bounds(codebooks.shape[1], num_clusters)
    found = [
        constrained(
            codebook, num_clusters, bounds, iterations, 1, generator, "learn_semantic_ids.diversity_weight"
        )[1]
        for codebook in codebooks
    ]
    return torch.stack(found)


def constrained(
    rows: Tensor,
    num_clusters: int,
    bounds: tuple[int, int],
    iterations: int,
    restarts: int,
    generator: torch.Generator,
    asked_by: str,
) -> tuple[Tensor, Tensor]:
    """Centres (K, D) of clusters whose sizes are bounded, and the cluster of every row, int64 (n,).

    Args:
        rows: (n, D).
        num_clusters: K.
        bounds: least and most rows of a cluster.
        iterations: most rounds of k-means.
        restarts: seeds tried.
        generator: on the CPU, draws the seeds.
        asked_by: the setting that needs it, for messages.

    Raises:
        ConfigError: the library is not installed.
    """
    least, most = bounds
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        raise ConfigError(
            f"{asked_by} needs the library k-means-constrained: run `pip install "
            '"llmrec[constrained]"` (or `pip install k-means-constrained`), or leave it at its default'
        ) from None
    solver = KMeansConstrained(
        n_clusters=num_clusters,
        size_min=least,
        size_max=most,
        max_iter=iterations,
        n_init=restarts,
        random_state=int(torch.randint(2**31 - 1, (), generator=generator)),
        n_jobs=1,
    )
    solver.fit(rows.cpu().double().numpy())
    return torch.from_numpy(solver.cluster_centers_).to(rows), torch.from_numpy(solver.labels_).long()


def plus_plus(rows: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Rows chosen one after the other, with chances in proportion to the squared distance from those before.

    Once every distinct row is chosen, further ones are drawn uniformly.
    """
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    norms = rows.square().sum(dim=1)
    nearest_so_far = torch.ones_like(norms)
    chosen: list[Tensor] = []
    for draw in draws:
        total = running_sum(nearest_so_far.double(), 0)
        if total[-1] <= 0:
            total = torch.arange(1, len(rows) + 1, device=rows.device, dtype=torch.float64)
        index = torch.searchsorted(total, total[-1:] * draw, right=True).clamp_max_(len(rows) - 1)
        sums = norms + norms[index]
        distance = sums - 2 * (rows @ rows[index[0]])
        # Inner products leave the chosen row and its copies a rounding error off themselves.
        distance[distance <= 1e-6 * sums] = 0
        nearest_so_far = distance if not chosen else torch.minimum(nearest_so_far, distance)
        chosen.append(index)
    return rows[torch.cat(chosen)]


def relocated(rows: Tensor, centres: Tensor) -> Tensor:
    """Seeds (K, D) of which those that serve hardly anything were moved to where the error is.

    The mean of m rows that have little in common is 1 / m as long (squared) as they are. In many dimensions
    that counts for more than direction does: rows prefer the shorter centre, which is that of the larger
    cluster, and one cluster ends with nearly all rows, the others with the row they began with. No cluster is
    empty then, and Lloyd rounds never leave that state.
    """
    for _ in range(RELOCATIONS):
        centres, moved = relocate(rows, centres)
        if not moved:
            break
        centres = lloyd(rows, centres, 2)
    return centres


def relocate(rows: Tensor, centres: Tensor) -> tuple[Tensor, int]:
    """Centres (K, D) after moves that lower the error, and how many there were.

    A move takes the centre whose rows lose least by going to their second nearest, and puts it into the
    cluster of largest error, cut in two across its longest direction, as long as the cut gains more than the
    rows lose.
    """
    found = [
        squared_distances(block, centres).topk(2, dim=1, largest=False) for block in rows.split(BLOCK_ROWS)
    ]
    first, second = torch.cat([part.values for part in found]).unbind(dim=1)
    label, heir = torch.cat([part.indices for part in found]).unbind(dim=1)
    sums = sums_by_label(torch.stack([first, second - first], dim=1), label, len(centres))
    errors, losses = sums.T.tolist()
    order = label.argsort(stable=True)
    members = list(order.split(torch.bincount(label, minlength=len(centres)).tolist()))
    centres = centres.clone()
    dropped: set[int] = set()
    cut: set[int] = set()
    for spare in sorted(range(len(centres)), key=losses.__getitem__):
        worst = max(range(len(centres)), key=errors.__getitem__)
        if errors[worst] <= losses[spare]:
            break
        # The rows of a centre that goes need the one they go to.
        if spare in cut or spare == worst or not dropped.isdisjoint(heir[members[spare]].tolist()):
            continue
        own = members[worst]
        gain, halves = cut_in_two(rows[own])
        if gain <= losses[spare]:
            break
        for slot, (side, centre, error) in zip((worst, spare), halves):
            members[slot], centres[slot], errors[slot] = own[side], centre, error
        dropped.add(spare)
        cut |= {worst, spare}
    return centres, len(dropped)


def cut_in_two(rows: Tensor) -> tuple[float, list[tuple[Tensor, Tensor, float]]]:
    """Rows (m, D) cut across their longest direction: squared error gained; of both halves which rows they
    are, their mean and their error."""
    middle = rows.mean(dim=0)
    rows = rows - middle
    direction = rows[rows.square().sum(dim=1).argmax()]
    for _ in range(3):
        direction = F.normalize((rows @ direction) @ rows, dim=0)
    side = rows @ direction > 0
    halves, gain = [], 0.0
    for chosen in (side, ~side):
        part = rows[chosen]
        if not len(part):
            return 0.0, []
        centre = part.mean(dim=0)
        gain += len(part) * float(centre.square().sum())
        halves.append((chosen, middle + centre, float((part - centre).square().sum())))
    return gain, halves


def lloyd(rows: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Move centres to the means of their rows; an empty cluster takes one of the worst-served rows."""
    last = None
    for _ in range(iterations):
        distance, label = nearest(rows, centres)
        if last is not None and torch.equal(label, last):
            break
        last = label
        count = torch.bincount(label, minlength=len(centres)).to(rows.dtype)
        centres = torch.where(
            count[:, None] > 0,
            sums_by_label(rows, label, len(centres)) / count[:, None].clamp_min(1),
            centres,
        )
        empty = (count == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = rows[distance.topk(len(empty)).indices]
    return centres


def nearest(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to, and number of, the nearest centre of every row, in blocks."""
    found = [squared_distances(block, centres).min(dim=1) for block in rows.split(BLOCK_ROWS)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def sums_by_label(rows: Tensor, label: Tensor, num_clusters: int) -> Tensor:
    """Sums (K, D) of the rows of each label.

    A product instead of index_add_, whose order of addition is open on a GPU.
    """
    total = rows.new_zeros(num_clusters, rows.shape[1])
    for block, labels in zip(rows.split(BLOCK_ROWS), label.split(BLOCK_ROWS)):
        total += F.one_hot(labels, num_clusters).T.to(rows.dtype) @ block
    return total
