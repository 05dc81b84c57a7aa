"""Recorded passes against the passes themselves: by hand on a CPU, as CUDA graphs on a GPU."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import fake_gpu
from packing_reference import EXACT, NUM_ITEMS, random_users
from taped import record
from tiny_mme_sid import WIDE, model

from llmrec.errors import TrainingError
from llmrec.finetune import base_model, build, graphs
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.engine import can_record
from llmrec.finetune.flex import NAME as FLEX
from llmrec.finetune.packing import group_rows, pack

LENGTHS = ([3, 7], [60, 2, 5], [3, 7], [1], [60, 5, 2], [3, 7])
"""Users' histories of several passes; some streams are as long as others and say something else."""


def rows_of(lengths, seed: int = 0):
    item, targets = random_users(lengths, seed=seed)
    return pack(item, targets, group_rows(targets, "packed"))


def passes(net, parts) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of some passes, and the gradients of their sum as they add up."""
    net.zero_grad(set_to_none=True)
    losses = []
    for part in parts:
        loss = net("loss", [part])
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: value.grad.clone() for name, value in build.trainable(net).items()}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_losses_and_summed_gradients_are_those_of_plain_passes(lora):
    net = model(NUM_ITEMS, rows="stream", lora=lora)
    parts = [rows_of(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    expected = passes(net, parts)
    net.record_base()
    net.graphs.record = record
    for _ in range(2):
        for ours, theirs in zip(passes(net, parts), expected):
            torch.testing.assert_close(ours, theirs, **EXACT)
    assert sorted(net.graphs.recorded) == [256, 384]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_of_the_weights_are_seen(lora, precision):
    net = model(NUM_ITEMS, rows="stream", lora=lora)
    if precision == "bf16":
        net.float()
        net.precision = precision
    net.record_base()
    net.graphs.record = record
    part = rows_of([3, 7])
    before, _ = passes(net, [part])
    with torch.no_grad():
        for parameter in build.trainable(net.base).values():
            parameter.mul_(1.5)
    (found,), gradients = passes(net, [part])
    net.graphs.takes = lambda stream: False  # the same padding, not recorded
    (loss,), expected = passes(net, [part])
    share = 1e-10 if precision == "fp32" else 1e-3
    assert abs(found - loss) < share * abs(loss - before[0])
    for name, value in expected.items():
        assert (gradients[name] - value).norm() <= share * value.norm(), name


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_a_recording_shares_no_node_of_autograd_with_other_passes(lora):
    """A parameter's node belongs to the stream it was made on, as long as any pass keeps it."""
    net = model(NUM_ITEMS, rows="stream", lora=lora)
    parts = [rows_of([3, 7]), rows_of([5])]
    kept = net("loss", parts[:1])  # so every node of this pass is still there
    net.record_base()
    asked, decoders, recording = [], [], []
    for parameter in net.graphs.parameters:
        parameter.register_hook(lambda gradient: asked.append(bool(recording)))
    decode = net.graphs.decode

    def watched(embeddings, mask, position, parameters):
        decoders.append([embeddings, *parameters.values()])
        return decode(embeddings, mask, position, parameters)

    def marked(function, pool):
        recording.append(function)
        replay = record(function, pool)
        recording.clear()
        return replay

    net.graphs.decode, net.graphs.record = watched, marked
    loss = net("loss", parts[1:])
    assert not asked, "gradients for the parameters' own nodes"
    loss.backward()
    assert asked == [False] * len(net.graphs.parameters)
    *warm_up, recorded = decoders
    assert len(warm_up) == graphs.WARM_UP
    assert not {id(leaf) for leaf in recorded} & {id(leaf) for leaves in warm_up for leaf in leaves}
    for leaf, parameter in zip(recorded[1:], net.graphs.parameters):
        assert leaf.data_ptr() == parameter.data_ptr()
    kept.backward()


