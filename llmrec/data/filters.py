"""Which interactions are kept."""

from __future__ import annotations

import numpy as np


def first_of_duplicates(user: np.ndarray, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """The first of rows that agree in user, item and time; bool (n,).

    A user may come back to an item at another time; such repeats stay.

    Args:
        user: int64 user numbers, (n,).
        item: int64 item numbers, (n,).
        timestamp: int64 (n,).
    """
    pair = user * (item.max(initial=0) + 1) + item
    order = np.lexsort([timestamp, pair])  # stable: equal rows stay in file order
    pair, timestamp = pair[order], timestamp[order]
    keep = np.ones(len(user), dtype=bool)
    keep[order[1:][(pair[1:] == pair[:-1]) & (timestamp[1:] == timestamp[:-1])]] = False
    return keep


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Rows that are left when users and items with fewer than k rows go, again and again; bool (n,).

    Args:
        user: int64 user numbers, (n,).
        item: int64 item numbers, (n,).
        k: least number of interactions.
    """
    keep = np.ones(len(user), dtype=bool)
    while True:
        before = keep.sum()
        for ids in (user, item):
            count = np.bincount(ids[keep], minlength=ids.max(initial=0) + 1)
            keep &= count[ids] >= k
        if keep.sum() == before:
            return keep
