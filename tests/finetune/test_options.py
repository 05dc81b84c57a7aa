"""Readings of the paper and of its code: losses, targets, batches and fusion, against their formulas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packing_reference import EXACT, NUM_ITEMS, full_scores, gradients, plain_prompts, random_users
from test_train import TINY, fit
from tiny_mme_sid import WIDTH, model
from worlds import cycle, interactions

from llmrec.errors import ConfigError
from llmrec.evaluation.rank import rank_users
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.fusion import FrequencyGate
from llmrec.finetune.packing import group_rows, pack
from llmrec.finetune.presets import PRESETS
from llmrec.finetune.scoring import load_scorer
from llmrec.finetune.steps import (
    epoch_steps,
    micro_batches,
    row_lengths,
    sampled_items,
    share_rows,
    train_counts,
    training_targets,
)

WORLD = interactions([[1, 2, 3, 4, 5, 6], [3, 4, 5], [6, 5, 4, 3]], 7)


def test_full_binary_loss_is_that_of_torch():
    net = model(NUM_ITEMS, loss="bce_full")
    item, targets = random_users([1, 3, 4])
    rows = pack(item, targets, group_rows(targets, "packed"))
    scores = full_scores(net, plain_prompts(net, item, targets))
    wanted = F.one_hot(torch.from_numpy(targets.item) - 1, NUM_ITEMS).double()
    loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")
    expected, found = gradients(net, loss), gradients(net, net.loss([rows]))
    torch.testing.assert_close(net.loss([rows]), loss, **EXACT)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


@pytest.mark.parametrize("fusion", ["frequency", "target"])
def test_sampled_binary_loss_is_that_of_torch(fusion):
    settings = {} if fusion == "frequency" else {"fusion_temperature": 1e-3}
    net = model(NUM_ITEMS, loss="bce_sampled", fusion=fusion, **settings)
    item, targets = random_users([1, 3, 4])
    negative = sampled_items(targets.item, NUM_ITEMS, (0, 1))
    rows = pack(item, targets, group_rows(targets, "packed"), negative)
    scores = full_scores(net, plain_prompts(net, item, targets))
    each = torch.arange(len(targets))
    right, wrong = scores[each, targets.item - 1], scores[each, negative - 1]
    one = torch.ones_like(right)
    loss = F.binary_cross_entropy_with_logits(right, one, reduction="sum")
    loss = loss + F.binary_cross_entropy_with_logits(wrong, 0 * one, reduction="sum")
    expected, found = gradients(net, loss), gradients(net, net.loss([rows]))
    torch.testing.assert_close(net.loss([rows]), loss, **EXACT)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


def test_sampled_items_are_other_items_and_all_of_them():
    target = np.repeat(np.arange(1, 6), 2000)
    drawn = sampled_items(target, 5, (7, 3))
    assert (drawn != target).all() and drawn.min() == 1 and drawn.max() == 5
    counts = np.bincount(drawn[target == 3], minlength=6)
    assert counts[3] == 0 and counts[[1, 2, 4, 5]].min() > 400
    assert np.array_equal(drawn, sampled_items(target, 5, (7, 3)))


def test_the_padding_row_competes_only_when_asked():
    item, targets = random_users([1, 3, 4])
    rows = pack(item, targets, group_rows(targets, "packed"))
    for masked in (True, False):
        net = model(NUM_ITEMS, mask_pad=masked)
        hidden = plain_prompts(net, item, targets)
        scores = hidden @ net.item_scores.folded().T
        wanted = torch.from_numpy(targets.item)
        loss = F.cross_entropy(scores[:, masked:], wanted - int(masked), reduction="sum")
        torch.testing.assert_close(net.loss([rows]), loss, **EXACT)


def test_read_out_vectors_are_dropped_out_in_training_alone(monkeypatch):
    item, targets = random_users([1, 3, 4])
    row = group_rows(targets, "packed")
    net = model(NUM_ITEMS, dropout_rate=0.3)
    groups = [pack(item, targets.take(np.flatnonzero(row == one)), row[row == one]) for one in np.unique(row)]
    wanted = torch.from_numpy(targets.item)
    vectors = torch.randn(len(targets), WIDTH, dtype=torch.float64)

    def expected(readout: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(full_scores(net, readout), wanted - 1, reduction="sum")

    # In place of the base model's, so that dropout on item tokens draws no numbers.
    given = iter(2 * torch.split(vectors, [len(rows.target) for rows in groups]))
    monkeypatch.setattr(net, "hidden", lambda *_, **__: next(given))
    torch.testing.assert_close(net.eval().loss(groups), expected(vectors), **EXACT)
    net.train()
    torch.manual_seed(0)
    found = net.loss(groups)
    torch.manual_seed(0)
    torch.testing.assert_close(found, expected(F.dropout(vectors, 0.3)), **EXACT)
    assert abs(found - expected(vectors)) > 0.1


def test_targets_as_each_reading_has_them():
    def items(**settings):
        return training_targets(dataclasses.replace(TINY, **settings), WORLD).item.tolist()

    assert items() == [1, 2, 3, 4, 3, 6, 5]
    assert items(targets="last_only") == [4, 3, 5]
    assert items(skip_empty=True) == [2, 3, 4, 5]
    paper = {"targets": "last_only", "include_valid": True, "eval_every_epochs": 0}
    assert items(**paper) == [5, 4, 4]
    found = training_targets(dataclasses.replace(TINY, **paper), WORLD)
    assert (found.stop - found.start).tolist() == [4, 1, 2]
    assert items(include_valid=True, eval_every_epochs=0, max_targets=2) == [4, 5, 3, 4, 5, 4]
    with pytest.raises(ConfigError, match="leave no target"):
        training_targets(dataclasses.replace(TINY, skip_empty=True), interactions([[1, 2, 3]], 3))


def test_counts_with_and_without_validation_items():
    assert train_counts(TINY, WORLD).tolist() == [0, 1, 1, 2, 1, 1, 1, 0]
    assert train_counts(dataclasses.replace(TINY, count_valid=True, eval_every_epochs=0), WORLD).tolist() == [
        0,
        1,
        1,
        2,
        3,
        2,
        1,
        0,
    ]


def test_the_target_table_counts_in_full_beside_three_mixed_modalities():
    gate = FrequencyGate(torch.tensor([0, 3, 8, 20]), 4, temperature=1.0, add_first=True)
    weights = gate()
    assert weights.shape == (4, 4) and (weights[:, 0] == 1).all()
    torch.testing.assert_close(weights[:, 1:].sum(dim=1), torch.ones(4))
    net = model(NUM_ITEMS, fusion_weights="modalities")
    item, targets = random_users([2, 3])
    rows = pack(item, targets, group_rows(targets, "packed"))
    scores = full_scores(net, plain_prompts(net, item, targets))
    loss = F.cross_entropy(scores, torch.from_numpy(targets.item) - 1, reduction="sum")
    torch.testing.assert_close(net.loss([rows]), loss, **EXACT)


@pytest.mark.parametrize(("batch_by", "size"), [("targets", 5), ("users", 3), ("tokens", 20)])
def test_every_way_to_cut_steps_trains_every_target_once(batch_by, size):
    data = cycle(num_users=30)
    config = dataclasses.replace(TINY, batch_by=batch_by, batch_size=size)
    targets = training_targets(config, data)
    steps = epoch_steps(targets, config, np.random.default_rng(0), response=1)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(targets)))
    if batch_by == "targets":
        assert {len(step) for step in steps[:-1]} == {5}
    elif batch_by == "users":
        assert {len(np.unique(targets.user[step])) for step in steps[:-1]} == {3}
    else:
        lengths = row_lengths(targets, group_rows(targets, "packed"), 1)
        sizes = [lengths[np.unique(targets.user[step])].sum() for step in steps]
        assert max(sizes) < size + lengths.max() and len(steps) == pytest.approx(sum(sizes) / size, abs=2)
    assert fit(dataclasses.replace(config, epochs=1), data)[0].metrics["steps"] == len(steps)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_share_the_rows_of_a_step_fairly(world):
    length = np.random.default_rng(0).geometric(0.1, 64)
    shares = share_rows(length, world)
    assert sorted(np.concatenate(shares).tolist()) == list(range(64))
    sums = [length[own].sum() for own in shares]
    assert max(sums) - min(sums) <= length.max()


def test_a_step_by_tokens_counts_those_of_every_modality():
    data = cycle(num_users=100)
    config = dataclasses.replace(TINY, batch_by="tokens", batch_size=200)
    targets = training_targets(config, data)
    row = group_rows(targets, "packed")
    for width in (1, 3):
        length = row_lengths(targets, row, 2, width)
        steps = epoch_steps(targets, config, np.random.default_rng(0), 2, width)
        sizes = [length[np.unique(row[step])].sum() for step in steps]
        assert np.mean(sizes[:-1]) == pytest.approx(200, abs=length.max() / 2)


@pytest.mark.parametrize("stream", [True, False])
def test_forward_passes_hold_every_row_once_and_no_more_than_fits(stream):
    length = np.random.default_rng(1).geometric(0.1, 200)
    passes = micro_batches(length, 64, stream=stream)
    rows = [np.concatenate(groups) for groups in passes]
    assert sorted(np.concatenate(rows).tolist()) == list(range(200))
    for groups in passes:
        cells = sum(length[g].sum() if stream else len(g) * length[g].max() for g in groups)
        assert cells <= 64 or sum(map(len, groups)) == 1
    assert micro_batches(length[:0], 64, stream=stream) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "bce_full"},
        {"loss": "bce_sampled", "epochs": 30},
        {"readout": "item"},
        {"pad_quirk": True},
        {"rows": "stream"},
        {"targets": "last_only", "epochs": 40},
        {"fusion_weights": "modalities"},
    ],
    ids=str,
)
def test_every_reading_learns_which_item_follows(settings):
    data = cycle(num_users=200)
    config = dataclasses.replace(TINY, **{"epochs": 10, "max_history": 4, "batch_size": 64, **settings})
    adapter, made = fit(config, data)
    rank = rank_users(load_scorer(adapter, *made), data, data.targets("test"), mask_seen=False).rank
    assert (rank == 0).mean() > 0.9


def test_presets_follow_the_paper_and_the_published_code():
    paper, official = PRESETS["paper"], PRESETS["official"]
    assert PRESETS["default"] == FinetuneConfig()
    assert (paper.loss, official.loss) == ("bce_full", "ce")
    assert (paper.targets, official.targets) == ("last_only", "all") and paper.include_valid
    assert (paper.mlp_out_activation, official.mlp_out_activation) == ("none", "gelu")
    assert (paper.epochs, official.epochs) == (3, 4)
    assert official.pad_quirk and not official.mask_pad and official.prompt == "official17"
    assert official.quantize == "nf4" and official.batch_size == 16 and official.learning_rate == 3e-4
    assert paper.lora_dropout_rate == official.lora_dropout_rate == 0.05
    usual = vars(FinetuneConfig())
    llama = {
        "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "precision": "bf16",
        "lora_dropout_rate": 0.05,
    }
    assert {name: value for name, value in vars(paper).items() if value != usual[name]} == llama | {
        **{"loss": "bce_full", "targets": "last_only", "include_valid": True, "eval_every_epochs": 0},
        **{"max_history": 50, "mlp_out_activation": "none", "fusion_weights": "modalities"},
    }
    assert {name: value for name, value in vars(official).items() if value != usual[name]} == llama | {
        **{"prompt": "official17", "quantize": "nf4", "checkpoint_activations": True, "mask_pad": False},
        **{"pad_quirk": True, "target_std": 0.00902, "epochs": 4},
    }
    assert official.target_std == pytest.approx(4096**-0.5 / 3**0.5, rel=1e-3), "of U(-1, 1) / sqrt(4096)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include_valid": True}, "trains on the validation items.*eval_every_epochs=0"),
        ({"pad_quirk": True, "readout": "item"}, "moves the response"),
        ({"rows": "stream", "share_instruction": False}, "holds the instruction once"),
        ({"attention": "flex", "rows": "padded"}, "works on streams"),
        ({"checkpoint_activations": True, "rows": "padded"}, "rows=stream"),
        ({"quantize": "nf4", "base_model": "x"}, "precision=bf16"),
        ({"quantize": "nf4"}, "no effect|computes in bfloat16"),
        (
            {"fusion": "equal", "count_valid": True, "eval_every_epochs": 0},
            "count_valid has no effect with fusion='equal'",
        ),
        ({"count_valid": True}, "count_valid tells the model how often validation items occur"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**settings)
