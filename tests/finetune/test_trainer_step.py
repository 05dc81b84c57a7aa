"""One optimiser step by its formulas: the gradient, its clipping, the learning rate, and AdamW's update."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbones import save_backbone
from packing_reference import EXACT, NUM_ITEMS, full_scores, gradients, plain_prompts
from tiny_mme_sid import model
from torch import Tensor
from worlds import cycle

from llmrec import launched
from llmrec.files import read_json
from llmrec.finetune import run_state, train
from llmrec.finetune import trainer as trainer_module
from llmrec.finetune.bad_steps import BadSteps, Step
from llmrec.finetune.base_model import load_base
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.engine import Engine, optimizer_of
from llmrec.finetune.lora import lora_weights
from llmrec.finetune.prompt import Prompt
from llmrec.finetune.run_state import RunCheckpoints, RunState, Window
from llmrec.finetune.scoring import scorer_of
from llmrec.finetune.steps import steps_of_epoch
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
    monkeypatch.setattr(launched, "world_size", lambda: world)
    found: list[dict[str, Tensor]] = []
    for rank, trainer in enumerate(trainers):
        monkeypatch.setattr(launched, "rank", lambda rank=rank: rank)
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


def test_the_loss_of_a_line_is_the_mean_over_the_steps_that_count(monkeypatch):
    """Of three steps of 16 targets the second is left out; only the last one of an epoch is logged."""
    trainer = made(epochs=1, batch_size=16, bad_steps=1, log_every_steps=1000)
    assert trainer.num_steps == 3
    steps = iter([(2.0, False), (math.nan, True), (4.0, False)])

    def step(targets):
        mean, bad = next(steps)
        return torch.tensor(mean * len(targets)), 10, torch.tensor(bad)

    monkeypatch.setattr(trainer, "train_step", step)
    trainer.run()
    left_out, line, *_ = trainer.state.log
    assert (left_out["step"], left_out["targets"]) == (2, 16)
    assert (line["step"], line["loss"]) == (3, 3.0)


def test_a_bad_step_is_written_down_with_its_users_and_items(tmp_path):
    data = cycle(num_users=8, num_items=NUM_ITEMS)
    watch = BadSteps(1, data, tmp_path, "")
    targets = data.targets("train").take(np.array([0, 9, 20]))
    watch.watch(Step(epoch=1, step=4, targets=targets, bad=torch.tensor(True)))
    assert [row["step"] for row in watch.settle()] == [4] and watch.settle() == []
    found = read_json(tmp_path / "bad_step_4.json")
    assert found["users"] == [data.user_raw_ids[user] for user in targets.user]
    assert found["items"] == [data.raw_ids[item - 1] for item in targets.item]


def test_a_stream_has_room_for_its_instruction():
    trainer = made(rows="stream", micro_batch_tokens=40, layout="per_prefix")
    net, targets = trainer.model, trainer.targets
    assert net.stream
    passes, _ = trainer.passes.of(targets, 0)
    for given in passes:
        (rows,) = given.groups
        tokens = [max(1, shown) + len(net.response) for shown in rows.history.flatten().tolist()]
        assert len(net.instruction) + sum(tokens) <= 40
    assert sum(len(given.groups[0].target) for given in passes) == len(targets)


def test_the_alignment_before_fine_tuning_sees_every_item_in_every_epoch(monkeypatch):
    monkeypatch.setattr(train, "ALIGN_ITEMS", NUM_ITEMS // 2)

    def seen(seed: int) -> list[list[int]]:
        settings = {"method": "ctrl_mm", "ctrl_stage": "two", "ctrl_epochs": 3, "fusion_temperature": 1e-3}
        net, shown = model(NUM_ITEMS, **settings), []
        whole = net.item_tokens.pairs
        net.item_tokens.pairs = lambda items: shown.append(items.tolist()) or whole(items)
        align_first(FinetuneConfig(seed=seed, **settings), net, NUM_ITEMS)
        return shown

    found = seen(1)
    assert len(found) == 6 and seen(1) == found != seen(2)
    for half, other in zip(found[::2], found[1::2]):
        assert sorted(half + other) == list(range(1, NUM_ITEMS + 1))
    assert found[0] != found[2]


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    targets = made().targets

    def order(seed: int, epoch: int) -> list[list[int]]:
        config = FinetuneConfig(seed=seed, batch_size=8)
        return [step.tolist() for step in steps_of_epoch(targets, config, epoch)]

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2) and order(1, 1) != order(2, 1)


def test_lora_is_scaled_by_alpha_over_rank(tmp_path):
    """W x + (alpha / r) B A x (arXiv 2106.09685, section 4.1), and is written down for plain PEFT so."""
    config = FinetuneConfig(
        base_model=str(save_backbone(tmp_path)), prompt="compact", lora_rank=4, lora_alpha=6.0,
        lora_dropout_rate=0.25, lora_targets=("down_proj",),
    )  # fmt: skip
    base = load_base(config, Prompt(instruction=[1], response=[2], vocab_size=32))
    layer = base.base_model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x, a, b = torch.randn(3, 24), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + 1.5 * x @ a.T @ b.T
    torch.testing.assert_close(layer.eval()(x), expected)
    assert layer.lora_dropout["default"].p == 0.25
    _, written = lora_weights(base, config, {name: value.detach() for name, value in base.named_parameters()})
    wanted = {
        "r": 4, "lora_alpha": 6.0, "use_rslora": False, "inference_mode": True,
        "target_modules": ["down_proj"],
    }  # fmt: skip
    assert {name: written[name] for name in wanted} == wanted
