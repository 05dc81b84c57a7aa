"""Any decoder that takes input embeddings: packed prompts are its own, and an adapter of it survives."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from backbones import KINDS, save_backbone
from packing_reference import plain_prompts, random_users
from safetensors.torch import load_file, save_file
from test_train import TINY, fit
from tiny_mme_sid import PROMPT, semantic_ids, tiny_base, vectors

from llmrec.errors import ConfigError
from llmrec.finetune import base_model, build
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.packing import group_rows, pack
from llmrec.finetune.scoring import load_scorer

NUM_ITEMS = 30
LORA = FinetuneConfig(
    base_model="set below", prompt="compact", epochs=2, batch_size=64, learning_rate=1e-2,
    fusion_temperature=1.0, warmup_steps=0,
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def backbone(request, tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("rows", ["padded", "stream"])
def test_packed_prompts_are_the_prompts_of_every_backbone(backbone, rows):
    """Values and the gradient of the item tokens; the norms of these models round to float32."""
    config = dataclasses.replace(LORA, base_model=str(backbone), rows=rows)
    base = base_model.load_base(config, PROMPT)
    for name, value in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    dims = {"collab": 5, "text": 7}
    net = build.build_model(
        config, base, PROMPT, vectors(NUM_ITEMS, dims), semantic_ids(NUM_ITEMS, tuple(dims)),
        torch.arange(NUM_ITEMS + 1), torch.device("cpu"),
    ).double()  # fmt: skip
    item, targets = random_users([1, 2, 3, 12])
    rows = pack(item, targets, group_rows(targets, "packed"))
    found = {}
    for name in ("packed", "plain"):
        tokens = net.item_tokens(torch.arange(NUM_ITEMS + 1))
        hidden = net.hidden(rows, tokens) if name == "packed" else plain_prompts(net, item, targets)
        weight = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
        loss = (hidden * weight).sum()
        trained = [value for value in net.parameters() if value.requires_grad]
        found[name] = hidden, torch.autograd.grad(loss, trained, allow_unused=True)
    torch.testing.assert_close(found["packed"][0], found["plain"][0], rtol=1e-5, atol=1e-5)
    compared = 0
    for one, two in zip(found["packed"][1], found["plain"][1]):
        assert (one is None) == (two is None)
        if one is not None:
            compared += 1
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert compared > 10


def test_adapters_of_every_backbone_are_trained_saved_and_loaded(backbone):
    adapter, made = fit(dataclasses.replace(LORA, base_model=str(backbone)))
    losses = [row["loss"] for row in adapter.log if "loss" in row]
    assert losses[-1] < losses[0]
    assert len(adapter.lora) == 12
    scores = load_scorer(adapter, *made).score(torch.tensor([[1, 2, 3]]))
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("targets", [("up_proj", "gate_prj"), ("upproj",)])
def test_names_of_layers_that_are_not_there_are_refused_also_beside_others(backbone, targets):
    wrong = targets[-1]
    config = dataclasses.replace(LORA, base_model=str(backbone), lora_targets=targets)
    with pytest.raises(
        ConfigError, match=rf"no linear layers called {wrong}, but q_proj, .*down_proj; give some"
    ):
        base_model.load_base(config, PROMPT)


def test_weights_that_a_base_lacks_are_reported_and_its_head_is_not(tmp_path, caplog, monkeypatch):
    """A decoder has no head, so that it is left over says nothing."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = dataclasses.replace(LORA, base_model=str(save_backbone(tmp_path)))

    def said() -> set[str]:
        caplog.clear()
        base_model.load_base(config, PROMPT)
        return {text for text in map(logging.LogRecord.getMessage, caplog.records) if "LOAD REPORT" in text}

    assert said() == set()
    weights = load_file(tmp_path / "model.safetensors")
    for changed in ({"layers.0.extra": torch.ones(1)}, {"model.norm.weight": None}):
        kept = {name: value for name, value in {**weights, **changed}.items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        (report,) = said()
        assert ("MISSING" in report) == ("model.norm.weight" in changed) and "lm_head" in report
    transformers.AutoModel.from_pretrained(tmp_path)
    assert "LOAD REPORT" in caplog.text, "elsewhere it is as it was"


def test_prompts_longer_than_the_window_are_refused(tmp_path_factory):
    from worlds import interactions

    folder = save_backbone(tmp_path_factory.mktemp("window"), "mistral")
    rng = np.random.default_rng(0)
    data = interactions([rng.integers(1, 9, 60).tolist(), rng.integers(1, 9, 5).tolist()], 8)
    config = dataclasses.replace(LORA, base_model=str(folder))
    with pytest.raises(
        ConfigError, match=r"prompt has 68 tokens and .* sees 40 at once; set finetune\.max_history"
    ):
        fit(config, data)
    fit(dataclasses.replace(config, max_history=30, epochs=1), data)


def test_four_bit_bases_train_and_keep_their_scores(tmp_path_factory):
    folder = save_backbone(
        tmp_path_factory.mktemp("nf4"), hidden_size=64, intermediate_size=64, num_attention_heads=2
    )
    config = dataclasses.replace(
        LORA, base_model=str(folder), quantize="nf4", precision="bf16", project_codes=True
    )
    adapter, made = fit(config)
    losses = [row["loss"] for row in adapter.log if "loss" in row]
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="quantize='nf4' computes in bfloat16"):
        dataclasses.replace(config, precision="fp32")
    with pytest.raises(ConfigError, match="nf4 has not been tried with FSDP"):
        base_model.load_base(config, PROMPT, spread=True)
    assert load_scorer(adapter, *made).score(torch.tensor([[1, 2]])).dtype == torch.float32


