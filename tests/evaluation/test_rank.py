"""Ranks and metrics against plain loops and a third-party package."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import interactions

from llmrec.errors import TrainingError
from llmrec.evaluation import rank as module
from llmrec.evaluation.evaluate import repeated_targets
from llmrec.evaluation.metrics import mrr_at_k, ndcg_at_k, recall_at_k, summarise
from llmrec.evaluation.rank import Scorer, blocks_of, rank_targets, rank_users, top_items


def test_metrics_by_hand():
    rank = np.array([0.0, 1, 2, 9, 10])
    assert recall_at_k(rank, 10).tolist() == [1, 1, 1, 1, 0]
    np.testing.assert_allclose(ndcg_at_k(rank, 10), [1, 0.63092975, 0.5, 0.28906483, 0], atol=1e-8)
    np.testing.assert_allclose(mrr_at_k(rank, 10), [1, 1 / 2, 1 / 3, 1 / 10, 0])
    # Tied with one other for ranks 10 and 11: the mean rank 10.5 is beyond 10.
    assert recall_at_k(np.array([9.5]), 10) == 0


def test_metrics_equal_an_independent_package():
    import ir_measures
    from ir_measures import RR, R, nDCG

    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 40))
    target = rng.integers(0, 40, 30)
    truth = [ir_measures.Qrel(str(u), str(t), 1) for u, t in enumerate(target)]
    run = [ir_measures.ScoredDoc(str(u), str(i), float(scores[u, i])) for u in range(30) for i in range(40)]
    expected = ir_measures.calc_aggregate([R @ 10, nDCG @ 10, RR @ 10, nDCG @ 5], truth, run)
    rank = (scores > scores[np.arange(30), target][:, None]).sum(axis=1).astype(np.float64)
    got = summarise(rank)
    assert got["recall@10"] == pytest.approx(expected[R @ 10])
    assert got["ndcg@10"] == pytest.approx(expected[nDCG @ 10])
    assert got["ndcg@5"] == pytest.approx(expected[nDCG @ 5])
    assert got["mrr@10"] == pytest.approx(expected[RR @ 10])


def loop_rank(scores: list[float], target: int, seen: set[int]) -> float:
    """Items ahead of the target plus half of the tied ones, by plain loops."""
    ahead = 0.0
    for item in range(1, len(scores)):
        if item == target or item in seen - {target}:
            continue
        if scores[item] > scores[target]:
            ahead += 1
        elif scores[item] == scores[target]:
            ahead += 0.5
    return ahead


@pytest.mark.parametrize("masked", [True, False])
def test_ranks_equal_plain_loops_with_ties_masks_and_padding(masked):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (200, 12)).astype(np.float32)  # few values: many ties, column 0 too
    scores[rng.random(scores.shape) < 0.05] = -math.inf
    target = rng.integers(1, 12, 200)
    scores[np.arange(200), target] = np.abs(scores[np.arange(200), target]).clip(max=4)
    seen = rng.integers(0, 12, (200, 6))  # padding, repeats, and sometimes the target itself
    got = rank_targets(
        torch.from_numpy(scores), torch.from_numpy(target), torch.from_numpy(seen) if masked else None
    )
    for row in range(200):
        hidden = set(seen[row].tolist()) - {0} if masked else set()
        assert got[row] == loop_rank(scores[row].tolist(), int(target[row]), hidden)


def test_top_items_leave_out_seen_ones_and_padding():
    scores = torch.tensor([[9.0, 1, 5, 3, 4], [9.0, 1, 1, 0, 2]])
    top = top_items(scores, 3, torch.tensor([[2, 0], [1, 4]]))
    assert top.tolist() == [[4, 3, 1], [2, 3, 0]]
    assert top_items(scores, 6).shape == (2, 6)


def test_nan_scores_are_an_error():
    with pytest.raises(TrainingError, match="NaN scores"):
        rank_targets(torch.tensor([[0.0, 1.0, float("nan")]]), torch.tensor([1]))


def by_last_item(num_items: int) -> Scorer:
    """A deterministic scorer that depends on the items it is shown."""
    table = torch.randn(num_items + 1, num_items + 1, generator=torch.Generator().manual_seed(0))

    def score(history: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(history, table).mul((history > 0)[..., None]).sum(dim=1)

    return Scorer(name="sum", score=score)


def test_the_whole_history_is_masked_and_the_context_is_limited():
    data = interactions([[1, 2, 3, 4, 5], [3, 1, 2, 5, 4]], 6)
    targets = data.targets("test")
    shown = []

    def score(history: torch.Tensor) -> torch.Tensor:
        shown.append(history)
        scores = torch.zeros(len(history), 7)
        scores[:, 1:4] = 1  # all of them seen by both users
        return scores

    ranking = rank_users(Scorer(name="x", score=score, max_history=2), data, targets, top_k=2)
    assert shown[0].tolist() == [[3, 4], [2, 5]]
    assert ranking.rank.tolist() == [0.5, 0.5] and ranking.rank_seen_kept.tolist() == [4.0, 4.0]
    assert np.sort(ranking.top).tolist() == [[5, 6], [4, 6]]
    kept = rank_users(Scorer(name="x", score=score), data, targets, mask_seen=False)
    assert kept.rank.tolist() == [4.0, 4.0]


def test_a_method_is_shown_the_times_it_asks_for():
    data = interactions([[1, 2, 3, 4, 5], [6, 1]], 6)
    data = replace(data, timestamp=np.array([10, 20, 30, 40, 50, 70, 90]))
    given = []

    def score(*shown: torch.Tensor) -> torch.Tensor:
        given.append([part.tolist() for part in shown])
        return torch.zeros(len(shown[0]), 7)

    for scorer in (
        Scorer(name="x", score=score, max_history=2),
        Scorer(name="x", score=score, max_history=2, uses_time=True),
        Scorer(name="x", score=score, max_history=2, uses_time=True, uses_request_time=True),
    ):
        rank_users(scorer, data, data.targets("test"))
    item, time, later = [[6, 0], [3, 4]], [[70, 0], [30, 40]], [[90, 0], [40, 50]]
    assert given == [[item], [item, time], [item, time, later]]


def test_blocks_hold_so_many_items_as_a_method_takes_at_once():
    length = np.array([5, 1, 9, 2, 2, 30, 4])
    scorer = by_last_item(20)
    assert [block.tolist() for block in blocks_of(length, 3, scorer)] == [[1, 3, 4], [6, 0, 2], [5]]
    limited = replace(scorer, max_items=10)
    assert [block.tolist() for block in blocks_of(length, 9, limited)] == [[1, 3, 4], [6, 0], [2], [5]]
    short = replace(limited, max_history=2)  # what is not shown takes no room
    assert [block.tolist() for block in blocks_of(length, 9, short)] == [[1, 3, 4, 6, 0], [2, 5]]
    assert [block.tolist() for block in blocks_of(length, 1, limited)] == [[1], [3], [4], [6], [0], [2], [5]]


def test_a_repeated_target_stays_a_candidate_in_ranks_and_lists():
    data = interactions([[1, 2, 3, 2], [4, 5, 1, 6]], 6)
    scorer = Scorer(name="x", score=lambda history: torch.arange(7.0, 0, -1).expand(len(history), -1))
    found = rank_users(scorer, data, data.targets("test"), top_k=3)
    assert found.rank.tolist() == [0.0, 2.0]
    assert found.top.tolist() == [[2, 4, 5], [2, 3, 6]]
    assert repeated_targets(data, data.targets("test")) == 0.5


def test_a_large_catalogue_is_scored_for_fewer_users_at_once(monkeypatch):
    monkeypatch.setattr(module, "MOST_SCORES", 50)
    data, sizes = interactions([[1, 2, 3, number] for number in range(4, 11)], 20), []

    def score(history: torch.Tensor) -> torch.Tensor:
        sizes.append(len(history))
        return torch.zeros(len(history), 21)

    rank_users(Scorer(name="x", score=score), data, data.targets("test"))
    assert sizes == [2, 2, 2, 1]


def test_block_size_changes_nothing():
    rng = np.random.default_rng(1)
    data = interactions([rng.integers(1, 21, n).tolist() for n in rng.integers(3, 15, 50)], 20)
    targets = data.targets("test")
    one = rank_users(by_last_item(20), data, targets, block_size=50, top_k=3)
    many = rank_users(by_last_item(20), data, targets, block_size=7, top_k=3)
    assert np.array_equal(one.rank, many.rank) and np.array_equal(one.top, many.top)
    popular = rank_users(
        Scorer(name="pop", score=lambda h: torch.arange(21.0).expand(len(h), -1)), data, targets
    )
    for place in range(50):
        seen = set(data.item[targets.start[place] : targets.stop[place]].tolist())
        assert popular.rank[place] == loop_rank(list(range(21)), int(targets.item[place]), seen)