def test_gradients_are_given_once():
    net = model(NUM_ITEMS, rows="stream")
    net.record_base()
    net.graphs.record = record
    loss = net.loss([rows_of([3, 7])])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="another recorded pass came between"):
        loss.backward()


def test_what_cannot_be_recorded_is_not(monkeypatch):
    net = model(NUM_ITEMS, rows="stream")
    net.record_base()
    net.graphs.record = None
    two = [rows_of([3]), rows_of([7])]
    net.loss(two)  # gradients of the first would be gone when they are asked for
    with torch.no_grad():
        net.loss(two[:1])
    net.eval().loss(two[:1])
    monkeypatch.setattr(graphs, "MOST_TOKENS", 8)
    net.train().loss(two[:1])
    assert not net.graphs.recorded


def test_gradients_that_another_pass_has_overwritten_are_not_given():
    net = model(NUM_ITEMS, rows="stream")
    net.record_base()
    net.graphs.record = record
    first = net.loss([rows_of([3, 7])])
    net.loss([rows_of([5])])
    with pytest.raises(RuntimeError, match="another recorded pass came between"):
        first.backward()


def test_what_fails_while_it_is_recorded_names_the_way_out():
    net = model(NUM_ITEMS, rows="stream")
    net.record_base()

    def refuse(error):
        def fail(function, pool):
            try:
                raise error
            finally:
                # Ending such a recording fails as well.
                raise RuntimeError("operation failed due to a previous error during capture")

        return fail

    net.graphs.record = refuse(RuntimeError("operation not permitted when stream is capturing\nmore"))
    with pytest.raises(TrainingError, match=r"not permitted .* capturing\); set finetune.cuda_graphs=false"):
        net.loss([rows_of([3, 7])])
    net.graphs.record = refuse(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        net.loss([rows_of([3, 7])])


@pytest.mark.parametrize(
    ("settings", "rope", "environment", "recorded"),
    [
        ({}, "default", {}, True),
        ({}, "llama3", {}, True),
        ({}, "longrope", {}, False),
        ({"cuda_graphs": False}, "default", {}, False),
        ({"checkpoint_activations": True}, "default", {}, False),
        ({}, "default", {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, False),
        ({}, "default", {"ACCELERATE_USE_DEEPSPEED": "true"}, False),
    ],
)
def test_only_what_stands_still_on_a_gpu_is_recorded(settings, rope, environment, recorded, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    net = model(NUM_ITEMS, rows="stream")
    net.base.config.rope_parameters = {"rope_type": rope}
    assert not can_record(FinetuneConfig(**settings), net)  # on a CPU
    with fake_gpu() as gpu:
        gpu.move(net)
        assert can_record(FinetuneConfig(**settings), net) == recorded
        net.stream = False
        assert not can_record(FinetuneConfig(**settings), net)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("flex", [False, True], ids=["dense", "flex"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_cuda_graphs_give_losses_and_summed_gradients_of_plain_passes(lora, flex, compiled):
    net = model(NUM_ITEMS, rows="stream", lora=lora, width=WIDE).float().cuda()
    net.flex = flex
    base_model.decoder_of(net.base).set_attn_implementation(FLEX if flex else "sdpa")
    parts = [rows_of(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    expected = passes(net, parts)
    if compiled:
        for block in base_model.decoder_of(net.base).layers:
            block.compile()
    net.record_base()
    for _ in range(2):
        losses, gradients = passes(net, parts)
        for ours, theirs in zip(losses, expected[0]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for name, value in expected[1].items():
            assert float((gradients[name] - value).norm() / value.norm().clamp(min=1e-6)) < 2e-3, name
    assert net.graphs.recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_in_recorded_passes_follows_the_seed():
    net = model(NUM_ITEMS, rows="stream", lora=True, lora_dropout_rate=0.3).float().cuda()
    part = rows_of([3, 7])
    found = []
    for _ in range(2):  # the second time recorded anew
        net.record_base()
        torch.manual_seed(5)
        found.append([float(net.loss([part]).detach()) for _ in range(3)])
    assert len(set(found[0])) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)
