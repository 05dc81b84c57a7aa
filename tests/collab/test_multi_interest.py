"""ComiRec and MIND: attention and routing against loops over places, interests and iterations."""

from __future__ import annotations

import pytest
import torch
from cases import batch

from llmrec.collab.comirec import ComiRec, dynamic_routing, squash
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.layers import mean_cosine
from llmrec.collab.mind import MIND

SMALL = {"num_items": 30, "embed_dim": 6, "num_interests": 3, "max_history": 10}
COMIREC = vars(TrainCollabConfig().comirec) | SMALL
MINE = vars(TrainCollabConfig().mind) | SMALL


def make(cls: type, settings: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return cls(**settings).double().eval()


def test_attention_of_every_prefix_equals_a_loop_over_its_places():
    model = make(ComiRec, COMIREC)
    history = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]])
    found = model.interests(history)
    for row, length in ((0, 5), (1, 2)):
        items = model.item(history[row])
        for end in range(1, length + 1):
            weight = torch.stack(
                [
                    model.weigh(torch.tanh(model.inner(items[place] + model.position.weight[place])))
                    for place in range(end)
                ]
            ).softmax(0)
            for k in range(3):
                expected = sum(weight[place, k] * items[place] for place in range(end))
                torch.testing.assert_close(found[row, end - 1, k], expected)


def routing_by_loops(votes, start, num_routings):
    """One row: votes (T, K, D), start (T, K)."""
    logits = start.clone()
    for iteration in range(num_routings):
        interests = []
        for k in range(votes.shape[1]):
            total = sum(logits[t].softmax(0)[k] * votes[t, k] for t in range(len(votes)))
            square = total @ total
            interests.append(square / (1 + square) * total / square.sqrt())
        if iteration < num_routings - 1:
            for t in range(len(votes)):
                for k in range(votes.shape[1]):
                    logits[t, k] += interests[k] @ votes[t, k]
    return torch.stack(interests)


@pytest.mark.parametrize("num_routings", [1, 3])
def test_routing_equals_loops_over_places_interests_and_iterations(num_routings):
    torch.manual_seed(0)
    votes = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    start = torch.randn(2, 5, 3, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = dynamic_routing(votes, valid, start, num_routings)
    for row, length in ((0, 5), (1, 2)):
        expected = routing_by_loops(votes[row, :length], start[row, :length], num_routings)
        torch.testing.assert_close(found[row], expected, rtol=1e-7, atol=1e-7)


def test_gradients_flow_through_the_last_iteration_alone():
    torch.manual_seed(0)
    votes = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    valid, start = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, 2, dtype=torch.float64)
    dynamic_routing(votes, valid, start, 3).sum().backward()
    fixed = votes.detach()
    logits = start
    for _ in range(2):
        interests = squash(torch.einsum("btk,btkd->bkd", logits.softmax(-1), fixed))
        logits = logits + torch.einsum("bkd,btkd->btk", interests, fixed)
    again = fixed.clone().requires_grad_()
    squash(torch.einsum("btk,btkd->bkd", logits.softmax(-1), again)).sum().backward()
    torch.testing.assert_close(votes.grad, again.grad)


def test_votes_depend_on_the_place_in_comirec_and_not_in_mind():
    capsule = make(ComiRec, COMIREC | {"routing": "capsule"})
    history = torch.tensor([[3, 1, 4]])
    items = capsule.item(history)[0]
    votes = torch.stack([torch.stack([items[t] @ capsule.maps[t, k] for k in range(3)]) for t in range(3)])
    expected = routing_by_loops(votes, torch.zeros(3, 3, dtype=torch.float64), 3)
    torch.testing.assert_close(capsule.interests(history)[0, 0], expected, rtol=1e-6, atol=1e-6)
    mind = make(MIND, MINE)
    votes = mind.map(mind.item(history)[0])[:, None].expand(-1, 3, -1)
    expected = routing_by_loops(votes, mind.start[:3], 3)
    torch.testing.assert_close(mind.interests(history)[0, 0], expected, rtol=1e-6, atol=1e-6)
    dense = make(MIND, MINE | {"relu_layer": True})
    assert dense.after[0].bias.count_nonzero() == 0
    torch.nn.init.normal_(dense.after[0].bias)
    votes = dense.map(dense.item(history)[0])[:, None].expand(-1, 3, -1)
    routed = routing_by_loops(votes, dense.start[:3], 3)
    expected = torch.stack(
        [(dense.after[0].weight @ one + dense.after[0].bias).clamp(min=0) for one in routed]
    )
    torch.testing.assert_close(dense.interests(history)[0, 0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_interests_are_routed_as_often_as_they_are_set_to(number):
    history = torch.tensor([[3, 1, 4]])
    capsule = make(ComiRec, COMIREC | {"routing": "capsule", "num_routings": number})
    votes = torch.einsum("td,tkde->tke", capsule.item(history)[0], capsule.maps[:3])
    expected = routing_by_loops(votes, torch.zeros(3, 3, dtype=torch.float64), number)
    torch.testing.assert_close(capsule.interests(history)[0, 0], expected, rtol=1e-6, atol=1e-6)
    mind = make(MIND, MINE | {"num_routings": number})
    votes = mind.map(mind.item(history)[0])[:, None].expand(-1, 3, -1)
    expected = routing_by_loops(votes, mind.start[:3], number)
    torch.testing.assert_close(mind.interests(history)[0, 0], expected, rtol=1e-6, atol=1e-6)


def test_the_overlap_of_interests_is_logged_for_every_target():
    model = make(ComiRec, COMIREC)
    rows = batch([3, 1, 4, 7], [5, 2, 0, 0])
    at = rows.target != 0
    found = model.loss(rows)
    assert found.num_targets == found.parts["interest_use"].sum() == 4
    torch.testing.assert_close(
        found.parts["interest_overlap"], 4 * mean_cosine(model.interests(rows.item)[at])
    )


@pytest.mark.parametrize("cls", [ComiRec, MIND])
def test_a_target_is_asked_for_by_its_best_interest_and_an_item_scored_by_it(cls):
    model = make(cls, COMIREC if cls is ComiRec else MINE)
    history, target = torch.tensor([[3, 1, 4]]), 7
    interests = model.interests(history)[0, -1]
    scores = model.score(history)[0]
    torch.testing.assert_close(scores, (interests @ model.item.weight.T).max(0).values)
    rows = batch([3, 1, 4, 7])
    rows.target[:, :2] = 0
    best = interests[(interests @ model.item.weight[target]).argmax()]
    expected = -(model.item.weight[1:] @ best).log_softmax(0)[target - 1]
    found = model.loss(rows)
    torch.testing.assert_close(found.total, expected)
    assert found.parts["interest_use"].sum() == 1
    torch.testing.assert_close(found.parts["interest_overlap"], mean_cosine(interests[None]))
