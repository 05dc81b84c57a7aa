"""Padding and grouping of sequences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llmrec.data.batches import length_groups, pad_histories


def test_padding_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    item = torch.from_numpy(rng.integers(1, 100, 50))
    start = torch.from_numpy(rng.integers(0, 40, 20))
    stop = start + torch.from_numpy(rng.integers(0, 10, 20))
    padded = pad_histories(item, start, stop)
    assert padded.dtype == torch.int64
    assert padded.shape == (20, int((stop - start).max()))
    for row, first, last in zip(padded, start, stop):
        length = int(last - first)
        assert row[:length].tolist() == item[first:last].tolist()
        assert not row[length:].any()


def test_empty_histories_become_one_column_of_padding():
    item, nothing = torch.tensor([7, 8]), torch.tensor([0, 2])
    assert pad_histories(item, nothing, nothing).tolist() == [[0], [0]]
    assert pad_histories(item[:0], nothing[:1], nothing[:1]).tolist() == [[0]]
    assert pad_histories(item, nothing[:0], nothing[:0]).shape == (0, 1)


def test_a_range_at_the_end_reads_nothing_beyond_it():
    item = torch.tensor([5, 6, 7])
    padded = pad_histories(item, torch.tensor([0, 2]), torch.tensor([3, 3]))
    assert padded.tolist() == [[5, 6, 7], [7, 0, 0]]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_groups_hold_every_sequence_once_and_keep_to_the_cell_limit(kind):
    length = np.random.default_rng(1).geometric(0.2, 300)
    groups = length_groups(kind(length), 200)
    assert sorted(np.concatenate(groups).tolist()) == list(range(300))
    for group in groups:
        assert len(group) * length[group].max() <= 200 or len(group) == 1


def test_the_cut_is_the_cheapest_one():
    length = np.array([1, 1, 2, 2, 2, 5, 9, 9, 30])
    overhead = 6

    def cost(groups):
        return sum(len(group) * length[group].max() + overhead for group in groups)

    found = length_groups(length, 10**6, overhead_cells=overhead)
    every = [
        np.split(np.arange(9), list(cuts))
        for size in range(9)
        for cuts in itertools.combinations(range(1, 9), size)
    ]
    assert cost(found) == min(cost(groups) for groups in every)


def test_short_histories_never_pay_for_a_long_one():
    length = np.full(256, 5)
    length[17] = 50
    cells = sum(len(group) * length[group].max() for group in length_groups(length, 10**6))
    assert cells == length.sum()


def test_no_sequences_give_no_groups_and_empty_ones_are_grouped():
    assert length_groups(np.array([], dtype=np.int64), 10) == []
    assert sorted(np.concatenate(length_groups(np.array([0, 0, 3]), 10)).tolist()) == [0, 1, 2]
