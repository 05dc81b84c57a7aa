"""BERT4Rec: what is masked, what scoring sees, and the loss against a loop."""

from __future__ import annotations

import torch
from cases import batch

from llmrec.collab.bert4rec import BERT4Rec
from llmrec.collab.config import TrainCollabConfig

SIZES = vars(TrainCollabConfig().bert4rec) | {
    "num_items": 30,
    "embed_dim": 8,
    "inner_dim": 16,
    "max_history": 10,
}


def model(**settings) -> BERT4Rec:
    torch.manual_seed(0)
    return BERT4Rec(**SIZES | settings).eval()


def test_a_share_of_the_items_is_masked_and_at_least_one_of_every_row():
    sequence = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 0, 0, 0, 0, 0, 0]]).repeat(4000, 1)
    masked = model(mask_rate=0.3, last_rate=0.0).choose(sequence)
    assert not masked[sequence == 0].any() and masked.any(1).all()
    assert abs(float(masked[::2].float().mean()) - (0.3 + 0.7**8 / 8)) < 0.01
    lone = model(mask_rate=0.3, last_rate=1.0).choose(sequence)
    assert lone[::2].sum(0).tolist() == [0] * 7 + [4000]
    assert lone[1::2].sum(0).tolist() == [0, 4000] + [0] * 6


def test_the_loss_equals_a_loop_over_masked_items(monkeypatch):
    bert = model(num_masks=2)
    rows = batch([3, 9, 4, 1], [8, 2, 0, 0], [5, 0, 0, 0])
    chosen = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    monkeypatch.setattr(bert, "choose", lambda sequence: chosen)
    found = bert.loss(rows)
    expected = 0.0
    for row, sequence in enumerate([[3, 9, 4, 1], [8, 2], [3, 9, 4, 1], [8, 2]]):
        kept = [bert.mask_id if chosen[row, place] else item for place, item in enumerate(sequence)]
        hidden = bert.encode(torch.tensor([kept]))[0]
        for place, item in enumerate(sequence):
            if chosen[row, place]:
                logits = bert.item.weight[1:-1] @ hidden[place] + bert.bias[1:]
                expected = expected - logits.log_softmax(0)[item - 1]
    assert found.num_targets == 5
    torch.testing.assert_close(found.total, expected)


def test_scoring_reads_a_mask_after_the_history_even_a_full_one():
    bert = model()
    for length in (1, 4, 10):
        history = torch.arange(1, length + 1)[None]
        hidden = bert.encode(torch.cat([history, torch.tensor([[bert.mask_id]])], 1))[0, -1]
        expected = bert.item.weight[:-1] @ hidden + bert.bias
        torch.testing.assert_close(bert.score(history)[0], expected)


def test_the_masks_vector_is_nobodys_item():
    bert = model()
    assert bert.item_embeddings().shape == (31, 8)
    assert bert.score(torch.tensor([[1, 2]])).shape == (1, 31)
