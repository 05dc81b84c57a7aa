"""One optimiser step by its formulas: the gradient, its clipping, the learning rate, and AdamW's update."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packing_reference import EXACT, NUM_ITEMS, full_scores, gradients, plain_prompts
from tiny_mme_sid import model
from torch import Tensor
from worlds import cycle

from llmrec import distributed
from llmrec.finetune import run_state
from llmrec.finetune import trainer as trainer_module
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.engine import Engine, optimizer_of
from llmrec.finetune.run_state import RunCheckpoints, RunState, Window
from llmrec.finetune.scoring import scorer_of
from llmrec.finetune.train import align_first
from llmrec.finetune.trainer import Trainer

NO_CLIP = 1e6
"""A clip_norm that no gradient of these models comes near."""


def made(**settings) -> Trainer:
    """A trainer of the tiny model, the same one every time."""
    data = cycle(num_users=8, num_items=NUM_ITEMS)
    config = FinetuneConfig(**{"fusion_temperature": 1.0, "eval_every_epochs": 0, **settings})
    return Trainer(config, data, model(NUM_ITEMS, **settings))


def copied(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


def step_gradient(trainer: Trainer, chosen: np.ndarray) -> dict[str, Tensor]:
    """The gradient that a step over these targets gives the optimiser, by name."""
    seen: list[dict[str, Tensor]] = []
    hook = trainer.engine.inner.register_step_pre_hook(
        lambda *_: seen.append(copied(trainer.engine.parameters))
    )
    trainer.train_step(trainer.targets.take(chosen))
    hook.remove()
    return seen[0]


def mean_gradient(chosen: np.ndarray, **settings) -> dict[str, Tensor]:
    """Of the mean cross-entropy over the targets, from one plain prompt each."""
    trainer = made(**settings)
    net, targets = trainer.model, trainer.targets.take(chosen)
    scores = full_scores(net, plain_prompts(net, trainer.passes.item, targets))
    return gradients(net, F.cross_entropy(scores, torch.from_numpy(targets.item) - 1))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], factor * value, **EXACT, msg=name)


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((value**2).sum()) for value in gradient.values()))


@pytest.mark.parametrize("tokens", [10_000, 20], ids=["one pass", "several passes"])
@pytest.mark.parametrize("number", [9, 16])
def test_a_step_is_the_mean_of_its_targets(number, tokens):
    chosen = np.arange(number)
    trainer = made(clip_norm=NO_CLIP, micro_batch_tokens=tokens)
    passes, _ = trainer.passes.of(trainer.targets.take(chosen), 0)
    assert (len(passes) > 1) == (tokens < 1000)
    assert_same(step_gradient(trainer, chosen), mean_gradient(chosen))


def test_gradients_averaged_over_processes_are_those_of_the_mean_of_all_their_targets(monkeypatch):
    chosen, world = np.arange(16), 2
    trainers = [made(clip_norm=NO_CLIP) for _ in range(world)]
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    found: list[dict[str, Tensor]] = []
    for rank, trainer in enumerate(trainers):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(step_gradient(trainer, chosen))
    assert norm(found[0]) != pytest.approx(norm(found[1])), "each has targets of its own"
    average = {name: (value + found[1][name]) / world for name, value in found[0].items()}
    assert_same(average, mean_gradient(chosen))


@pytest.mark.parametrize("clip", [0.03, 3.0, NO_CLIP])
def test_a_gradient_is_scaled_down_to_the_norm_of_the_settings_and_never_up(clip):
    chosen = np.arange(16)
    whole = mean_gradient(chosen)
    found = step_gradient(made(clip_norm=clip), chosen)
    assert 3.0 < norm(whole) < NO_CLIP
    if clip == NO_CLIP:
        assert_same(found, whole)
        return
    assert norm(found) == pytest.approx(clip, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value * (clip / norm(whole)), rtol=1e-5, atol=1e-10)


def rates(**settings) -> tuple[list[float], int]:
    """The learning rate of each step of a run, as the optimiser has it, and how many steps there are."""
    trainer = made(batch_size=12, **settings)
    seen: list[float] = []
    groups = trainer.engine.inner.param_groups
    trainer.engine.inner.register_step_pre_hook(lambda *_: seen.extend(group["lr"] for group in groups))
    trainer.run()
    return seen, trainer.num_steps


@pytest.mark.parametrize("asked", [0, 1, 3, 5])
def test_the_learning_rate_rises_in_equal_steps_and_falls_as_a_cosine(asked):
    found, steps = rates(epochs=3, warmup_steps=asked, learning_rate=0.02)
    assert steps == len(found) == 12
    expected = [0.02 * (number / (asked + 1)) for number in range(1, asked + 1)]
    falling = steps - asked
    for number in range(falling):
        expected.append(0.02 * (1 + math.cos(math.pi * number / falling)) / 2)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found.index(max(found)) == asked and max(found) == pytest.approx(0.02)


def test_warm_up_takes_half_of_the_schedule_at_most():
    found, steps = rates(epochs=2, warmup_steps=100, learning_rate=0.02)
    assert found == rates(epochs=2, warmup_steps=4, learning_rate=0.02)[0] and steps == 8
    longer, _ = rates(epochs=2, schedule_epochs=4, warmup_steps=100, learning_rate=0.02)
    assert longer == pytest.approx([0.02 * number / 9 for number in range(1, 9)])


@pytest.mark.parametrize("decay", [None, 0.3])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_optimiser_takes_the_rate_and_the_decay_of_the_settings(name, decay):
    """AdamW's first step: the weight shrinks by rate * decay, then moves by the rate against its gradient."""
    settings = {} if decay is None else {"weight_decay": decay}
    config = FinetuneConfig(learning_rate=0.07, optimizer=name, **settings)
    before = torch.tensor([2.0, -3.0, 5.0])
    weight = torch.nn.Parameter(before.clone())
    optimizer = optimizer_of(config, [weight])
    weight.grad = torch.tensor([4.0, -1.0, 0.5])
    optimizer.step()
    expected = before * (1 - 0.07 * (decay or 0.0)) - 0.07 * weight.grad.sign()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_engine_trains_with_the_decay_of_the_settings():
    for settings, expected in (({}, 0.0), ({"weight_decay": 0.3}, 0.3)):
        net = model(NUM_ITEMS)
        engine = Engine(FinetuneConfig(learning_rate=0.07, **settings), net)
        for group in engine.inner.param_groups:
            assert (group["lr"], group["weight_decay"]) == (0.07, expected)


