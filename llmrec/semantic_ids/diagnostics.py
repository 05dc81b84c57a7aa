"""How good semantic IDs are: use of the codes, collisions, reconstruction, and distances kept.

Source of the distance figure: MME-SID Eq. 8 and section 5.3. The paper does not say which samples it
takes; ours come from the train split alone, so that no figure depends on held-out items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from llmrec.artifacts import Interactions
from llmrec.semantic_ids.assign import Rebuilt
from llmrec.semantic_ids.quantizer import squared_distances

MAX_SAMPLES = 200_000
"""Most (history item, target) samples for Kendall's tau."""

MAX_QUERIES = 1000
"""Most items whose neighbours are compared."""

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


def behaviour_target_pairs(data: Interactions, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(history item, target) samples: each user's last train item, and each train item before it.

    Returns:
        Item ids of both, int64 (S,), at most MAX_SAMPLES of them.
    """
    offset, item = data.train_sequences()
    length = np.diff(offset)
    last = offset[1:][length > 0] - 1
    is_history = np.ones(len(item), dtype=bool)
    is_history[last] = False
    row = np.flatnonzero(is_history)
    if len(row) > MAX_SAMPLES:
        row = np.sort(np.random.default_rng(seed).choice(row, MAX_SAMPLES, replace=False))
    target = np.repeat(item[last], length[length > 0])
    return item[row], target[row]


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


def modality_quality(coded: Coded, pairs: tuple[np.ndarray, np.ndarray], seed: int) -> dict[str, Any]:
    """All figures of one modality; items without a vector are left out.

    Args:
        coded: vectors and codes.
        pairs: see `behaviour_target_pairs`.
        seed: of the random codes beside which tau is seen, and of the items whose neighbours are compared.
    """
    both = coded.present[pairs[0]] & coded.present[pairs[1]]
    history, target = pairs[0][both], pairs[1][both]
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
        latent, decoded: shares in [0, 1]; k; num_queries, items asked, at most MAX_QUERIES.
    """
    items = coded.items
    k = min(k, len(items) - 1)
    rng = np.random.default_rng(seed)
    chosen = items if len(items) <= MAX_QUERIES else np.sort(rng.choice(items, MAX_QUERIES, replace=False))
    true = nearest_items(coded.table("source"), items, chosen, k)
    found: dict[str, Any] = {}
    for name in ("latent", "decoded"):
        ours = nearest_items(coded.table(name), items, chosen, k)
        same = (true[:, :, None] == ours[:, None, :]).any(axis=2)
        found[name] = float(same.mean()) if k else None
    return found | {"k": k, "num_queries": len(chosen)}


def nearest_items(table: Table, items: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k items nearest to each query, itself left out, int64 (q, k)."""
    asked = torch.from_numpy(np.ascontiguousarray(table(queries)))
    best = torch.full((len(queries), k), torch.inf)
    place = torch.zeros((len(queries), k), dtype=torch.int64)
    own = torch.from_numpy(queries)[:, None]
    for block in np.array_split(items, max(1, -(-len(items) // BLOCK))):
        rows, names = torch.from_numpy(table(block)), torch.from_numpy(block)
        near = squared_distances(asked, rows).masked_fill_(names == own, torch.inf)
        near = torch.cat([best, near], dim=1)
        best, found = near.topk(k, dim=1, largest=False)
        place = torch.cat([place, names.expand(len(queries), -1)], dim=1).gather(1, found)
    return place.numpy()
