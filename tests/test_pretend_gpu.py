"""Training and ranking on a pretended GPU: nothing meets a tensor of another device, and the numbers are
those of the CPU, which computes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from cases import CASES
from pretend_gpu import CPU, CUDA, DeviceError, missing, pretend_gpu
from taped import record
from tiny_recipe import tiny
from tool import ended, load

from llmrec import distributed, machine
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.collab import rows
from llmrec.collab.provider import provider_scorer
from llmrec.collab.train import train_collab
from llmrec.data.config import SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.encoders.config import ImageEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.evaluation.rank import rank_users
from llmrec.finetune import base_model, graphs
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.train import finetune
from llmrec.inference.recommender import Recommender
from llmrec.interactions import Interactions
from llmrec.pipeline import seal
from llmrec.running import Spent
from llmrec.semantic_ids.learn import learn_semantic_ids
from llmrec.stage_changes import describe_stage

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"this torch has no {missing()}")

RECIPE = tiny()
NO_GATE = {"fusion_temperature": FinetuneConfig.fusion_temperature}
METHODS = ("e4srec", "me", "concat", "concat_mlp", "ctrl_mm", "se_sid", "se_random")
IDS = [
    {},
    {"precision": "bfloat16", "codebook_update": "ema", "restart_dead_codes": True},
    {"reconstruction": "mse", "estimator": "rotation", "sinkhorn": "all", "repair_collisions": True},
    {"codebook_update": "gradient", "diversity_weight": 0.1, "diversity_clusters": 2},
    {"collaborative_weight": 0.1},
]
TUNED = [
    {},
    *({"method": name, **NO_GATE} for name in METHODS),
    {"method": "mme_random"},
    {"method": "ctrl_mm", "ctrl_stage": "two", "micro_batch_tokens": 300, **NO_GATE},
    {"loss": "bce_sampled", "precision": "bf16", "select": "valid"},
    {"rows": "padded", "readout": "item"},
    {"checkpoint_activations": True, "bad_steps": 1, "dropout_rate": 0.1},
]


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """This process's device is a pretended GPU, on which passes are recorded as far as a CPU can."""
    state = distributed.state()
    before = state.device
    with (
        pretend_gpu(),
        mock.patch.object(graphs.DecoderGraphs.__init__, "__defaults__", (record,)),
        mock.patch.object(graphs, "aside", lambda device: contextlib.nullcontext()),
        mock.patch.object(machine, "matmul_peak", lambda *given: 1e12),
    ):
        state.device = CUDA
        try:
            yield
        finally:
            state.device = before


@pytest.fixture(scope="module")
def data() -> Interactions:
    market = SampleMarketConfig(num_users=40, num_items=48, num_interests=4, max_length=11)
    return prepare_data(replace(RECIPE.prepare_data, market=market))


@pytest.fixture(scope="module")
def collab(data) -> CollabEmbeddings:
    return train_collab(replace(RECIPE.train_collab, epochs=1), data)


@pytest.fixture(scope="module")
def content(data) -> ContentEmbeddings:
    return encode_items(replace(RECIPE.encode_items, image=ImageEncoderConfig(encoder="none")), data)


@pytest.fixture(scope="module")
def ids(data, collab, content) -> SemanticIds:
    return learn_semantic_ids(replace(RECIPE.learn_semantic_ids, epochs=1), data, collab, content)


@pytest.mark.parametrize("name", CASES)
def test_sequence_models(name, data, monkeypatch):
    for cells in (rows.MAX_CELLS, rows.OVERHEAD_CELLS):  # rows are cut into passes alike
        monkeypatch.setitem(cells, "gpu", cells["cpu"])
    config = CASES[name].config(epochs=1)
    expected = train_collab(config, data)
    with on_gpu():
        found = train_collab(config, data)
        ranking = rank_users(provider_scorer(found), data, data.targets("test"), top_k=3)
    assert np.array_equal(found.vectors, expected.vectors)
    wanted = rank_users(provider_scorer(expected), data, data.targets("test"), top_k=3)
    assert np.array_equal(ranking.top, wanted.top)


