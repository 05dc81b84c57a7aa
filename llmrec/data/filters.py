"""Which interactions are kept."""

from __future__ import annotations

import numpy as np


def first_of_duplicates(user: np.ndarray, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """The first of rows that agree in user, item and time; bool (n,).

    A user may come back to an item at another time; such repeats stay.
    """
    keys = (timestamp, item, user)
    order = np.lexsort([np.arange(len(user)), *keys])
    same = np.ones(max(len(user) - 1, 0), dtype=bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    keep = np.ones(len(user), dtype=bool)
    keep[order[1:][same]] = False
    return keep


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Rows that are left when users and items with fewer than k rows go, again and again; bool (n,).

    Args:
        user: int user numbers, (n,).
        item: int item numbers, (n,).
        k: least number of interactions.
    """
    keep = np.ones(len(user), dtype=bool)
    while True:
        before = keep.sum()
        for ids in (user, item):
            count = np.bincount(ids[keep], minlength=ids.max() + 1)
            keep &= count[ids] >= k
        if keep.sum() == before:
            return keep
