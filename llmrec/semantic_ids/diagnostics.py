"""How good semantic IDs are: use of the codes, collisions, reconstruction, and distances kept.

Source of the distance figure: MME-SID Eq. 8 and section 5.3. The paper does not say which samples it
takes; ours come from the train split alone, so that no figure depends on held-out items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import kendalltau

from llmrec.interactions import Interactions
from llmrec.semantic_ids.assign import Rebuilt
from llmrec.semantic_ids.quantizer import squared_distances

MAX_SAMPLES = 200_000
"""Most (history item, target) samples for Kendall's tau."""

MAX_QUERIES = 1000
"""Most items whose neighbours are compared."""

MAX_COMPARISONS = 200_000_000
"""Fewer items are asked in a catalogue so large that all comparisons would be more, but at least 100."""

MAX_PAIRS = 4_000_000
"""Most pairs of samples that are compared at once for the tau of single users."""

BLOCK = 1 << 14
"""Items whose vectors are held at once."""


def level_quality(codes: np.ndarray, num_codes: int) -> list[dict[str, Any]]:
    """Per level: utilisation in [0, 1], perplexity in codes, dead codes; codes int64 (n, L)."""
    levels = []
    for column in codes.T:
        count = np.bincount(column, minlength=num_codes)
        share = count[count > 0] / len(column)
        levels.append(
            {
                "utilisation": float((count > 0).mean()),
                "perplexity": float(np.exp(-(share * np.log(share)).sum())),
                "dead_codes": int((count == 0).sum()),
            }
        )
    return levels


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """How many of n items share their tuple of codes (n, L) with another item.

    collision_rate is (n - number of distinct tuples) / n, as LC-Rec and LETTER count.
    """
    _, size = np.unique(codes, axis=0, return_counts=True)
    return {
        "collision_rate": float((len(codes) - len(size)) / len(codes)),
        "items_in_collision": int(size[size > 1].sum()),
        "largest_group": int(size.max()),
    }


class Pairs(NamedTuple):
    """(history item, target) samples, all int64 (S,)."""

    history: np.ndarray
    target: np.ndarray
    user: np.ndarray


def behaviour_target_pairs(data: Interactions, seed: int, split: Literal["train", "test"] = "train") -> Pairs:
    """A user's target with each item before it; at most MAX_SAMPLES samples, the same for equal seeds.

    Args:
        data: who interacted with what.
        seed: of the draw if there are more.
        split: train: the last train item is the target, so that nothing depends on held-out items; test: the
            test target, with all items before it, as the paper seems to have it.
    """
    if split == "train":
        offset, item, _ = data.sequences("train")
        user = np.flatnonzero(np.diff(offset))
        start, stop = offset[user], offset[user + 1] - 1
        target = item[stop]
    else:
        found, item = data.targets("test"), data.item
        start, stop, target, user = found.start, found.stop, found.item, found.user
    length = stop - start
    row = np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())
    pairs = Pairs(item[row], np.repeat(target, length), np.repeat(user, length))
    if len(row) > MAX_SAMPLES:
        kept = np.sort(np.random.default_rng(seed).choice(len(row), MAX_SAMPLES, replace=False))
        pairs = Pairs(*(part[kept] for part in pairs))
    return pairs


Table = Callable[[np.ndarray], np.ndarray]
"""Vectors (m, D) of items (m,), so that no table of all items need exist."""


