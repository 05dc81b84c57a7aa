"""Figures that are shown while a stage runs: the same as in its log, wherever they go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from tiny_recipe import tiny
from worlds import cycle

from llmrec import pipeline, tracking
from llmrec.cli import main as llmrec
from llmrec.collab import train as collab
from llmrec.collab import trainer
from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.errors import ConfigError
from llmrec.files import read_json, read_jsonl
from llmrec.recipe import main


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch):
    """What a command chooses ends with the test."""
    monkeypatch.setenv(tracking.VARIABLE, "")


def config(**changed) -> TrainCollabConfig:
    model = SASRecConfig(embed_dim=8, num_layers=1, num_heads=1, inner_dim=8)
    return TrainCollabConfig(sasrec=model, epochs=4, **changed)


def data():
    made = cycle(num_users=30)
    object.__setattr__(made, "_manifest", {"files": {}})
    return made


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_logs_of_a_run_hold(tmp_path):
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(tmp_path), "--track", "tensorboard"])
    assert left.value.code == 0
    assert os.environ[tracking.VARIABLE] == "tensorboard"  # for the processes that it starts
    for stage, step, name in (
        ("train_collab", "epoch", "train_loss"),
        ("train_collab", "epoch", "valid_ndcg@10"),
        ("learn_semantic_ids", "epoch", "loss"),
        ("finetune", "step", "loss"),
        ("finetune", "step", "valid_recall@10"),
    ):
        rows = [row for row in read_jsonl(tmp_path / stage / "log.jsonl") if name in row]
        wanted = [(row[step], pytest.approx(row[name], rel=1e-6)) for row in rows]
        assert scalars(tmp_path / "tensorboard" / stage)[f"{stage}/{name}"] == wanted
    metrics = read_json(tmp_path / "evaluate" / "metrics.json")["rows"]
    shown = scalars(tmp_path / "tensorboard" / "evaluate")
    for method, row in metrics.items():
        for name, value in row.items():
            assert shown[f"evaluate/{method}/{name}"] == [(0, pytest.approx(value, rel=1e-6))]


def test_tensorboard_shows_one_run_of_a_stage_and_what_was_kept_of_it(tmp_path):
    def tell(rows: list[dict], steps: range) -> list[int]:
        tracker = tracking.made("tensorboard", tmp_path / "train_collab", rows)
        tracker.start()
        for step in steps:
            tracker.log({"loss": 1.0}, step)
        tracker.finish()
        return [step for step, _ in scalars(tmp_path / "tensorboard" / "train_collab")["loss"]]

    assert tell([], range(1, 5)) == [1, 2, 3, 4]
    assert tell([{"epoch": 2}], range(3, 5)) == [1, 2, 3, 4], "epochs 3 and 4 were lost, and came again"
    assert tell([], range(1, 3)) == [1, 2], "another run of the stage"


def test_lines_grow_while_a_model_trains_and_begin_with_those_of_the_run_before(tmp_path, monkeypatch):
    folder = tmp_path / "train_collab"
    lines = tmp_path / ".train_collab.unfinished" / tracking.LINES
    real, seen = trainer.train_epoch, []

    def watched(*arguments):
        seen.append([row["epoch"] for row in read_jsonl(lines)])
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_epoch", watched)
    # A checkpoint after every epoch, so that the second run begins with the fourth.
    settings = config(save_every_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_stage(collab.train_collab, settings, (data(),), folder)
    assert [row["epoch"] for row in read_jsonl(lines)] == [1, 2, 3]
    with lines.open("a") as file:
        file.write(json.dumps({"epoch": "of a run whose checkpoint came before it"}) + "\n")
    pipeline.run_stage(collab.train_collab, settings, (data(),), folder)
    assert seen == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3]]
    assert len(read_jsonl(folder / tracking.LINES)) == 4
    assert not lines.parent.exists()


class Tracker:
    """One of accelerate's, to see what it is given."""

    made: ClassVar[list[Tracker]] = []

    def __init__(self, project: str, **given) -> None:
        self.project, self.given, self.name = project, given, os.environ[tracking.VARIABLE]
        self.settings: dict = {}
        self.rows: list[tuple[dict, int]] = []
        self.open = False
        Tracker.made.append(self)

    def start(self) -> None:
        self.open = True

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int) -> None:
        assert self.open
        self.rows.append((values, step))

    def finish(self) -> None:
        self.open = False


