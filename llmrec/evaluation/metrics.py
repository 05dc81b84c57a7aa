"""Ranking metrics with one target per user, from ranks alone.

A rank is 0-based: the number of items ahead of the target plus half of those tied with it. With the
1-based rank r = rank + 1: recall@k = [r <= k] (equal to HR@k with one target),
ndcg@k = [r <= k] / log2(r + 1) (the ideal DCG is 1), mrr@k = [r <= k] / r.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def recall_at_k(rank: np.ndarray, k: int) -> np.ndarray:
    """1 where the target is among the first k, else 0; float64 (U,)."""
    return (rank + 1 <= k).astype(np.float64)


def ndcg_at_k(rank: np.ndarray, k: int) -> np.ndarray:
    """Discounted gain of the target, 0 beyond k; float64 (U,)."""
    return recall_at_k(rank, k) / np.log2(rank + 2)


def mrr_at_k(rank: np.ndarray, k: int) -> np.ndarray:
    """Reciprocal of the 1-based rank, 0 beyond k; float64 (U,)."""
    return recall_at_k(rank, k) / (rank + 1)


METRICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "recall": recall_at_k,
    "ndcg": ndcg_at_k,
    "mrr": mrr_at_k,
}
"""By the name that metrics.json and tables show, which hold every one of them at every k."""


def per_user(rank: np.ndarray, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Every metric of every user, by name such as ``ndcg@10``; float64 (U,) each."""
    return {f"{name}@{k}": metric(rank, k) for k in ks for name, metric in METRICS.items()}


def summarise(rank: np.ndarray, ks: tuple[int, ...] = (5, 10, 20)) -> dict[str, float]:
    """Means over all users, by name such as ``recall@10``."""
    return {name: float(values.mean()) for name, values in per_user(rank, ks).items()}


def of_validation(rank: np.ndarray) -> dict[str, float]:
    """Means that training logs of the validation items, from their ranks (U,); ndcg chooses the epoch."""
    return {
        "valid_ndcg@10": float(ndcg_at_k(rank, 10).mean()),
        "valid_recall@10": float(recall_at_k(rank, 10).mean()),
    }