def test_the_alignment_before_fine_tuning_takes_the_rate_of_the_settings_and_no_decay():
    """AdamW's first step, over all items at once."""
    settings = {"method": "ctrl_mm", "ctrl_stage": "two", "ctrl_epochs": 1}
    net = model(NUM_ITEMS, **{**settings, "fusion_temperature": 1e-3})
    tokens = net.item_tokens
    before = {name: value.detach().clone() for name, value in tokens.named_parameters()}
    found = gradients(tokens, tokens.alignment(tokens.pairs(torch.arange(1, NUM_ITEMS + 1))))
    assert found
    align_first(FinetuneConfig(learning_rate=0.07, **settings), net, NUM_ITEMS)
    for name, value in tokens.named_parameters():
        expected = before[name]
        if name in found:
            expected = expected - 0.07 * found[name] / (found[name].abs() + 1e-8)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-6, msg=name)


def test_each_step_draws_its_own_negatives_and_a_step_that_is_repeated_the_same():
    trainer = made(loss="bce_sampled", micro_batch_tokens=40)

    def drawn(step: int, targets: slice = slice(0, 24)) -> list[list[int]]:
        chosen = trainer.targets.take(np.arange(24)[targets])
        passes, _ = trainer.passes.of(chosen, step)
        return [group.negative.tolist() for given in passes for group in given.groups]

    assert len(drawn(0)) > 1, "in several passes"
    assert drawn(0) == drawn(0) != drawn(1)
    other = made(loss="bce_sampled", micro_batch_tokens=40, seed=1)
    passes, _ = other.passes.of(other.targets.take(np.arange(24)), 0)
    assert [group.negative.tolist() for given in passes for group in given.groups] != drawn(0)


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_line_of_the_log_is_of_all_steps_since_the_last_one(world, monkeypatch):
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: 12.0))
    trainer = made(warmup_steps=5)
    monkeypatch.setenv("WORLD_SIZE", world)
    trainer.flops, trainer.peak, trainer.state.step = 5.0, 1000.0, 3
    trainer.state.window = Window(loss=torch.tensor(6.0), targets=4, tokens=100, started=10.0)
    trainer._log_window(SimpleNamespace(set_postfix_str=str))
    (row,) = trainer.state.log
    assert row["loss"] == 1.5 and row["learning_rate"] == trainer.learning_rate(2)
    assert (row["tokens_per_second"], row["targets_per_second"]) == (50.0, 2.0)
    assert row["share_of_peak"] == 50 * 5 / 1000 / int(world), "of all devices"
    assert trainer.state.window.targets == 0 and trainer.state.window.started > 10.0


def test_checkpoints_are_due_by_the_clock_and_room_is_asked_for_all_that_they_hold(monkeypatch):
    clock, asked, saved = [0.0], [], []
    monkeypatch.setattr(run_state.time, "monotonic", lambda: clock[0])
    tensors = {"a": torch.zeros(7, 2), "b": torch.zeros(3)}
    engine = SimpleNamespace(
        resumable=True, sharded=False, parameters=tensors, optimizer_states=dict, weights=lambda: tensors
    )
    store = SimpleNamespace(require_room=asked.append, save=saved.append)
    for select, copies in (("last", 3), ("valid", 4)):  # weights, Adam's two moments, the best weights
        config = FinetuneConfig(save_every_minutes=2, select=select)
        checkpoints = RunCheckpoints(config, engine, store)
        checkpoints.require_room()
        assert asked.pop() == 4 * copies * 17
        begun = clock[0]
        for seconds, due in ((119, False), (120, True), (500, True)):
            clock[0] = begun + seconds
            assert checkpoints.due() == due
        checkpoints.save(RunState(step=4), {"a": tensors["a"]})
        kept = {"weights.a", "weights.b", "best.a"}
        assert saved[-1].step == 4 and kept <= saved[-1].tensors.keys() and not checkpoints.due()
    for config, place in ((FinetuneConfig(save_every_minutes=0), store), (FinetuneConfig(), None)):
        never = RunCheckpoints(config, engine, place)
        clock[0] += 10**6
        never.require_room()
        assert not never.due() and asked == []


def test_a_pass_of_ranking_holds_as_many_items_as_one_of_training_has_tokens_for():
    net = model(NUM_ITEMS)
    net.item_tokens.tokens_per_item = 3
    for tokens, items in ((3000, 1000), (3001, 1000), (2, 1)):
        assert scorer_of(net, FinetuneConfig(micro_batch_tokens=tokens)).max_items == items
