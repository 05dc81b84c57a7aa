"""The order of interactions with equal timestamps, and what it may give away.

Public files list such ties in item-id order (Amazon Beauty: 44 % of neighbouring pairs, every one of
them ascending), and item ids often follow release dates or categories: a sequence model can learn the
order of the file instead of the order of interest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RARE = 0.01
"""Ties below this share of neighbouring pairs are not worth a warning."""
ORDERED = 0.6
"""Ties of which more than this share is ascending (or descending) are listed in id order."""


def file_order(user: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Row order by user and time, ties as in the file; int64 (n,)."""
    return np.lexsort([timestamp, user])


def shuffled_order(user: np.ndarray, timestamp: np.ndarray, item: np.ndarray, seed: int) -> np.ndarray:
    """Row order by user and time, ties shuffled; int64 (n,). Does not depend on the order of the rows."""
    order = np.lexsort([item, timestamp, user])
    key = np.random.default_rng(seed).permutation(len(user))
    return order[np.lexsort([key, timestamp[order], user[order]])]


def measure(offset: np.ndarray, timestamp: np.ndarray, item: np.ndarray) -> dict[str, float]:
    """Shares of ties among neighbours, of ascending ids among ties, and of users with a tied last pair.

    Args:
        offset: first row of each user, int64 (U + 1,); rows are in user and time order.
        timestamp: int64 (n,).
        item: int64 (n,), numbered in the order of raw ids, so that ascending means ascending raw ids.
    """
    user = np.repeat(np.arange(len(offset) - 1), np.diff(offset))
    neighbours = user[1:] == user[:-1]
    tied = neighbours & (timestamp[1:] == timestamp[:-1])
    ascending = tied & (item[1:] > item[:-1])
    last_pair = tied[offset[1:][np.diff(offset) >= 2] - 2]
    return {
        "tied_pair_rate": float(tied.sum() / max(neighbours.sum(), 1)),
        "ascending_rate": float(ascending.sum() / max(tied.sum(), 1)),
        "tied_last_pair_user_rate": float(last_pair.sum() / max(len(last_pair), 1)),
    }


def warning(figures: dict[str, Any]) -> str | None:
    """What a reader of results must know about the order of the file, or None if it is harmless."""
    ascending = figures["ascending_rate"]
    if figures["tied_pair_rate"] <= RARE or 1 - ORDERED <= ascending <= ORDERED:
        return None
    share, way = (ascending, "ascending") if ascending > 0.5 else (1 - ascending, "descending")
    text = (
        f"{figures['tied_pair_rate']:.1%} of neighbouring interactions have equal timestamps, {share:.1%} of "
        f"these stand in {way} item-id order in the file, and the last two items of "
        f"{figures['tied_last_pair_user_rate']:.1%} of users are tied"
    )
    if figures["order"] == "shuffle":
        return f"{text}; such ties were shuffled."
    return f"{text}. A model can learn the order of the file: compare with prepare_data.ties=shuffle."