def test_four_bit_weights_pass_gradients_after_an_evaluation_too(tmp_path):
    folder = save_backbone(tmp_path, hidden_size=64, intermediate_size=64, num_attention_heads=2)
    config = dataclasses.replace(LORA, base_model=str(folder), quantize="nf4", precision="bf16")
    base = base_model.load_base(config, PROMPT)

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        inputs = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = base.train()(inputs_embeds=inputs).last_hidden_state
        hidden.float().square().mean().backward()
        return inputs.grad

    before = gradient()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base.eval()(inputs_embeds=torch.randn(2, 3, 64, dtype=torch.bfloat16))
    assert torch.equal(gradient(), before) and before.any()


def test_eight_bit_states_learn_as_well():
    settings = dataclasses.replace(TINY, epochs=4)
    losses = {
        name: [
            row["loss"] for row in fit(dataclasses.replace(settings, optimizer=name))[0].log if "loss" in row
        ]
        for name in ("adamw", "adamw_8bit")
    }
    assert losses["adamw_8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.02)
    assert losses["adamw_8bit"] != losses["adamw"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"checkpoint_activations": True}, id="recompute"),
        pytest.param({"compile": True}, id="compile", marks=pytest.mark.slow),
    ],
)
def test_recomputed_and_compiled_blocks_train_the_same(settings):
    plain = fit(TINY)[0]
    found = fit(dataclasses.replace(TINY, **settings))[0]
    for name, value in plain.heads.items():
        torch.testing.assert_close(found.heads[name], value, rtol=1e-3, atol=2e-4)


def test_fused_kernels_leave_the_decoders_own_forward_pass(monkeypatch):
    """Their fused loss would put that of a model with a head in its place; stands in for the library."""
    asked = []
    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = lambda **options: asked.append(options)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    base = tiny_base()
    base_model.set_up_base(dataclasses.replace(TINY, kernels="liger"), base, flex=False)
    assert asked == [{"model": base, "fused_linear_cross_entropy": False, "cross_entropy": False}]


@pytest.mark.parametrize("settings", [{"attention": "flex"}, {"kernels": "liger"}], ids=["flex", "liger"])
def test_what_only_a_gpu_does_is_refused_without_one(settings):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"trains on a GPU, and there is none"):
        fit(dataclasses.replace(TINY, **settings))