def distances(table: Table, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances, float64 (S,), between the vectors of items a and b, in blocks."""
    found = np.empty(len(a))
    for start in range(0, len(a), BLOCK):
        block = slice(start, start + BLOCK)
        found[block] = np.linalg.norm(table(a[block]).astype(np.float64) - table(b[block]), axis=1)
    return found


def kendall_tau(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Kendall's tau-b and tau-a over all pairs of samples, O(n log n); None where undefined.

    tau-a divides by the number of pairs (Eq. 8), tau-b only by pairs that are not tied.
    """
    pairs = len(x) * (len(x) - 1) / 2
    untied = (pairs - tied_pairs(x)) * (pairs - tied_pairs(y))
    if untied <= 0:
        return None, None
    tau_b = float(kendalltau(x, y, variant="b").statistic)
    return tau_b, tau_b * float(np.sqrt(untied)) / pairs


def tied_pairs(x: np.ndarray) -> int:
    """How many pairs of samples are equal."""
    _, count = np.unique(x, return_counts=True)
    return int((count * (count - 1) // 2).sum())


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One modality with its codes, as the figures need it."""

    source: np.ndarray
    """Item vectors float32 (N + 1, D_m), what distances are compared with"""
    present: np.ndarray
    """bool (N + 1,), items that have a vector"""
    codes: np.ndarray
    """int64 (N + 1, L)"""
    codebooks: np.ndarray
    """float32 (L, K, D)"""
    rebuilt: Rebuilt
    """What codes stand for"""

    def table(self, name: str) -> Table:
        """source, latent (sum of the codes) or decoded vectors by item id."""
        if name == "source":
            return lambda items: self.source[items]
        return lambda items: self.rebuilt(name, items)

    @property
    def items(self) -> np.ndarray:
        """Ids of the items that have a vector, int64 (n,)."""
        return np.flatnonzero(self.present)


def modality_quality(coded: Coded, pairs: Pairs, seed: int) -> dict[str, Any]:
    """All figures of one modality; items without a vector are left out.

    Args:
        coded: vectors and codes.
        pairs: see `behaviour_target_pairs`.
        seed: of the random codes beside which tau is seen, and of the items whose neighbours are compared.
    """
    both = coded.present[pairs.history] & coded.present[pairs.target]
    history, target = pairs.history[both], pairs.target[both]
    codes = coded.codes[coded.present]
    return {
        "levels": level_quality(codes, coded.codebooks.shape[1]),
        **collisions(codes),
        "reconstruction_error": reconstruction_error(coded),
        "neighbour_overlap": neighbour_overlap(coded, seed),
        "tau": {**taus(coded, history, target, seed), "num_samples": len(history)},
        "num_items": len(codes),
    }


def reconstruction_error(coded: Coded) -> float:
    """Squared error of decoded vectors in units of the variance, over all items that have one, in blocks.

    0 is perfect, 1 is what the mean vector would give.
    """
    items = coded.items
    blocks = np.array_split(items, max(1, -(-len(items) // BLOCK)))
    mean = sum(coded.rebuilt.scaled(coded.source[block]).sum(0, dtype=np.float64) for block in blocks)
    mean = mean / len(items)
    error = spread = 0.0
    for block in blocks:
        scaled = coded.rebuilt.scaled(coded.source[block]).astype(np.float64)
        error += np.square(scaled - coded.rebuilt("decoded", block)).sum()
        spread += np.square(scaled - mean).sum()
    return float(error / spread) if spread > 0 else 0.0


def taus(coded: Coded, history: np.ndarray, target: np.ndarray, seed: int) -> dict[str, float | None]:
    """Kendall's tau of distances under the codes, against those of the item vectors.

    Returns:
        tau-b, and tau-a under names that end so: of the codes' sums, of the decoded vectors, and of the sums
        of random codes.
    """
    levels, size, _ = coded.codebooks.shape
    random_codes = np.random.default_rng(seed).integers(0, size, coded.codes.shape)
    tables: dict[str, Table] = {
        "latent": coded.table("latent"),
        "decoded": coded.table("decoded"),
        "random_codes": lambda items: coded.codebooks[np.arange(levels), random_codes[items]].sum(axis=1),
    }
    reference = distances(coded.table("source"), history, target)
    found: dict[str, float | None] = {}
    for name, table in tables.items():
        found[name], found[f"{name}_tau_a"] = kendall_tau(reference, distances(table, history, target))
    return found


def neighbour_overlap(coded: Coded, seed: int, *, k: int = 10) -> dict[str, Any]:
    """Share of an item's k nearest items (Euclidean) that are the same under the codes, mean over items.

    Returns:
        latent, decoded: shares in [0, 1]; k; num_queries, items asked.
    """
    items = coded.items
    k = min(k, len(items) - 1)
    rng = np.random.default_rng(seed)
    asked = min(MAX_QUERIES, max(100, MAX_COMPARISONS // len(items)))
    chosen = items if len(items) <= asked else np.sort(rng.choice(items, asked, replace=False))
    true = nearest_items(coded.table("source"), items, chosen, k)
    found: dict[str, Any] = {}
    for name in ("latent", "decoded"):
        ours = nearest_items(coded.table(name), items, chosen, k)
        same = (true[:, :, None] == ours[:, None, :]).any(axis=2)
        found[name] = float(same.mean()) if k else None
    return found | {"k": k, "num_queries": len(chosen)}


def nearest_items(table: Table, items: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k items nearest to each query, itself left out, int64 (q, k)."""
    centre = table(queries).mean(axis=0)  # far from the origin, distances would drown in rounding
    asked = torch.from_numpy(table(queries) - centre)
    best = torch.full((len(queries), k), torch.inf)
    place = torch.zeros((len(queries), k), dtype=torch.int64)
    own = torch.from_numpy(queries)[:, None]
    for block in np.array_split(items, max(1, -(-len(items) // BLOCK))):
        rows, names = torch.from_numpy(table(block) - centre), torch.from_numpy(block)
        near = squared_distances(asked, rows).masked_fill_(names == own, torch.inf)
        near = torch.cat([best, near], dim=1)
        best, found = near.topk(k, dim=1, largest=False)
        place = torch.cat([place, names.expand(len(queries), -1)], dim=1).gather(1, found)
    return place.numpy()


def tau_per_user(coded: Coded, pairs: Pairs) -> dict[str, float | None]:
    """Mean over users of Kendall's tau-b among their own samples, for users in whom it is defined.

    Args:
        coded: vectors and codes.
        pairs: samples; those with an item that has no vector are left out.
    """
    both = coded.present[pairs.history] & coded.present[pairs.target]
    history, target, user = (part[both] for part in pairs)
    reference = distances(coded.table("source"), history, target)
    found: dict[str, float | None] = {}
    start = np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1])
    length = np.diff(np.concatenate([start, [len(user)]]))
    for name in ("latent", "decoded"):
        ours = distances(coded.table(name), history, target)
        taus = [
            tau_of_rows(reference[rows], ours[rows])
            for size in np.unique(length[length > 1])
            for rows in blocks_of(start[length == size], int(size))
        ]
        defined = np.concatenate([tau[~np.isnan(tau)] for tau in taus] or [[]])
        found[name] = float(defined.mean()) if len(defined) else None
    return found


def blocks_of(start: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Indices (u, size) of runs of samples, in blocks of as many as may be paired at once."""
    number = max(1, MAX_PAIRS // (size * size))
    for first in range(0, len(start), number):
        yield start[first : first + number, None] + np.arange(size)


def tau_of_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row of samples (u, n), by comparing all pairs; NaN where it is undefined."""
    first, second = np.triu_indices(x.shape[1], 1)
    by_x, by_y = (np.sign(values[:, first] - values[:, second]) for values in (x, y))
    untied = (by_x != 0).sum(axis=1) * (by_y != 0).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (by_x * by_y).sum(axis=1) / np.sqrt(untied)


def spectrum(table: Table, items: np.ndarray) -> dict[str, Any]:
    """Singular values of the matrix of items' vectors, not centred (spec of MME-SID's collapse figures).

    Returns:
        log10_ratio: log10 of each singular value over the largest, -16 where it is lost in rounding.
        numerical_rank: values above 1e-6 of the largest. entropy_rank: exp of the entropy of the squared
        values' shares; rank_me: the same of the values themselves (Garrido et al. 2023); stable_rank: sum of
        squares over the largest square.
    """
    total: Any = 0.0
    for block in np.array_split(items, max(1, -(-len(items) // BLOCK))):
        rows = table(block).astype(np.float64)
        total = total + rows.T @ rows
    squares = np.linalg.eigvalsh(total)[::-1].clip(min=0)
    squares = squares[: min(len(items), len(squares))]
    if squares[0] <= 0:
        zero = {"numerical_rank": 0, "entropy_rank": 0.0, "rank_me": 0.0, "stable_rank": 0.0}
        return {"log10_ratio": [], **zero}
    values = np.sqrt(squares)
    # Eigenvalues of the Gram matrix carry errors of 1e-16 of the largest, so values below 1e-8 are noise.
    ratio = np.where(values > 1e-8 * values[0], values / values[0], 0.0)

    def entropy_of(shares: np.ndarray) -> float:
        shares = shares[shares > 0] / shares.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    return {
        "log10_ratio": np.log10(np.maximum(ratio, 1e-16)).tolist(),
        "numerical_rank": int((ratio > 1e-6).sum()),
        "entropy_rank": entropy_of(squares),
        "rank_me": entropy_of(values),
        "stable_rank": float(squares.sum() / squares[0]),
    }


def group_sizes(codes: np.ndarray) -> dict[str, int]:
    """How many groups of so many items share all codes (n, L), by size of the group."""
    _, size = np.unique(codes, axis=0, return_counts=True)
    number, count = np.unique(size, return_counts=True)
    return {str(one): int(many) for one, many in zip(number, count)}
