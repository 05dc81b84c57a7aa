"""The order of interactions with equal timestamps, and what it may give away.

Public files list such ties in item-id order (Amazon Beauty: 44 % of neighbouring pairs, every one of
them ascending), and item ids often follow release dates or categories: a sequence model can learn the
order of the file instead of the order of interest.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def time_order(user: np.ndarray, timestamp: np.ndarray, how: str, seed: int) -> np.ndarray:
    """Row order by user and time; ties as in the file or shuffled; int64 (n,)."""
    tie_break = np.arange(len(user))
    if how == "shuffle":
        tie_break = np.random.default_rng(seed).permutation(len(user))
    return np.lexsort([tie_break, timestamp, user])


def measure(offset: np.ndarray, timestamp: np.ndarray, item: np.ndarray) -> dict[str, Any]:
    """Shares of ties among neighbours, of ascending ids among ties, and of users whose valid and test
    items are tied. Item ids are in the order of raw ids, so ascending means ascending raw ids."""
    user = np.repeat(np.arange(len(offset) - 1), np.diff(offset))
    neighbours = user[1:] == user[:-1]
    tied = neighbours & (timestamp[1:] == timestamp[:-1])
    ascending = tied & (item[1:] > item[:-1])
    last_two = tied[offset[1:][np.diff(offset) >= 2] - 2]
    return {
        "tied_pair_rate": float(tied.sum() / max(neighbours.sum(), 1)),
        "ascending_rate_of_ties": float(ascending.sum() / max(tied.sum(), 1)),
        "tied_valid_test_user_rate": float(last_two.mean()) if len(last_two) else 0.0,
    }


def warning(figures: dict[str, Any]) -> str | None:
    """What a reader of results must know, or None if ties are rare."""
    if figures["tied_pair_rate"] < 0.01:
        return None
    text = (
        f"{figures['tied_pair_rate']:.1%} of neighbouring interactions have equal timestamps, "
        f"{figures['ascending_rate_of_ties']:.1%} of these in ascending item-id order; "
        f"{figures['tied_valid_test_user_rate']:.1%} of users have their last two items at one time"
    )
    if figures["order"] == "shuffle":
        return text + ". Their order was shuffled."
    return text + (
        ". A model can learn the order of the file; compare with prepare_data.ties=shuffle before "
        "trusting differences."
    )
