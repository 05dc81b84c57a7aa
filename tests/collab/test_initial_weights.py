"""What weights of sequence models begin with, where their sources say so: the spread, and zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.provider import PROVIDERS


def glorot(weight: Tensor) -> float:
    """Standard deviation of Xavier's weights, normal or uniform."""
    return (2 / sum(weight.shape)) ** 0.5


def by_default(inputs: int) -> float:
    """Of torch's linear maps: uniform up to one over the root of the inputs."""
    return (3 * inputs) ** -0.5


CUT = 0.8796
"""Standard deviation of N(0, 1) cut at two."""

SPREAD = {
    "sasrec": {
        "item.weight": 0.02,
        "position.weight": 0.02,
        "blocks.1.query_key_value.weight": 0.02,
        "blocks.1.attention_out.weight": 0.02,
        "blocks.0.inner.weight": 0.02,
        "blocks.0.inner.bias": 0.0,
        "blocks.0.query_key_value.bias": 0.0,
    },
    "gru4rec": {
        "item.weight": glorot,
        "gru.weight_ih_l0": glorot,
        "gru.weight_hh_l0": glorot,
        "out.weight": by_default(128),
    },
    "bert4rec": {
        "item.weight": 0.02,
        "position.weight": 0.02,
        "layers.1.self_attn.in_proj_weight": 0.02,
        "layers.1.self_attn.out_proj.weight": 0.02,
        "layers.0.linear1.weight": 0.02,
        "layers.0.linear1.bias": 0.0,
        "head.weight": 0.02,
        "bias": 0.0,
    },
    "svae": {
        "item.weight": 0.02,
        "inner.weight": glorot,
        "latent.weight": glorot,
        "decoder.weight": glorot,
        "out.weight": glorot,
        "out.bias": 0.0,
    },
    "gmvae": {
        "item.weight": 0.02,
        "position.weight": 0.02,
        "interests.prototype.weight": 0.02,
        "mean.layer.self_attn.in_proj_weight": 0.02,
        "log_variance.layer.self_attn.out_proj.weight": 0.02,
        "decoder.layer.linear1.weight": 0.02,
        "decoder.layer.linear1.bias": 0.0,
        "interests.log_variance.0.weight": 0.02,
        "interests.gru.weight_hh_l1": by_default(128),
    },
    "mamba4rec": {
        "item.weight": 0.02,
        "layers.0.mixer.in_proj.weight": 0.02,
        "layers.0.mixer.out_proj.weight": 0.02,
        "layers.0.inner.weight": 0.02,
        "layers.0.inner.bias": 0.0,
        "layers.0.mixer.dt_proj.weight": 0.5 / 3**0.5,  # uniform up to one over the root of 4
        "layers.0.mixer.D": 0.0,  # all one
    },
    "mamba": {
        "item.weight": 0.02,
        "layers.0.mixer.mamba.in_proj.weight": 0.02,
        "layers.0.mixer.mamba.dt_proj.weight": 0.5 / 3**0.5,
        "layers.0.mixer.gates.forward_dense.weight": 0.02,
        "layers.0.mixer.mixing_out.weight": 0.02,
    },
    "diffurec": {
        "item.weight": 0.1,
        "blocks.0.attention.out.weight": glorot,
        "blocks.0.attention.query.weight": by_default(128),
        "blocks.3.inner.inner.weight": glorot,
        "blocks.3.inner.out.weight": glorot,
        "step.inner.weight": by_default(128),
    },
    "diffusion": {
        "item.weight": 0.1,
        "blocks.0.cross.out.weight": glorot,
        "blocks.0.block.inner.inner.weight": glorot,
    },
    "fuxi": {
        "item.weight": CUT * 0.02,
        "position.weight": CUT * 64**-0.5,
        "blocks.0.project.linear.weight": 0.02,
        "blocks.0.out.linear.weight": glorot,
        "blocks.0.out.linear.bias": 0.0,
        "blocks.1.feed_forward.inner.weight": glorot,
        "blocks.1.feed_forward.inner_out.weight": glorot,
        "blocks.1.by_place": 0.02,
        "blocks.1.by_time": 0.02,
    },
    "moe": {
        "item.weight": CUT * 0.02,
        "position.weight": CUT * 32**-0.5,
        "branch": 0.0,
        "blocks.0.feed_forward.router": 0.0,
        "blocks.0.feed_forward.noise": 0.0,
        "blocks.0.feed_forward.experts.3.gate.weight": glorot,
    },
    "comirec": {
        "item.weight": glorot,
        "position.weight": glorot,
        "inner.weight": glorot,
        "weigh.weight": glorot,
        "inner.bias": 0.0,
        "weigh.bias": 0.0,
    },
    "mind": {"item.weight": glorot, "map.weight": glorot, "start": CUT},
}


@pytest.mark.parametrize("provider", SPREAD)
def test_weights_begin_as_their_sources_begin_them(provider):
    torch.manual_seed(0)
    settings = vars(getattr(TrainCollabConfig(), provider))
    state = PROVIDERS[provider](num_items=500, **settings).state_dict()
    for name, expected in SPREAD[provider].items():
        weight = state[name]
        expected = expected(weight) if callable(expected) else expected
        rows = weight[1:] if name in ("item.weight", "out.weight") else weight
        close = 5 / rows.numel() ** 0.5  # an estimate of a deviation of n numbers is off by one over root 2 n
        assert float(rows.std()) == pytest.approx(expected, rel=close), name
    assert not state["item.weight"][0].any()


def test_the_published_start_of_the_diffusion_models_and_of_capsules_is_there():
    torch.manual_seed(0)
    for provider, settings, name, expected in (
        ("diffurec", {"init_std": 1.0}, "item.weight", 1.0),
        ("diffusion", {"init_std": 1.0, "variant": "released"}, "item.weight", 1.0),
        ("comirec", {"routing": "capsule"}, "maps", 64**-0.5),
    ):
        defaults = vars(getattr(TrainCollabConfig(), provider))
        state = PROVIDERS[provider](num_items=500, **defaults | settings).state_dict()
        assert float(state[name][1:].std()) == pytest.approx(expected, rel=0.02)
        assert state[name][0].any() == (provider == "comirec" or settings.get("variant") == "released")
