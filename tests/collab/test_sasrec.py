"""SASRec: causality, size, and its two sampled losses against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import batch

from llmrec.collab.losses import draw_unseen
from llmrec.collab.sasrec import SASRec

SIZES = {
    "num_items": 30,
    "embed_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "inner_dim": 16,
    "dropout_rate": 0.0,
    "max_history": 10,
}


def model(**settings) -> SASRec:
    torch.manual_seed(0)
    return SASRec(**SIZES | settings).double()


@pytest.mark.parametrize("position", range(6))
def test_an_item_changes_nothing_before_it_and_everything_after(position):
    history = torch.randint(1, 31, (3, 6), generator=torch.Generator().manual_seed(1))
    changed = history.clone()
    changed[:, position] = changed[:, position] % 30 + 1
    before, after = model().encode(history), model().encode(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()


def test_blocks_are_given_items_times_the_root_of_their_width_and_places():
    made = model().eval()
    seen = []
    made.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made.encode(torch.tensor([[3, 1, 4]]))
    for place, item in enumerate((3, 1, 4)):
        expected = 8**0.5 * made.item.weight[item] + made.position.weight[place]
        torch.testing.assert_close(seen[0][0, place], expected)


def test_the_number_of_weights_is_that_of_the_published_size():
    """12,101 items, 64-d, 50 positions, 2 layers, inner 256, as RecBole's."""
    beauty = SASRec(
        num_items=12101,
        embed_dim=64,
        num_layers=2,
        num_heads=2,
        inner_dim=256,
        dropout_rate=0.5,
        max_history=50,
    )
    assert sum(weight.numel() for weight in beauty.parameters()) == 877_824


def test_the_padding_vector_stays_zero_through_training():
    sas = model()
    optimizer = torch.optim.Adam(sas.parameters(), lr=0.1)
    for _ in range(3):
        loss = sas.loss(batch([1, 2, 3, 0], [4, 0, 0, 0]))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert not sas.item_embeddings()[0].any()
    assert sas.item_embeddings()[1:].any()


@pytest.mark.parametrize("loss", ["ce", "bce", "sampled_ce"])
def test_losses_equal_a_loop_over_positions(loss):
    """Negatives are drawn outside of all that a row shows and predicts."""
    sas = model(loss=loss, num_negatives=4, num_items=12)
    rows = [[3, 9, 4, 1], [8, 2, 0, 0], [5, 0, 0, 0]]
    sequence = torch.tensor(rows)
    torch.manual_seed(1)
    found = sas.loss(batch(*rows))
    torch.manual_seed(1)
    drawn = draw_unseen(sequence, 4 if loss == "sampled_ce" else 3, 12)
    hidden, table, expected = sas.encode(sequence[:, :-1]), sas.item.weight, 0.0
    for row, position in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        query, target = hidden[row, position], int(sequence[row, position + 1])
        if loss == "ce":
            expected = expected - F.log_softmax(table[1:] @ query, 0)[target - 1]
        elif loss == "bce":
            other = drawn[row, position]
            expected = expected - F.logsigmoid(query @ table[target]) - F.logsigmoid(-query @ table[other])
        else:
            candidates = table[[target, *drawn[row].tolist()]]
            expected = expected - F.log_softmax(candidates @ query, 0)[0]
    assert found.num_targets == 4
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-10)


def test_negatives_are_uniform_over_the_unseen_items():
    torch.manual_seed(0)
    sequence = torch.tensor([[3, 1, 3, 7, 0], [0, 0, 0, 0, 0], [10, 9, 1, 1, 1]])
    drawn = draw_unseen(sequence, 70_000, 10)
    for row, items in zip(drawn, sequence.tolist()):
        unseen = [item for item in range(1, 11) if item not in items]
        counts = torch.bincount(row, minlength=11)
        assert counts.nonzero()[:, 0].tolist() == unseen
        assert (counts[unseen] / 70_000 - 1 / len(unseen)).abs().max() < 0.006


def test_a_user_of_everything_still_gets_a_negative():
    assert draw_unseen(torch.tensor([[1, 2, 3]]), 4, 3).tolist() == [[3, 3, 3, 3]]
