"""Where a method is good: groups of items, lengths of histories, differences that are no accident."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k, summarise
from llmrec.evaluation.rank import Ranking
from llmrec.interactions import Targets

GROUPS = ("head", "mid", "tail", "cold")
SAMPLES = 2000
"""Resamplings of users behind an interval of a comparison."""


def item_groups(train_count: np.ndarray, head_rate: float, mid_rate: float) -> np.ndarray:
    """Group of every item as an index into GROUPS, int64 (N + 1,); entry 0 means nothing.

    Items are ordered by train interactions (equal ones by id): the first head_rate of them are head,
    the next mid_rate mid, the rest tail; items without any are cold wherever they stand.
    """
    count = train_count[1:]
    place = np.empty(len(count), dtype=np.int64)
    place[np.argsort(-count, kind="stable")] = np.arange(len(count))
    bounds = np.round(np.array([head_rate, head_rate + mid_rate]) * len(count))
    group = np.searchsorted(bounds, place, side="right")
    group[count == 0] = GROUPS.index("cold")
    return np.concatenate([[0], group])


def by_group(
    rankings: dict[str, Ranking], targets: Targets, group_of_item: np.ndarray, ks: tuple[int, ...]
) -> dict[str, Any]:
    """Metrics of every method over the users whose target is in each group of items."""
    parts = parts_by_group(np.array(GROUPS)[group_of_item[targets.item]])
    return {name: _slice(rankings, chosen, ks) for name, chosen in parts.items()}


def by_length(
    rankings: dict[str, Ranking], targets: Targets, ks: tuple[int, ...], edges: Sequence[int]
) -> dict[str, Any]:
    """Metrics of every method over users with histories of each length, see `parts_by_length`."""
    parts = parts_by_length(targets.stop - targets.start, edges)
    return {name: _slice(rankings, chosen, ks) for name, chosen in parts.items()}


def parts_by_group(group: np.ndarray) -> dict[str, np.ndarray]:
    """Which users' target is in each group of items, bool (U,), from the names of the groups (U,)."""
    masks = {name: group == name for name in GROUPS}
    return {name: mask for name, mask in masks.items() if mask.any()}


def parts_by_length(length: np.ndarray, edges: Sequence[int]) -> dict[str, np.ndarray]:
    """Which users have a history of each length, bool (U,).

    Args:
        length: of users' histories, in items, (U,).
        edges: the longest history of every group but the last, ascending.
    """
    lows = [0, *(edge + 1 for edge in edges)]
    names = [f"{low}-{high}" for low, high in zip(lows, edges)] + [f"{lows[-1]}+"]
    group = np.searchsorted(edges, length)
    masks = {name: group == number for number, name in enumerate(names)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _slice(rankings: dict[str, Ranking], chosen: np.ndarray, ks: tuple[int, ...]) -> dict[str, Any]:
    return {
        "num_users": int(chosen.sum()),
        "share": float(chosen.mean()),
        "rows": {name: summarise(ranking.rank[chosen], ks) for name, ranking in rankings.items()},
    }


def recommendations(top: np.ndarray, train_count: np.ndarray) -> dict[str, float]:
    """Coverage and popularity of the ten best items of every user.

    Args:
        top: int64 (U, k) item ids, best first, 0 = none.
        train_count: int64 (N + 1,).
    """
    shown = top[:, :10]
    shown = shown[shown > 0]
    return {
        "coverage@10": float(len(np.unique(shown)) / (len(train_count) - 1)),
        "mean_train_count@10": float(train_count[shown].mean()) if len(shown) else 0.0,
    }


def paired(first: np.ndarray, second: np.ndarray, *, samples: int, seed: int) -> dict[str, Any]:
    """Is the first method better than the second, user by user?

    Args:
        first: float64 (U,) ranks of one method.
        second: float64 (U,) ranks of the other, same users.
        samples: bootstrap resamplings of users.
        seed: of the bootstrap.

    Returns:
        For recall@10 and ndcg@10, what `difference_of` tells.
    """
    return {
        name: difference_of(metric(first, 10) - metric(second, 10), samples=samples, seed=seed)
        for name, metric in (("recall@10", recall_at_k), ("ndcg@10", ndcg_at_k))
    }


def difference_of(difference: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Mean of per-user differences (U,), its 95 % bootstrap interval, and the two-sided p of a paired t-test
    (None if it is the same for all users, or there is one alone: without any variance there is no test).

    The test, like the interval, asks for the mean; MME-SID's Table 3 has it too. Tests of ranks, such as
    Wilcoxon's, ask whether differences are symmetric, and those of a mean of several runs to a single one are
    not: of 100 such pairs that are equally good Wilcoxon's calls 16 to 21 different at p < 0.05 (22,000
    simulated users, three runs to one), this one 5 to 7.
    """
    # A mean of three seeds that agree may differ from each of them in the last bit, for all users alike.
    difference = np.round(difference, 12)
    # To draw users with replacement is to draw how often each value occurs, and values are few.
    values, count = np.unique(difference, return_counts=True)
    number = len(difference)
    rng = np.random.default_rng(seed)
    means = [rng.multinomial(number, count / number) @ values / number for _ in range(samples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p_value": float(ttest_1samp(difference, 0).pvalue) if len(values) > 1 else None,
    }


def holm(p_values: list[float]) -> list[float]:
    """p corrected for the number of tests, in the given order (Holm 1979: the i-th smallest of m, from 0,
    times m - i, never below an earlier one, at most 1)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = largest
    return corrected