@pytest.mark.parametrize(
    ("name", "given", "metric"),
    [
        ("wandb", {"name": "run/train_collab", "group": "run"}, "train_collab/valid_ndcg@10"),
        ("trackio", {"name": "run/train_collab", "group": "run"}, "train_collab/valid_ndcg@10"),
        ("mlflow", {"run_name": "run/train_collab"}, "train_collab/valid_ndcg_at_10"),
        ("swanlab", {"experiment_name": "run/train_collab"}, "train_collab/valid_ndcg@10"),
    ],
)
def test_other_trackers_get_settings_and_figures_and_are_closed(name, given, metric, tmp_path, monkeypatch):
    from accelerate import tracking as of_accelerate

    monkeypatch.setenv(tracking.VARIABLE, name)
    monkeypatch.setitem(of_accelerate.LOGGER_TYPE_TO_CLASS, name, Tracker)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(Tracker, "made", [])
    folder = tmp_path / "run" / "train_collab"
    pipeline.run_stage(collab.train_collab, config(), (data(),), folder)
    (tracker,) = Tracker.made
    assert (tracker.project, tracker.given, tracker.open) == ("llmrec", given, False)
    assert tracker.settings["sasrec.embed_dim"] == 8
    assert tracker.settings["decay_every_epochs"] == "None"
    log = read_jsonl(folder / "log.jsonl")
    assert [(row[metric], step) for row, step in tracker.rows] == [
        (row["valid_ndcg@10"], row["epoch"]) for row in log
    ]


def test_numbers_of_groups_and_lists_have_their_place_in_their_names():
    row = {"epoch": 1, "parts": {"kl": 0.5, "used": [0.25, 1]}, "note": "text", "flag": True, "none": None}
    assert dict(tracking.numbers(row)) == {
        "epoch": 1,
        "parts/kl": 0.5,
        "parts/used/0": 0.25,
        "parts/used/1": 1,
    }


@pytest.mark.parametrize("command", ["recipe", "stage", "variable"])
def test_a_tracker_that_is_not_there_is_told_before_anything_is_done(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda package: None)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        if command == "recipe":
            main(tiny, ["--run-dir", str(out), "--track", "wandb"])
        elif command == "variable":
            monkeypatch.setenv(tracking.VARIABLE, "wandb")
            main(tiny, ["--run-dir", str(out)])
        else:
            folder = str(tmp_path)
            llmrec(["train_collab", "--prepare-data", folder, "--out", str(out), "--track", "wandb"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --track wandb needs its package: pip install wandb\n"
    assert not out.exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="tensorboard, wandb, trackio, mlflow, swanlab, got 'tensorbord'"):
        tracking.choose(["tensorbord"])


def test_outside_of_a_stage_nothing_is_tracked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracking.choose(["tensorboard"])
    tracking.begin()
    tracking.log({"loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())


def test_a_tracker_is_closed_when_training_fails(tmp_path):
    closed = []
    track = tracking.Track(stage="s", folder=tmp_path / "s", unfinished=tmp_path / ".s", config=config())
    track.trackers["mine"] = SimpleNamespace(finish=lambda: closed.append(1))
    with pytest.raises(KeyError), tracking.tracking(track):
        raise KeyError
    assert closed == [1]


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_ends_no_training(where, tmp_path, monkeypatch, caplog):
    from accelerate import tracking as of_accelerate

    def broken(*_):
        raise RuntimeError("no network")

    kind = type("Broken", (Tracker,), {where: broken})
    monkeypatch.setenv(tracking.VARIABLE, "wandb")
    monkeypatch.setitem(of_accelerate.LOGGER_TYPE_TO_CLASS, "wandb", kind)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda package: package)
    folder = tmp_path / "run" / "train_collab"
    if where == "start":  # before anything is trained
        with pytest.raises(ConfigError, match="--track wandb cannot start: RuntimeError: no network"):
            pipeline.run_stage(collab.train_collab, config(), (data(),), folder)
        return
    pipeline.run_stage(collab.train_collab, config(), (data(),), folder)
    assert len(read_jsonl(folder / "log.jsonl")) == 4
    assert caplog.text.count("--track wandb failed, and is left out from here on: RuntimeError: no netw") == 1
