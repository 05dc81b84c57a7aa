"""Which interactions are trained on, ranked for selection, and ranked at the end."""

from __future__ import annotations

import numpy as np

from llmrec.interactions import SPLIT_CODES

TRAIN, VALID, TEST, CONTEXT = (SPLIT_CODES[name] for name in ("train", "valid", "test", "context"))
AFTER_TEST, NO_HISTORY, CONTEXT_ONLY = -1, -2, -3
DROPPED = {AFTER_TEST: "after_test_item", NO_HISTORY: "test_without_history", CONTEXT_ONLY: "context_only"}
"""Codes of rows that a global-time split leaves out, and what the summary calls them."""


def leave_one_out(offset: np.ndarray) -> np.ndarray:
    """Last interaction of a user test, last but one valid, the rest train; int8 (n,).

    Every user needs three interactions.
    """
    split = np.full(offset[-1], TRAIN, dtype=np.int8)
    split[offset[1:] - 2] = VALID
    split[offset[1:] - 1] = TEST
    return split


def time_points(timestamp: np.ndarray, valid_rate: float, test_rate: float) -> tuple[int, int]:
    """First moments of the valid and of the test period: quantiles of all interactions."""
    rates = [1 - valid_rate - test_rate, 1 - test_rate]
    first, second = np.quantile(timestamp, rates, method="higher")
    return int(first), int(second)


def global_time(offset: np.ndarray, timestamp: np.ndarray, points: tuple[int, int]) -> np.ndarray:
    """Two points in time for all users; nothing at or after the first is trained on; int8 (n,).

    - train: everything before the first point
    - valid target: a user's first interaction between the points, if the user has an earlier one
    - test target: a user's first interaction at or after the second point, if there is an earlier one
    - context: other interactions between the points; history of the test target, never trained on
    - left out (codes of DROPPED): what comes after a test target; interactions at or after the second
      point of users with nothing earlier; and users of whom only context is left

    Args:
        offset: first row of each user, int64 (U + 1,); rows are in user and time order.
        timestamp: int64 (n,).
        points: from `time_points`.
    """
    first, second = points
    phase = np.select([timestamp < first, timestamp < second], [TRAIN, CONTEXT], TEST)
    length = np.diff(offset)
    user = np.repeat(np.arange(len(length)), length)
    begins = np.zeros(len(user), dtype=bool)
    begins[offset[:-1]] = True
    enters = ~begins & (phase != np.concatenate([[TRAIN], phase[:-1]]))
    split = phase.astype(np.int8)
    split[(phase == CONTEXT) & enters] = VALID
    has_history = (phase != TEST)[offset[:-1]][user]
    split[(phase == TEST) & ~enters] = AFTER_TEST
    split[(phase == TEST) & ~has_history] = NO_HISTORY
    useful = np.bincount(user[np.isin(split, (TRAIN, VALID, TEST))], minlength=len(length)) > 0
    split[(split == CONTEXT) & ~useful[user]] = CONTEXT_ONLY
    return split
