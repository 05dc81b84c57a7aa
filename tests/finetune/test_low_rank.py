"""LoRA layers in few operations against PEFT's own, which goes step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from packing_reference import EXACT
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny_mme_sid import tiny_base
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmrec.finetune import low_rank
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.lora import add_lora


def pair(*, bias: bool = False, dtype: torch.dtype = torch.float64, **settings):
    """A model of two LoRA layers as PEFT makes it, and the same one fused."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 10, bias=bias), nn.SiLU(), nn.Linear(10, 4, bias=bias)).to(dtype)
    config = LoraConfig(r=3, lora_alpha=5.0, target_modules=["0", "2"], init_lora_weights=False, **settings)
    model = get_peft_model(plain, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float64 if dtype == torch.float64 else torch.float32)
    fused = copy.deepcopy(model)
    low_rank.fuse(fused)
    return model, fused


def layers(model) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def is_fused(model) -> bool:
    return all("forward" in vars(layer) for layer in layers(model))


def results(model, x, run=lambda model, x: model(x)):
    x = x.clone().requires_grad_()
    found = run(model, x)
    trained = [value for value in model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad((found.double() ** 2).sum(), [x, *trained])
    return [found, *gradients]


@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 3, 4)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_every_gradient_are_pefts(bias, dropout, shape):
    model, fused = pair(bias=bias, lora_dropout=dropout)
    assert is_fused(fused) and not is_fused(model)
    x = torch.randn(*shape, 6, dtype=torch.float64)
    found = []
    for one in (fused, model):
        torch.manual_seed(1)  # of dropout
        found.append(results(one, x))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for ours, theirs in zip(results(fused.eval(), x), results(model.eval(), x)):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_second_pass_with_recomputed_activations_gives_the_same():
    _, fused = pair()
    x = torch.randn(5, 6, dtype=torch.float64)
    again = results(fused, x, lambda model, x: checkpoint(model, x, use_reentrant=False))
    for ours, theirs in zip(again, results(fused, x)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_compiled_layers_have_all_gradients():
    """torch 2.11 loses those of functions with a backward pass of their own."""
    model, fused = pair()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    compiled = torch.compile(fused, backend="aot_eager")
    found = results(fused, x, lambda _, x: compiled(x))
    for ours, theirs in zip(found, results(model, x)):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_bfloat16_comes_no_further_from_the_truth_than_pefts():
    exact, _ = pair()
    model, fused = pair(dtype=torch.bfloat16)
    x = torch.randn(64, 6, dtype=torch.float64)
    truth = results(exact, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (results(one, x.bfloat16()) for one in (fused, model))
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    for right, mine, other in zip(truth, ours, theirs):
        error, limit = ((value.double() - right).norm() / right.norm() for value in (mine, other))
        assert error < max(1.25 * limit, 0.01)


def test_what_is_not_plain_is_left_to_peft():
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        _, fused = pair(bias=True, **settings)
        assert not is_fused(fused), settings


def test_merged_and_disabled_adapters_are_seen():
    model, fused = pair()
    x = torch.randn(5, 6, dtype=torch.float64)
    with model.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), model(x), **EXACT)
    before = fused(x)
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), before, **EXACT)


def test_a_copy_has_weights_of_its_own():
    _, fused = pair()
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for layer in layers(fused):
            layer.lora_B["default"].weight.zero_()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert (other(x) - fused(x)).abs().max() > 1e-3


def test_rank_scale_dropout_and_targets_are_those_of_the_settings():
    settings = {"lora_rank": 3, "lora_alpha": 5.0, "lora_dropout_rate": 0.25}
    targets = ("q_proj", "down_proj")
    base = tiny_base()
    plain = {name: layer for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    wanted = {name for name in plain if name.endswith(targets)}
    config = FinetuneConfig(base_model="tiny", lora_targets=targets, **settings)
    model = add_lora(base, config).double()
    found = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLinear)}
    assert found.keys() == wanted and len(found) == 2 * base.config.num_hidden_layers
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * len(found) and all("lora_" in name for name in trained)
    for name, layer in found.items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert down.shape == (3, plain[name].in_features) and up.shape == (plain[name].out_features, 3)
        nn.init.normal_(up)
        x = torch.randn(400, plain[name].in_features, dtype=torch.float64)
        without = x @ layer.base_layer.weight.T
        torch.testing.assert_close(layer.eval()(x), without + 5 / 3 * x @ down.T @ up.T, **EXACT)
        assert isinstance(layer.lora_dropout["default"], nn.Dropout)
        kept = layer.train().lora_dropout["default"](x) != 0
        assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
        assert not torch.equal(layer(x), layer(x))
