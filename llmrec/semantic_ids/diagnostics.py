"""How good semantic IDs are: use of the codes, collisions, reconstruction, and distances kept.

Source of the distance figure: MME-SID Eq. 8 and section 5.3. The paper does not say which samples it
takes; ours come from the train split alone, so that no figure depends on held-out items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import kendalltau

from llmrec.artifacts import Interactions

MAX_SAMPLES = 200_000
"""Most (history item, target) samples for Kendall's tau."""


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


def relative_error(source: np.ndarray, decoded: np.ndarray) -> float:
    """Squared error in units of the variance: 0 is perfect, 1 is what the mean vector would give."""
    spread = np.square(source - source.mean(axis=0)).sum()
    return float(np.square(source - decoded).sum() / spread) if spread > 0 else 0.0


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


def distances(table: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances, float64 (S,), between rows a and b of a table (n, D), in blocks."""
    found = np.empty(len(a))
    for start in range(0, len(a), 1 << 14):
        block = slice(start, start + (1 << 14))
        found[block] = np.linalg.norm(table[a[block]].astype(np.float64) - table[b[block]], axis=1)
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


def modality_quality(
    *,
    source: np.ndarray,
    scaled: np.ndarray,
    quantized: np.ndarray,
    decoded: np.ndarray,
    codes: np.ndarray,
    codebooks: np.ndarray,
    present: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """All figures of one modality; items without a vector are left out.

    Args:
        source: item vectors (N + 1, D_m), what distances are compared with.
        scaled: (N + 1, D_m), what the encoder saw.
        quantized: sums of code embeddings (N + 1, D).
        decoded: (N + 1, D_m), on the scale of scaled.
        codes: (N + 1, L).
        codebooks: (L, K, D).
        present: bool (N + 1,), items that have a vector.
        pairs: see `behaviour_target_pairs`.
        seed: of the random codes beside which tau is seen.
    """
    both = present[pairs[0]] & present[pairs[1]]
    history, target = pairs[0][both], pairs[1][both]
    levels, size, _ = codebooks.shape
    random_codes = np.random.default_rng(seed).integers(0, size, codes.shape)
    tables = {
        "latent": quantized,
        "decoded": decoded,
        "random_codes": codebooks[np.arange(levels), random_codes].sum(axis=1),
    }
    reference = distances(source, history, target)
    tau: dict[str, Any] = {}
    for name, table in tables.items():
        tau[name], tau[f"{name}_tau_a"] = kendall_tau(reference, distances(table, history, target))
    return {
        "levels": level_quality(codes[present], size),
        **collisions(codes[present]),
        "reconstruction_error": relative_error(scaled[present], decoded[present]),
        "tau": {**tau, "num_samples": len(history)},
        "num_items": int(present.sum()),
    }
