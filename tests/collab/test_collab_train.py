"""The trainer: what it trains on, when it stops, what it keeps, what it refuses."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from worlds import cycle, interactions, two_communities

from llmrec import distributed, global_state
from llmrec.artifacts import CollabEmbeddings
from llmrec.collab import rows as rows_module
from llmrec.collab import train, trainer
from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.collab.configs.fuxi import FuxiConfig
from llmrec.collab.losses import Loss, Pooled, ratio
from llmrec.collab.provider import PROVIDERS, load_provider, provider_scorer
from llmrec.collab.rows import TrainingRows
from llmrec.collab.sasrec import SASRec
from llmrec.collab.train import train_collab
from llmrec.errors import ArtifactMismatchError, ConfigError, DataError, TrainingError
from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k
from llmrec.evaluation.rank import Scorer, popularity, rank_users
from llmrec.interactions import SPLIT_CODES, Interactions

TINY = SASRecConfig(embed_dim=8, num_layers=1, inner_dim=16, max_history=12, dropout_rate=0.0)


def tiny(**settings) -> TrainCollabConfig:
    return TrainCollabConfig(**({"sasrec": TINY, "batch_size": 16, "epochs": 3} | settings))


def without(data: Interactions, *splits: str) -> Interactions:
    """The same data with the interactions of some splits left out."""
    keep = ~np.isin(data.split, [SPLIT_CODES[name] for name in splits])
    total = np.concatenate([[0], np.cumsum(keep)])
    return replace(
        data,
        item=data.item[keep],
        timestamp=data.timestamp[keep],
        split=data.split[keep],
        offset=total[data.offset],
    )


def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best_epoch():
    data = two_communities()
    collab = train_collab(tiny(epochs=60, learning_rate=0.03, patience=4), data)
    history = [row["valid_ndcg@10"] for row in collab.log]
    best = int(np.argmax(history))
    assert collab.metrics["best_epoch"] == best + 1
    assert collab.metrics["epochs"] == len(history) == best + 1 + 4 < 60
    rank = rank_users(provider_scorer(collab), data, data.targets("valid"), shard=False).rank
    assert ndcg_at_k(rank, 10).mean() == collab.metrics["valid_ndcg@10"] == history[best]


def test_validation_ranks_items_of_the_history_too_when_asked():
    """Users who come back to the same items: the two rankings differ."""
    data = interactions([[1, 2, 1, 3, 1, 2, 1, 2, 3], [4, 5, 4, 6, 4, 5, 6, 5, 4]] * 6, 8)
    collab = train_collab(tiny(epochs=3, mask_seen=False), data)
    ranking = rank_users(provider_scorer(collab), data, data.targets("valid"), shard=False)
    assert collab.metrics["valid_ndcg@10"] == ndcg_at_k(ranking.rank_seen_kept, 10).mean()
    assert ndcg_at_k(ranking.rank, 10).mean() != ndcg_at_k(ranking.rank_seen_kept, 10).mean()


def test_training_is_a_plain_loop_of_clipped_adamw_steps():
    """Written again: users in random order, the mean gradient of a step's targets, its length clipped, decay
    apart from it, a rate that falls by epochs; and rankings in between, without dropout."""
    data = uneven()
    config = tiny(
        sasrec=replace(TINY, dropout_rate=0.3), epochs=4, learning_rate=0.02, clip_norm=0.2, patience=None,
        weight_decay=0.5, decay_every_epochs=1, decay_rate=0.5, seed=3,
    )  # fmt: skip
    collab = train_collab(config, data)
    global_state.seed_everything(3)
    order = np.random.default_rng(3)
    device = distributed.device()
    model = SASRec(num_items=30, **vars(config.sasrec)).to(device)
    rows = TrainingRows.of(data.sequences("train"), 12, "positions", device)
    weights = dict(model.named_parameters())
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    states, clipped, step = [], 0, 0
    for epoch in range(4):
        model.train()
        for chosen in rows.steps("users", 16, order):
            model.zero_grad()
            number, step = 0, step + 1
            for batch in rows.batches(chosen):
                loss = model.loss(batch)
                loss.total.backward()
                number += loss.num_targets
            gradients = {name: weight.grad / number for name, weight in weights.items()}
            length = float(sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5)
            clipped += length > 0.2
            rate = 0.02 * 0.5**epoch
            for name, weight in weights.items():
                gradient = gradients[name] * min(1.0, 0.2 / length)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                moved = first[name] / (1 - 0.9**step)
                moved = moved / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                weight.data -= rate * (moved + (0.5 * weight if weight.ndim > 1 else 0))
        model.eval()
        scorer = Scorer(name="loop", score=model.score, max_history=12)
        rank = rank_users(scorer, data, data.targets("valid")).rank
        assert collab.log[epoch]["valid_ndcg@10"] == pytest.approx(ndcg_at_k(rank, 10).mean(), abs=1e-4)
        assert collab.log[epoch]["valid_recall@10"] == pytest.approx(recall_at_k(rank, 10).mean(), abs=1e-4)
        states.append({name: value.cpu().numpy().copy() for name, value in model.state_dict().items()})
    assert 0 < clipped <= step == 4 * 3
    for name, value in states[collab.metrics["best_epoch"] - 1].items():
        np.testing.assert_allclose(collab.state[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_last_epoch_is_ranked_too():
    collab = train_collab(tiny(epochs=5, eval_every_epochs=3), two_communities())
    assert [row["epoch"] for row in collab.log if "valid_ndcg@10" in row] == [3, 5]


def test_a_model_that_reads_times_is_told_that_there_are_none(caplog):
    data = two_communities()
    settings = {"provider": "fuxi", "epochs": 1, "select": "last"}
    train_collab(TrainCollabConfig(**settings), data)
    assert "reads times" not in caplog.text
    places = replace(data, summary={"source": "sequences"})
    train_collab(TrainCollabConfig(**settings, fuxi=FuxiConfig(temporal=False)), places)
    assert "reads times" not in caplog.text
    train_collab(TrainCollabConfig(**settings), places)
    assert "leave that out with train_collab.fuxi.temporal=false" in caplog.text


def test_an_epoch_is_one_short_line_that_says_which_was_best(caplog):
    caplog.set_level("INFO")
    collab = train_collab(tiny(epochs=60, learning_rate=0.03, patience=2), two_communities())
    lines = [record.getMessage() for record in caplog.records if ": epoch " in record.getMessage()]
    best, found = collab.metrics["best_epoch"], collab.log[-1]
    assert lines[best - 1].count("ndcg") == 1 and lines[best - 1].startswith(f"train_collab: epoch {best}, ")
    assert re.fullmatch(
        rf"train_collab: epoch {best + 2}, loss {found['train_loss']:.4f}, valid ndcg@10 "
        rf"{found['valid_ndcg@10']:.4f}, recall@10 {found['valid_recall@10']:.4f}, "
        rf"best {collab.metrics['valid_ndcg@10']:.4f} in epoch {best}, \d+\.\d s",
        lines[-1],
    )


def test_without_patience_every_epoch_is_trained():
    assert (
        train_collab(tiny(epochs=5, learning_rate=1e-9, patience=1), two_communities()).log[-1]["epoch"] < 5
    )
    assert (
        train_collab(tiny(epochs=5, learning_rate=1e-9, patience=None), two_communities()).log[-1]["epoch"]
        == 5
    )


def test_patience_counts_validations_not_epochs():
    collab = train_collab(
        tiny(epochs=60, learning_rate=0.03, patience=3, eval_every_epochs=2), two_communities()
    )
    ranked = [row["epoch"] for row in collab.log if "valid_ndcg@10" in row]
    assert ranked == list(range(2, len(collab.log) + 1, 2))
    assert collab.metrics["epochs"] == collab.metrics["best_epoch"] + 6


def test_the_loss_falls_and_every_epoch_is_logged():
    collab = train_collab(tiny(epochs=8, select="last", learning_rate=0.01), cycle())
    losses = [row["train_loss"] for row in collab.log]
    assert losses[0] == pytest.approx(np.log(12), rel=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert [row["epoch"] for row in collab.log] == list(range(1, 9))
    measured = {"train_seconds", "seconds", "gradient_norm", "largest_gradient_norm"}
    assert all(set(row) == {"epoch", "train_loss", "steps", *measured} for row in collab.log)
    assert all(0 < row["gradient_norm"] <= row["largest_gradient_norm"] for row in collab.log)
    assert collab.metrics == {
        "best_epoch": 8,
        "epochs": 8,
        "num_parameters": sum(array.size for array in collab.state.values()),
        "num_targets": 64 * 5,
        "items_never_trained": 0,
        "mean_vector_norm": pytest.approx(np.sqrt((collab.vectors[1:] ** 2).sum(1)).mean(), rel=1e-5),
        "trained_on": ["train"],
    }


def uneven(seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    return interactions([rng.integers(1, 31, size).tolist() for size in rng.integers(4, 13, 40)], 30)


@pytest.mark.parametrize(
    ("layout", "overhead", "cells"), [("positions", 0, 24), ("prefixes", 10**6, 10**6), ("prefixes", 0, 24)]
)
def test_a_step_depends_neither_on_how_rows_are_grouped_nor_on_their_layout(
    layout, overhead, cells, monkeypatch
):
    """One padded batch of users, many small ones, and one row per target give the same update."""
    weights = []
    for case in (("positions", 10**6, 10**6), (layout, overhead, cells)):
        monkeypatch.setattr(rows_module, "OVERHEAD_CELLS", {"cpu": case[1], "gpu": case[1]})
        monkeypatch.setattr(rows_module, "MAX_CELLS", {"cpu": case[2], "gpu": case[2]})
        rows = TrainingRows.of(uneven().sequences("train"), 7, case[0], distributed.device())
        torch.manual_seed(0)
        model = SASRec(num_items=30, **{**vars(TINY), "num_negatives": 0}).to(distributed.device())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        batches = list(rows.batches(np.arange(rows.num_rows)))
        assert (len(batches) == 1) == (case[1] > 0)
        sums = trainer.Sums()
        assert trainer.train_step(model, optimizer, tiny(clip_norm=1e9), batches, sums) == rows.num_targets
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["positions", "prefixes"])
def test_rows_hold_the_last_items_of_every_user_their_targets_and_times(layout):
    data = uneven()
    offset, item, _ = data.sequences("train")
    rows = TrainingRows.of(data.sequences("train"), 5, layout, torch.device("cpu"))
    expected = []
    for user in range(data.num_users):
        mine = item[offset[user] : offset[user + 1]].tolist()[-6:]
        first = int(offset[user + 1] - offset[user]) - len(mine)  # timestamps are positions
        for end in range(1, len(mine)):
            expected.append((tuple(mine[:end]), tuple(range(first, first + end + 1)), mine[end]))
    found = []
    for batch in rows.batches(np.arange(rows.num_rows), step=3, epoch=2):
        assert (batch.step, batch.epoch) == (3, 2)
        parts = (batch.item, batch.target, batch.time, batch.next_time)
        for shown, target, time, later in zip(*(part.tolist() for part in parts)):
            length = sum(value != 0 for value in shown)
            assert not any(shown[length:] + target[length:] + time[length:] + later[length:])
            assert time[1:length] == later[: length - 1]
            ends = [end for end in range(1, length + 1) if target[end - 1]]
            assert ends == (list(range(1, length + 1)) if layout == "positions" else [length])
            times = [*time[:1], *later]
            found += [(tuple(shown[:end]), tuple(times[: end + 1]), target[end - 1]) for end in ends]
    assert sorted(found) == sorted(expected)
    assert rows.num_targets == len(expected)


@pytest.mark.parametrize("layout", ["positions", "prefixes"])
def test_with_all_windows_every_item_but_the_first_is_a_target_once(layout):
    offset, item, _ = uneven().sequences("train")
    rows = TrainingRows.of((offset, item, item), 3, layout, torch.device("cpu"), "all")
    expected, found = [], []
    for user in range(len(offset) - 1):
        mine = item[offset[user] : offset[user + 1]].tolist()
        for place in range(1, len(mine)):
            if layout == "prefixes":  # its own last three items
                first = max(0, place - 3)
            else:  # what its window shows: windows of three targets are counted from the end
                windows = -(-(len(mine) - place) // 3)
                first = max(0, len(mine) - 3 * windows - 1)
            expected.append((tuple(mine[first:place]), mine[place]))
    for user in range(rows.num_users):
        for batch in rows.batches(rows.rows_of(np.array([user]))):
            for shown, target in zip(batch.item.tolist(), batch.target.tolist()):
                found += [(tuple(shown[: end + 1]), wanted) for end, wanted in enumerate(target) if wanted]
    assert sorted(found) == sorted(expected)
    assert rows.num_targets == len(expected)


def test_a_row_per_target_of_a_model_of_positions_has_the_same_targets():
    """Unless all windows are asked for."""
    long = interactions([list(range(1, 25)) for _ in range(20)], 24)
    model = SASRec(num_items=24, **vars(replace(TINY, max_history=5)))
    for layout, windows, num_rows, num_targets in (
        ("auto", "auto", 20, 100),
        ("prefixes", "auto", 100, 100),
        ("prefixes", "all", 420, 420),
        ("auto", "all", 100, 420),
    ):
        rows = train.training_rows(model, tiny(layout=layout, windows=windows), long.sequences("train"))
        assert (rows.num_rows, rows.num_targets) == (num_rows, num_targets)


def test_windows_are_all_where_every_target_has_a_row_and_last_elsewhere():
    long = interactions([list(range(1, 25)) for _ in range(20)], 24)
    shortened = {"max_history": 5, "dropout_rate": 0.0, "embed_dim": 8}
    for provider, model, expected in (("sasrec", "sasrec", 5), ("mind", "mind", 21)):
        settings = replace(getattr(TrainCollabConfig(), model), **shortened)
        config = TrainCollabConfig(provider=provider, **{model: settings}, epochs=1, select="last")
        assert train_collab(config, long).metrics["num_targets"] == 20 * expected


def test_the_learning_rate_falls_in_steps_and_weight_decay_spares_norms_and_states():
    config = tiny(learning_rate=0.5, decay_every_epochs=2, decay_rate=0.1, weight_decay=0.25)
    rates = [trainer.learning_rate(config, epoch) for epoch in range(1, 6)]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])
    small = {"embed_dim": 8, "state_dim": 4, "max_history": 12}
    settings = replace(TrainCollabConfig().mamba4rec, **small)
    model = PROVIDERS["mamba4rec"](num_items=5, **vars(settings))
    decayed, spared = trainer.optimizer_of(model, config).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)
    kept = {names[id(weight)] for weight in spared["params"]}
    assert "norm.weight" in kept and "layers.0.mixer.A_log" in kept and "layers.0.mixer.D" in kept
    assert "item.weight" in {names[id(weight)] for weight in decayed["params"]}
    assert len(decayed["params"]) + len(kept) == len(names)


def test_a_model_with_quick_scores_is_validated_by_them(monkeypatch):
    asked = []

    class Quick(SASRec):
        def quick_score(self, history):
            asked.append("quick")
            return self.score(history)

    monkeypatch.setitem(PROVIDERS, "sasrec", Quick)
    train_collab(tiny(epochs=2, patience=2), two_communities())
    assert asked


def lengths_of_steps(rows: TrainingRows, batch_by: str, size: int) -> list[list[int]]:
    steps = rows.steps(batch_by, size, np.random.default_rng(0))
    assert sorted(np.concatenate(steps)) == list(range(rows.num_rows))  # every row once
    return [rows.length[step].tolist() for step in steps]


def test_a_step_holds_so_many_users_or_so_many_targets():
    sequences = uneven().sequences("train")
    users, prefixes = (
        TrainingRows.of(sequences, 7, layout, distributed.device()) for layout in ("positions", "prefixes")
    )
    sizes = [len(step) for step in lengths_of_steps(users, "users", 16)]
    assert sizes == [16, 16, users.num_users - 32]
    # The same users in the same steps, whatever their rows are.
    assert [sum(step) for step in lengths_of_steps(users, "users", 16)] == [
        len(step) for step in lengths_of_steps(prefixes, "users", 16)
    ]
    full = len(prefixes.length) // 20
    assert [len(step) for step in lengths_of_steps(prefixes, "targets", 20)][:full] == [20] * full
    steps = lengths_of_steps(users, "targets", 20)
    for before, step in enumerate(steps):
        start = sum(map(sum, steps[:before]))
        # A step ends with the row that completes its 20 targets.
        assert start + sum(step[:-1]) < 20 * (before + 1) <= start + sum(step) or before == len(steps) - 1


def test_steps_are_counted_over_epochs_of_different_length(monkeypatch):
    seen = []

    class Counting(SASRec):
        def loss(self, batch):
            seen.append((batch.step, batch.epoch))
            return super().loss(batch)

    monkeypatch.setitem(PROVIDERS, "sasrec", Counting)
    collab = train_collab(tiny(batch_by="targets", batch_size=30, epochs=4, select="last"), uneven())
    epochs = [row["epoch"] for row in collab.log for _ in range(row["steps"])]
    assert sorted(set(seen)) == list(enumerate(epochs))


def test_only_users_with_two_train_items_are_trained_on():
    data = interactions([[1, 2, 3], [4, 3, 2, 1], [5, 4, 3, 2, 1]], 5)
    rows = TrainingRows.of(data.sequences("train"), 12, "positions", torch.device("cpu"))
    shown = [row[row != 0].tolist() for batch in rows.batches(np.arange(2)) for row in batch.item]
    assert shown == [[4], [5, 4]]
    assert rows.num_targets == 3


def test_the_parts_a_model_reports_are_logged_as_means_per_target(monkeypatch):
    class Talking(SASRec):
        def loss(self, batch):
            loss = super().loss(batch)
            number = torch.tensor(float(loss.num_targets))
            return replace(loss, parts={"two": 2 * number, "pair": torch.stack([number, 3 * number])})

    monkeypatch.setitem(PROVIDERS, "sasrec", Talking)
    collab = train_collab(tiny(epochs=2, select="last"), cycle())
    assert [row["parts"] for row in collab.log] == [{"two": 2.0, "pair": [1.0, 3.0]}] * 2


def test_pooled_figures_are_made_of_the_sums_of_all_passes():
    sums = trainer.Sums()
    for total, count in ((6.0, 2.0), (0.0, 0.0), (1.0, 1.0)):
        figure = Pooled((torch.tensor(total), torch.tensor(count)), ratio)
        sums.add(Loss(total=torch.tensor(1.0), num_targets=5, parts={"figure": figure}))
    sums.add(Loss(total=torch.tensor(1.0), num_targets=5))
    assert sums.over(20) == {"train_loss": 0.2, "parts": {"figure": pytest.approx(7 / 3)}}


def test_nothing_to_learn_from_is_an_error_of_the_data():
    with pytest.raises(DataError, match="none of 2 users has two items in the train split"):
        train_collab(tiny(), interactions([[1, 2, 3], [3, 2, 1]], 3))


def test_a_split_without_validation_targets_needs_the_last_epoch():
    data = without(two_communities(), "valid")
    with pytest.raises(ConfigError, match=r"set train_collab\.select=last"):
        train_collab(tiny(), data)
    collab = train_collab(tiny(select="last"), data)
    assert collab.metrics["best_epoch"] == 3


def test_few_validation_targets_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger="llmrec"):
        train_collab(tiny(epochs=1), two_communities())
    assert "only 60 validation targets" in caplog.text


def test_a_model_that_is_no_better_than_popularity_is_warned_about(caplog):
    """Half of the users take item 1 first, and the others at validation."""
    rng = np.random.default_rng(0)
    others = [(rng.permutation(39)[:3] + 2).tolist() for _ in range(200)]
    lists = [[1, *own] if user % 2 else [*own[:2], 1, own[2]] for user, own in enumerate(others)]
    data = interactions(lists, 40)
    idle = TrainCollabConfig(epochs=1, learning_rate=1e-12)
    train_collab(idle, data)
    assert "of popularity alone" in caplog.text
    caplog.clear()
    train_collab(replace(idle, select="last"), data)
    train_collab(TrainCollabConfig(epochs=30, learning_rate=1e-2), cycle())
    assert "of popularity alone" not in caplog.text


@pytest.mark.parametrize("mask_seen", [True, False])
def test_popularity_is_ranked_among_the_items_that_the_model_was_ranked_among(mask_seen, caplog):
    """Users who come back to popular items, so that the two rankings of these differ."""
    lists = [[1, 2, 3 + user, 1, 2] if user % 2 else [2, 1, 3 + user, 2, 1] for user in range(20)]
    data = interactions(lists, 22)
    valid = data.targets("valid")
    ranking = rank_users(popularity(data), data, valid)
    masked, kept = (ndcg_at_k(rank, 10).mean() for rank in (ranking.rank, ranking.rank_seen_kept))
    assert abs(masked - kept) > 0.1
    own = masked if mask_seen else kept
    for better in (0.01, 0.0):
        found = {"valid_ndcg@10": own + better, "best_epoch": 1, "epochs": 2}
        train.warn_if_popularity_is_as_good(tiny(mask_seen=mask_seen), found, data, valid)
        assert ("of popularity alone" in caplog.text) == (better == 0)


def test_an_infinite_loss_is_named_as_such(monkeypatch):
    class Endless(SASRec):
        def loss(self, batch):
            loss = super().loss(batch)
            return replace(loss, total=loss.total + torch.inf)

    monkeypatch.setitem(PROVIDERS, "sasrec", Endless)
    with pytest.raises(TrainingError, match="the training loss became inf in epoch 1"):
        train_collab(tiny(epochs=1, select="last"), cycle())


def test_a_diverged_loss_names_the_setting_to_change():
    with pytest.raises(TrainingError, match=r"in epoch [12]; lower train_collab.learning_rate \(now 1e\+3"):
        train_collab(tiny(learning_rate=1e30, sasrec=replace(TINY, loss="bce")), cycle())


def test_an_infinite_gradient_of_the_last_step_never_reaches_weights_that_are_kept(monkeypatch):
    """Its loss is finite, and no later one tells of it."""

    class Steep(SASRec):
        def loss(self, batch):
            loss = super().loss(batch)
            endless = (self.norm.bias.sum() * 0).sqrt()  # 0, whose slope is infinite
            return replace(loss, total=loss.total + endless) if batch.step == 3 else loss

    monkeypatch.setitem(PROVIDERS, "sasrec", Steep)
    with pytest.raises(TrainingError, match=r"the gradient's norm became (nan|inf) in epoch 1; lower"):
        train_collab(tiny(epochs=1, select="last"), cycle())
    assert train_collab(tiny(epochs=1, select="last", batch_size=32), cycle()).log[0]["steps"] == 2


def test_items_never_trained_are_counted():
    collab = train_collab(tiny(epochs=1), interactions([[1, 2, 3, 4], [2, 1, 4, 3]], 6))
    assert collab.metrics["items_never_trained"] == 4


def test_items_that_only_stand_outside_every_row_were_never_trained():
    """Train items 1 2 3, 4 5 2 3 and 6: histories of 2 see the last three of a user at most, and one item has
    nothing to predict."""
    data = interactions([[1, 2, 3, 7, 8], [4, 5, 2, 3, 7, 8], [6, 7, 8]], 8)
    collab = train_collab(tiny(epochs=1, sasrec=replace(TINY, max_history=2)), data)
    assert collab.metrics["items_never_trained"] == len({4, 6, 7, 8})


def test_ready_made_vectors_are_taken_as_they_are_and_gaps_counted(tmp_path, caplog):
    data = interactions([[1, 2, 3, 4], [2, 1, 4, 3]], 4)
    vectors = [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]]
    file = tmp_path / "vectors.parquet"
    table = pa.table({"item_id": data.raw_ids, "vector": pa.array(vectors, pa.list_(pa.float32()))})
    pq.write_table(table, file)
    with caplog.at_level(logging.WARNING, logger="llmrec"):
        collab = train_collab(TrainCollabConfig(provider="precomputed", vectors=str(file)), data)
    assert collab.vectors.tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [5, 6]]
    norms = [sum(number**2 for number in row) ** 0.5 for row in collab.vectors[1:].tolist()]
    assert collab.metrics == {
        "items_without_vector": 1,
        "mean_vector_norm": pytest.approx(sum(norms) / 4, rel=1e-6),
    }
    assert "1 of 4 items have no vector" in caplog.text
    collab.save(tmp_path)
    loaded = CollabEmbeddings.load(tmp_path)
    assert loaded.provider == "precomputed"
    with pytest.raises(ArtifactMismatchError, match="no model to score with"):
        load_provider(loaded)


def test_weights_of_another_size_are_refused_by_name():
    collab = train_collab(tiny(epochs=1), two_communities())
    wrong = replace(collab, model={**collab.model, "inner_dim": 4})
    with pytest.raises(ArtifactMismatchError, match="inner"):
        load_provider(wrong)


def test_half_precision_learns_as_much_and_ranks_in_full(monkeypatch):
    data = two_communities()
    seen = []
    real = trainer.validate

    def watched(*arguments, **settings):
        seen.append(torch.is_autocast_enabled(distributed.device().type))
        return real(*arguments, **settings)

    monkeypatch.setattr(trainer, "validate", watched)
    found = {
        precision: train_collab(tiny(epochs=12, learning_rate=0.03, precision=precision), data)
        for precision in ("float32", "tf32", "bfloat16")
    }
    assert not any(seen)
    half, full = (found[name].metrics["valid_ndcg@10"] for name in ("bfloat16", "float32"))
    assert half == pytest.approx(full, abs=0.05)
    assert found["bfloat16"].vectors.dtype == np.float32
    assert not np.array_equal(found["bfloat16"].vectors, found["float32"].vectors)
    if distributed.device().type == "cpu":
        assert np.array_equal(found["tf32"].vectors, found["float32"].vectors)
