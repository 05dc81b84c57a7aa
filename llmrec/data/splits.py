"""Which interactions are trained on, ranked for selection, and ranked at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmrec.artifacts import SPLIT_CODES

TRAIN, VALID, TEST, CONTEXT = (SPLIT_CODES[name] for name in ("train", "valid", "test", "context"))
DROPPED = -1


def leave_one_out(offset: np.ndarray) -> np.ndarray:
    """Last interaction of a user test, last but one valid, the rest train; int8 (n,).

    Every user needs three interactions.
    """
    split = np.full(offset[-1], TRAIN, dtype=np.int8)
    split[offset[1:] - 2] = VALID
    split[offset[1:] - 1] = TEST
    return split


def global_time(
    offset: np.ndarray, timestamp: np.ndarray, valid_rate: float, test_rate: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Two points in time for all users: nothing after them is trained on.

    Train: before the first point. Valid target: a user's first interaction between the points. Test
    target: the first one at or after the second. Both need an earlier interaction of the user. Other
    interactions between the points are context: history at test, never trained on. Those after a test
    target are dropped, and so is whatever has no earlier interaction of its user.

    Returns:
        int8 (n,) split codes, DROPPED for rows to leave out, and the two points.
    """
    first, second = np.quantile(timestamp, [1 - valid_rate - test_rate, 1 - test_rate], method="higher")
    split = np.select([timestamp < first, timestamp < second], [TRAIN, CONTEXT], TEST).astype(np.int8)
    user = np.repeat(np.arange(len(offset) - 1), np.diff(offset))
    begins = offset[:-1][user] == np.arange(len(user))
    previous = np.concatenate([[TEST], split[:-1]])
    # The first row of a phase, with something before it; a user's rows are in time order.
    new_phase = (split != previous) & ~begins
    split[(split == CONTEXT) & new_phase] = VALID
    split[(split == TEST) & ~new_phase] = DROPPED
    points = {"valid_from": int(first), "test_from": int(second)}
    return split, points
