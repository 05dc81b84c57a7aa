"""Packed prompts must be the prompts themselves: same values, same gradients, fewer tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packing_reference import (
    EXACT,
    NUM_ITEMS,
    full_scores,
    gradients,
    plain_prompts,
    random_users,
    read_out,
    targets_of,
)
from tiny_mme_sid import PROMPT, model
from worlds import interactions

from llmrec.finetune.packing import count_tokens, group_rows, pack, several_slots, stream_bucket


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("layout", ["packed", "per_prefix"])
def test_values_loss_and_every_gradient_equal_plain_prompts(layout, share, lora):
    net = model(NUM_ITEMS, lora=lora, share_instruction=share, layout=layout)
    item, targets = random_users([1, 2, 3, 5])
    rows = pack(item, targets, group_rows(targets, layout))
    expected_hidden = plain_prompts(net, item, targets)
    torch.testing.assert_close(read_out(net, rows), expected_hidden, **EXACT)

    scores = full_scores(net, expected_hidden)
    expected_loss = F.cross_entropy(scores, torch.from_numpy(targets.item) - 1, reduction="sum")
    expected = gradients(net, expected_loss)
    loss = net.loss([rows])
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    got = gradients(net, loss)
    assert got.keys() == expected.keys() and len(got) > 20
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, n=name: f"{n}: {text}", **EXACT)


def test_histories_of_0_1_2_50_and_more_items_equal_plain_prompts():
    net = model(NUM_ITEMS)
    items = np.random.default_rng(1).integers(1, NUM_ITEMS + 1, 64).tolist()
    item, targets = targets_of([(items, [0, 1, 2, 50, 51, 63]), (items[:3], [2])])
    rows = pack(item, targets, group_rows(targets, "packed"))
    assert rows.items.shape[0] == 2
    expected = plain_prompts(net, item, targets)
    torch.testing.assert_close(read_out(net, rows), expected, **EXACT)
    net.loss([rows]).backward()
    packed = {name: p.grad.clone() for name, p in net.named_parameters()}
    loss = F.cross_entropy(full_scores(net, expected), torch.from_numpy(targets.item) - 1, reduction="sum")
    for name, gradient in gradients(net, loss).items():
        torch.testing.assert_close(packed[name], gradient, **EXACT)


def test_a_copy_sees_neither_later_items_nor_other_copies():
    net = model(NUM_ITEMS)
    item, targets = targets_of([([4, 8, 15, 16, 23], [1, 3])])
    before = read_out(net, pack(item, targets, group_rows(targets, "packed")))
    changed = item.clone()
    changed[1] = 9  # position 1 is in the history of the second target only
    after = read_out(net, pack(changed, targets, group_rows(targets, "packed")))
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])
    alone = read_out(net, pack(item, targets.take(np.array([1])), np.array([0])))
    torch.testing.assert_close(before[1:], alone, **EXACT)


def test_a_user_cut_into_two_steps_gives_the_same_read_outs():
    net = model(NUM_ITEMS)
    item, targets = random_users([6])
    whole = read_out(net, pack(item, targets, group_rows(targets, "packed")))
    for part in (np.arange(4), np.arange(4, 6)):
        some = targets.take(part)
        torch.testing.assert_close(
            read_out(net, pack(item, some, group_rows(some, "packed"))), whole[part], **EXACT
        )


def test_a_limited_context_is_one_window_per_user():
    data = interactions([[1, 2, 3, 4, 5, 6, 7, 8]], 8)
    targets = data.targets("train", max_history=3, max_targets=3)
    assert targets.item.tolist() == [4, 5, 6]
    assert targets.start.tolist() == [2, 2, 2] and targets.stop.tolist() == [3, 4, 5]


def test_targets_before_the_last_window_have_windows_of_their_own():
    """All of them see something, at most as many items, and the last of each window as many as there are."""
    data = interactions([list(range(1, 13)), [3, 1, 2, 9]], 12)
    targets = data.targets("train", max_history=3)
    first = targets.user == 0
    assert targets.item[first].tolist() == list(range(1, 11))
    seen = (targets.stop - targets.start)[first].tolist()
    assert seen == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert targets.stop.tolist() == [*range(10), 12, 13]
    assert (targets.stop - targets.start)[~first].tolist() == [0, 1]
    assert group_rows(targets, "packed").tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_token_counts_of_a_hand_made_example():
    # Histories of 0, 1, 2 (user 0) and 0, 1 (user 1); I = 5, R = 3.
    _, targets = random_users([3, 2])
    count = {"instruction": len(PROMPT.instruction), "response": len(PROMPT.response)}
    assert (
        count_tokens(targets, layout="per_prefix", shared=False, **count) == 5 * (5 + 3) + 0 + 1 + 2 + 0 + 1
    )
    assert count_tokens(targets, layout="packed", shared=False, **count) == 2 * 5 + (2 + 1) + 5 * 3
    assert count_tokens(targets, layout="packed", shared=True, **count) == 5 + (2 + 1) + 5 * 3
    assert count_tokens(targets, layout="per_prefix", shared=False, min_slots=2, **count) == 5 * (5 + 3 + 2)


@pytest.mark.real_data
def test_token_counts_of_the_published_sequences(real_data):
    """The counts of the official file, from its own text (150,041 targets, I = 17, R = 4)."""
    sequences = []
    for line in (real_data / "beauty" / "sequences_mme_sid.txt").read_text().splitlines():
        sequences.append([int(number) for number in line.split()[1:]])
    data = interactions(sequences, 12086)
    targets = data.targets("train", max_targets=50)
    assert len(targets) == 150_041
    count = {"instruction": 17, "response": 4}
    assert count_tokens(targets, layout="per_prefix", shared=False, min_slots=2, **count) == 4_315_886
    assert count_tokens(targets, layout="packed", shared=False, **count) == 1_111_027
    row = group_rows(targets, "packed")
    shared = sum(
        count_tokens(targets.take(np.flatnonzero(row // 64 == block)), layout="packed", shared=True, **count)
        for block in range(row[-1] // 64 + 1)
    )
    print(f"shared instruction, 64 users a micro-batch: {shared:,} tokens")
    assert shared < 750_000


def test_rows_of_a_hand_made_example():
    """The second user's history begins where the first one's ends; the last row is the shorter one."""
    item, targets = targets_of([([7, 8, 9, 10], [1, 3]), ([11, 12], [0, 1])])
    rows = pack(item, targets, group_rows(targets, "packed"), np.array([1, 2, 3, 4]))
    assert rows.items.tolist() == [[7, 8, 9], [11, 0, 0]]
    assert rows.history.tolist() == [[1, 3], [0, 1]]
    assert rows.target.tolist() == [8, 10, 11, 12] and rows.negative.tolist() == [1, 2, 3, 4]
    alone = pack(item, targets.take(np.array([1, 2])), np.array([0, 5]))
    assert alone.items.tolist() == [[7, 8, 9], [0, 0, 0]]
    assert alone.history.tolist() == [[3], [0]] and alone.negative is None
    ragged = pack(item, targets.take(np.array([0, 1, 2])), np.array([0, 0, 1]))
    assert ragged.history.tolist() == [[1, 3], [0, -1]], "-1: no such copy"
    wide = several_slots(ragged, 2)
    assert wide.items.tolist() == [[7, 7, 8, 8, 9, 9], [0] * 6]
    assert wide.history.tolist() == [[2, 6], [0, -1]] and wide.target.tolist() == [8, 10, 11]
    assert several_slots(rows, 2).negative.tolist() == [1, 2, 3, 4]
    assert several_slots(rows, 1) is rows


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000, 2048, 2049, 4095, 4097, 30_000, 65_537, 1_000_000])
def test_streams_are_padded_by_an_eighth_at_most(size):
    padded = stream_bucket(size)
    assert padded >= size and padded % 128 == 0
    assert padded == 256 or padded - size < max(128, size / 8 + 1)
    assert len({stream_bucket(other) for other in range(size, size + size // 2)}) <= 10, "few shapes"


def test_no_targets_are_no_tokens():
    _, targets = targets_of([([7, 8], [1])])
    options = {"instruction": 3, "response": 1, "layout": "packed", "shared": False}
    assert count_tokens(targets.take(np.array([], dtype=np.int64)), **options) == 0
    assert count_tokens(targets, **options) == 3 + 1 + 1
