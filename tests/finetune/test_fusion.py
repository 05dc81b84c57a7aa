"""One folded item matrix must be the explicit sum of heads and projected tables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packing_reference import full_scores, gradients, random_users
from tiny_mme_sid import WIDTH, model

from llmrec.finetune.fusion import EqualWeights, FrequencyGate
from llmrec.finetune.packing import group_rows, pack

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("fusion", ["frequency", "equal", "target"])
@pytest.mark.parametrize("num_targets", [3, WIDTH + 5], ids=["factored", "folded"])
def test_scores_and_gradients_equal_the_explicit_sum_of_heads(fusion, num_targets):
    options = {"fusion_temperature": 1e-3} if fusion != "frequency" else {}
    net = model(25, fusion=fusion, **options)
    hidden = torch.randn(num_targets, WIDTH, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 25, (num_targets,))

    def explicit():
        if fusion == "target":
            return (hidden @ net.item_scores.target_table.T)[:, 1:]
        return full_scores(net, hidden)

    queries, keys = net.item_scores.factors(hidden)
    folded = fusion == "target" or num_targets > WIDTH
    assert (queries.shape[1] == WIDTH) == folded
    scores = (queries @ keys.T)[:, 1:]
    torch.testing.assert_close(scores, explicit(), **EXACT)
    torch.testing.assert_close((hidden @ net.item_scores.folded().T)[:, 1:], explicit(), **EXACT)

    expected = gradients(net, F.cross_entropy(explicit(), target))
    expected_hidden, hidden.grad = hidden.grad, None
    queries, keys = net.item_scores.factors(hidden)
    got = gradients(net, F.cross_entropy((queries @ keys.T)[:, 1:], target))
    assert got.keys() == expected.keys()
    torch.testing.assert_close(hidden.grad, expected_hidden, **EXACT)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], **EXACT)


def test_the_gate_depends_on_frequency_alone_and_sums_to_one():
    count = torch.tensor([0, 5, 1, 5, 100, 1])
    weights = FrequencyGate(count, 4, temperature=1.0)()
    assert weights.shape == (6, 4)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    assert torch.equal(weights[1], weights[3]) and torch.equal(weights[2], weights[5])
    assert not torch.equal(weights[1], weights[4])


def test_the_gate_follows_the_formula():
    count = torch.tensor([0, 3, 8, 20])
    gate = FrequencyGate(count, 2, temperature=0.5)
    log = torch.log(count + 1.0)
    scaled = (log - log.min()) / (log.max() - log.min())
    for item in range(4):
        expected = torch.softmax(gate.mlp(scaled[item].reshape(1, 1)) / 0.5, dim=-1)[0]
        torch.testing.assert_close(gate()[item], expected)


def test_a_small_temperature_picks_one_source():
    weights = FrequencyGate(torch.arange(50), 4, temperature=1e-3)()
    assert (weights.max(dim=1).values > 0.99).double().mean() > 0.8


def test_constant_frequency_and_bad_temperature_are_refused():
    with pytest.raises(ValueError, match="all items have 3 interactions"):
        FrequencyGate(torch.full((4,), 3), 2, 1.0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        FrequencyGate(torch.arange(4), 2, 0.0)


def test_equal_weights_are_the_mean_of_the_sources():
    assert EqualWeights(3, 4)().tolist() == [[0.25] * 4] * 4


def test_padding_gets_no_gradient_and_is_never_predicted():
    net = model(12)
    item, targets = random_users([3, 1])
    targets.item[:] = targets.item % 12 + 1
    item[:] = item % 12 + 1
    net.loss([pack(item, targets, group_rows(targets, "packed"))]).backward()
    assert not net.item_scores.target_table.grad[0].any()


def test_the_gate_has_the_published_layers():
    """Two bottlenecked layers, the second without bias, GELU after the first and the third."""
    count = torch.tensor([0, 2, 7, 40])
    gate = FrequencyGate(count, 3, temperature=0.7).double()
    weights = dict(gate.mlp.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes == {
        "0.weight": (64, 1), "0.bias": (64,), "2.weight": (10, 64), "2.bias": (10,), "3.weight": (64, 10),
        "5.weight": (3, 64), "5.bias": (3,),
    }  # fmt: skip
    log = torch.log1p(count.double())
    value = ((log - log.min()) / (log.max() - log.min())).float().double()[:, None]
    value = F.gelu(value @ weights["0.weight"].T + weights["0.bias"])
    value = (value @ weights["2.weight"].T + weights["2.bias"]) @ weights["3.weight"].T
    value = F.gelu(value) @ weights["5.weight"].T + weights["5.bias"]
    torch.testing.assert_close(gate(), torch.softmax(value / 0.7, dim=1), **EXACT)


def test_the_first_source_may_count_in_full_beside_mixed_others():
    gate = FrequencyGate(torch.tensor([0, 2, 7, 40]), 4, temperature=0.7, add_first=True)
    weights = gate()
    assert weights.shape == (4, 4) and weights[:, 0].tolist() == [1.0] * 4
    torch.testing.assert_close(weights[:, 1:].sum(dim=1), torch.ones(4))
    assert EqualWeights(3, 2, weight=1.0)().tolist() == [[1.0, 1.0]] * 4


@pytest.mark.parametrize("fusion", ["frequency", "equal", "sum", "target"])
def test_rows_of_chosen_items_are_those_of_the_whole_matrix(fusion):
    options = {"fusion_temperature": 1e-3} if fusion != "frequency" else {}
    net = model(25, fusion=fusion, **options)
    item = torch.tensor([4, 25, 0, 7])
    torch.testing.assert_close(net.item_scores.folded(item), net.item_scores.folded()[item], **EXACT)
    if net.item_scores.modalities:
        assert torch.equal(net.item_scores.gate(item), net.item_scores.gate()[item])


def test_only_what_is_trained_is_saved():
    """Item vectors, counts and equal weights come from other artefacts."""
    names = set(model(25, fusion="frequency").item_scores.state_dict())
    trained = {name for name, _ in model(25, fusion="frequency").item_scores.named_parameters()}
    assert names == trained and not EqualWeights(3, 4).state_dict()


@pytest.mark.parametrize("fusion", ["frequency", "target"])
@pytest.mark.parametrize(("std", "expected"), [(None, WIDTH**-0.5), (0.02, 0.02), (0.0, 0.0)])
def test_the_target_table_starts_with_the_spread_asked_for(std, expected, fusion):
    temperature = {"fusion_temperature": 1e-3} if fusion == "target" else {}
    table = model(2000, fusion=fusion, target_std=std, **temperature).item_scores.target_table
    assert float(table.std()) == pytest.approx(expected, rel=0.05)


def test_a_target_table_from_zero_is_learned_all_the_same():
    net = model(12, fusion="target", fusion_temperature=1e-3, target_std=0.0)
    item, targets = random_users([3, 1])
    targets.item[:] = targets.item % 12 + 1
    item[:] = item % 12 + 1
    net.loss([pack(item, targets, group_rows(targets, "packed"))]).backward()
    assert net.item_scores.target_table.grad[1:].abs().max() > 0