@pytest.mark.parametrize("changes", IDS, ids=str)
def test_semantic_ids(changes, data, collab, content):
    config = replace(RECIPE.learn_semantic_ids, epochs=2, **changes)
    expected = learn_semantic_ids(config, data, collab, content)
    with on_gpu():
        found = learn_semantic_ids(config, data, collab, content)
    for name, codes in expected.codes.items():
        assert np.array_equal(found.codes[name], codes)


@pytest.mark.parametrize("changes", TUNED, ids=str)
def test_fine_tuning(changes, data, collab, content, ids):
    with on_gpu():
        found = finetune(replace(RECIPE.finetune, epochs=1, **changes), data, collab, content, ids)
    assert all(torch.isfinite(value).all() for value in found.heads.values())


@pytest.mark.parametrize("length", [5, 5000])
def test_sums_along_an_axis_are_the_same_where_order_counts(length):
    values = torch.randn(2, length, 3, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with pretend_gpu():
            found = machine.running_sum(values.to("cuda"), 1)
            assert found.device == CUDA
            found = found.cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, values.cumsum(1))


def test_a_recommender_on_a_gpu_answers_as_one_on_a_cpu(packaged):
    expected = Recommender.from_pretrained(packaged, device="cpu")
    histories = [expected.raw_ids[:3], [], expected.raw_ids[4:9]]
    with on_gpu():
        found = Recommender.from_pretrained(packaged, device="cuda")
        np.testing.assert_allclose(found.score(histories), expected.score(histories), atol=1e-5)
        best, wanted = (one.recommend(histories, k=3, explain=True) for one in (found, expected))
        assert [[item.item_id for item in row] for row in best] == [
            [item.item_id for item in row] for row in wanted
        ]
        found.add_items([{"item_id": "n1", "title": "Plain red drum"}])
        assert found.score([["n1"]]).shape == (1, len(expected.raw_ids) + 1)


SMALL = ("--rounds", "1", "--users", "8", "--width", "16", "--layers", "1")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("benchmark_finetune", ("packing", "--batch-size", "16", *SMALL)),
        ("benchmark_finetune", ("evaluation", *SMALL)),
        ("benchmark_engine", ("--shape", "tiny", "--steps", "1", "--only", "16 targets")),
        ("benchmark_providers", ("layout", "--steps", "1", "--rounds", "1")),
        ("benchmark_inference", ("latency", "--items", "60", "--content-width", "8", *SMALL)),
    ],
    ids=lambda given: given if isinstance(given, str) else given[0],
)
def test_benchmarks(tool, arguments, data, tmp_path, capsys):
    """What they are compared with lies where they do."""
    if tool != "benchmark_inference":
        data.save(tmp_path)
        seal(tmp_path, describe_stage("prepare_data", RECIPE.prepare_data, ()), Spent())
        arguments = (*arguments, "--prepare-data", str(tmp_path))
    with on_gpu(), mock.patch.object(base_model, "MIN_FLEX_HEAD", 10**9):
        code, _, said = ended(load(tool).main, capsys, *arguments)
    assert code == 0, said


def test_what_lies_on_another_device_is_noticed():
    """The test of the tests."""
    host = torch.arange(3)
    with pretend_gpu():
        there = torch.ones(3, device="cuda", requires_grad=True)
        assert there.device == CUDA and there.is_cuda and (there * 2)[1:].cpu().device == CPU
        assert torch.equal(there[host.flip(0)].cpu(), torch.ones(3))  # indices may lie on the host
        assert (there * torch.tensor(2.0)).device == CUDA  # and single numbers
        (there * 2).sum().backward()
        assert there.grad.device == CUDA
        with pytest.raises(DeviceError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(DeviceError, match="indices on cuda"):
            host[host.to("cuda")]
        with pytest.raises(DeviceError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.detach().numpy()
        with pytest.raises(DeviceError, match="nobody waits"):
            there.to("cpu", non_blocking=True)
