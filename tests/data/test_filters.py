"""Filters, tie orders and splits against plain loops."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from llmrec.data import splits, ties
from llmrec.data.filters import first_of_duplicates, k_core


@pytest.mark.parametrize("seed", range(5))
def test_the_k_core_equals_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 30, 150), rng.integers(0, 25, 150)
    rows = set(range(150))
    while True:
        users, items = Counter(user[list(rows)]), Counter(item[list(rows)])
        stay = {row for row in rows if users[user[row]] >= 4 and items[item[row]] >= 4}
        if stay == rows:
            break
        rows = stay
    assert rows
    assert len(rows) < 150
    assert np.flatnonzero(k_core(user, item, 4)).tolist() == sorted(rows)


def test_the_k_core_of_nothing_is_nothing():
    assert k_core(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 3).tolist() == []
    assert not k_core(np.array([0, 1]), np.array([0, 0]), 3).any()


def test_duplicates_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (200, 3))
    seen, expected = set(), []
    for row in map(tuple, rows):
        expected.append(row not in seen)
        seen.add(row)
    assert first_of_duplicates(*rows.T).tolist() == expected


def test_tie_figures_equal_a_plain_loop():
    rng = np.random.default_rng(1)
    length = rng.integers(1, 8, 40)
    offset = np.concatenate([[0], np.cumsum(length)])
    item = rng.integers(1, 50, offset[-1])
    timestamp = np.concatenate([np.sort(rng.integers(0, 5, size)) for size in length])
    pairs = tied = ascending = last = users = 0
    for begin, end in itertools.pairwise(offset):
        for row in range(begin + 1, end):
            pairs += 1
            tied += timestamp[row] == timestamp[row - 1]
            ascending += timestamp[row] == timestamp[row - 1] and item[row] > item[row - 1]
        if end - begin > 1:
            users += 1
            last += timestamp[end - 1] == timestamp[end - 2]
    assert ties.measure(offset, timestamp, item) == {
        "tied_pair_rate": tied / pairs,
        "ascending_rate": ascending / tied,
        "tied_last_pair_user_rate": last / users,
    }


@pytest.mark.parametrize(
    ("rate", "ascending", "warns"),
    [(0.005, 1.0, False), (0.2, 0.5, False), (0.2, 0.61, True), (0.2, 0.39, True), (0.0, 0.0, False)],
)
def test_only_frequent_and_ordered_ties_are_worth_a_warning(rate, ascending, warns):
    figures = {"tied_pair_rate": rate, "ascending_rate": ascending, "tied_last_pair_user_rate": 0.1}
    assert (ties.warning(figures | {"order": "file"}) is not None) == warns


@pytest.mark.parametrize("seed", range(5))
def test_the_global_time_split_equals_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 8, 60)
    offset = np.concatenate([[0], np.cumsum(length)])
    timestamp = np.concatenate([np.sort(rng.integers(0, 100, size)) for size in length])
    first, second = splits.time_points(timestamp, 0.2, 0.3)
    expected = []
    for begin, end in itertools.pairwise(offset):
        codes = []
        for row in range(begin, end):
            if timestamp[row] < first:
                codes.append(splits.TRAIN)
            elif timestamp[row] < second:
                new = codes and not {splits.VALID, splits.CONTEXT} & set(codes)
                codes.append(splits.VALID if new else splits.CONTEXT)
            elif not codes or codes[0] == splits.NO_HISTORY:
                codes.append(splits.NO_HISTORY)
            else:
                codes.append(splits.AFTER_TEST if splits.TEST in codes else splits.TEST)
        if set(codes) == {splits.CONTEXT}:
            codes = [splits.CONTEXT_ONLY] * len(codes)
        expected += codes
    assert splits.global_time(offset, timestamp, (first, second)).tolist() == expected
    assert set(expected) >= {splits.TRAIN, splits.VALID, splits.TEST, splits.CONTEXT, splits.AFTER_TEST}


def test_nothing_at_or_after_the_first_point_is_trained_on():
    timestamp = np.array([0, 10, 20, 30, 40, 50, 60, 70, 80, 90])
    points = splits.time_points(timestamp, 0.2, 0.2)
    split = splits.global_time(np.array([0, 10]), timestamp, points)
    assert timestamp[split == splits.TRAIN].max() < points[0] <= timestamp[split == splits.VALID].min()
