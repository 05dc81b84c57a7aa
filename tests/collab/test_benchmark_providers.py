"""The benchmark of sequence models runs, trains the same targets in both layouts and prints what it says."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tool import ended, load
from worlds import cycle

from llmrec.collab.gmvae import GMVAE
from llmrec.collab.rows import TrainingRows
from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.distributed import device
from llmrec.pipeline import run_stage


@pytest.fixture(scope="module")
def tool():
    return load("benchmark_providers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    market = SampleMarketConfig(num_users=60, num_items=96, num_interests=8, max_length=8)
    folder = tmp_path_factory.mktemp("bench") / "prepare_data"
    run_stage(prepare_data, PrepareDataConfig(market=market), (), folder)
    return folder


def test_both_layouts_hold_the_same_targets(tool):
    data = cycle()
    rows, targets = tool.prefix_rows(data, 50)
    assert rows.shape == (len(targets), 50)
    ours = TrainingRows.of(data.sequences("train"), 50, "positions", device())
    assert ours.num_targets == len(targets)
    found = sorted(
        (tuple(shown[: place + 1]), wanted)
        for batch in ours.batches(np.arange(ours.num_rows))
        for shown, target in zip(batch.item.tolist(), batch.target.tolist())
        for place, wanted in enumerate(target)
        if wanted
    )
    assert found == sorted((tuple(row[row > 0].tolist()), int(item)) for row, item in zip(rows, targets))


@pytest.fixture
def run(tool, capsys):
    return functools.partial(ended, tool.main, capsys)


def test_layouts_are_compared_as_a_ratio(run, folder):
    code, text, _ = run("layout", "--prepare-data", str(folder), "--steps", "1", "--rounds", "1")
    assert code == 0
    for name in ("ours", "softmax alone"):
        assert re.search(rf"{name} / per prefix: median \d+\.\d\d, min", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layout", "--providers", "gru4rec"], "unrecognized arguments: --providers gru4rec"),
        (["layout", "--provider", "svae"], "invalid choice: 'svae'"),
        (["layout", "--provider", "bert4rec"], "invalid choice: 'bert4rec'"),
        (["layout", "--rounds", "0"], "at least 1, got '0'"),
        (["epochs", "--provider", "gru4rec"], "unrecognized arguments: --provider gru4rec"),
        (["epochs", "--steps", "-1"], "expected one argument|at least 1, got '-1'"),
        (["epochs", "--warm-up", "x"], "at least 0, got 'x'"),
        (["lengths", "--prepare-data"], "unrecognized arguments: --prepare-data"),
        (["lengths", "--providers", "none"], "invalid choice: 'none'"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused_before_anything_is_loaded(arguments, words, run):
    given = [] if arguments[0] == "lengths" else ["--prepare-data", "no folder"]
    code, text, said = run(arguments[0], *given, *arguments[1:])
    assert code == 2 and not text and re.search(words, said), said


def test_every_provider_is_timed_and_the_steps_that_were(run, folder):
    names = ["sasrec", "mind", "moe"]
    given = ["epochs", "--prepare-data", str(folder), "--steps", "16", "--warm-up", "0"]
    code, text, _ = run(*given, "--providers", *names)
    lines = [line.split() for line in text.splitlines()]
    assert code == 0 and [line[:2] for line in lines[1:4]] == [
        ["sasrec", "positions"],
        ["mind", "prefixes"],
        ["moe", "positions"],
    ]
    assert lines[0][3:5] == ["steps", "timed"] and {tuple(line[3:5]) for line in lines[1:4]} == {("1", "1")}


def test_an_epoch_costs_its_steps_however_few_places_a_model_masks(tool, run, folder, monkeypatch):
    """BERT4Rec predicts a fraction of an epoch's items: its steps were counted several times over."""
    clock = itertools.count()
    monkeypatch.setattr(tool, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    given = ["epochs", "--prepare-data", str(folder), "--steps", "99", "--warm-up", "0"]
    code, text, _ = run(*given, "--providers", "bert4rec", "sasrec")
    lines = {line.split()[0]: line.split() for line in text.splitlines()[1:3]}
    assert code == 0 and [lines[name][5] for name in ("bert4rec", "sasrec")] == ["1.00", "1.00"]


def test_steps_are_of_the_epoch_that_is_asked_for(run, folder, monkeypatch):
    """SIGMA-GMVAE is cheaper before its hard interests begin."""
    seen, loss = set(), GMVAE.loss
    monkeypatch.setattr(GMVAE, "loss", lambda self, batch: seen.add(batch.epoch) or loss(self, batch))
    given = ["epochs", "--prepare-data", str(folder), "--steps", "1", "--providers", "gmvae"]
    for epoch in (1, 40):
        assert run(*given, "--epoch", str(epoch))[0] == 0 and seen == {epoch}
        seen.clear()


def test_lengths_say_how_many_positions_ran(run):
    code, text, _ = run("lengths", "--positions", "100", "--rounds", "1", "--providers", "gru4rec", "mamba")
    assert code == 0 and len(text.splitlines()) == 5
    assert "100 / 200 / 1,000 positions a pass" in text


def test_rows_of_a_comparison_are_timed_as_it_sets_them(run, folder, tmp_path):
    recipe = tmp_path / "some.py"
    (tmp_path / "beside_it.py").write_text("SIZE = 16\n")
    recipe.write_text(
        "from beside_it import SIZE\n"
        "from llmrec.collab.config import TrainCollabConfig\n"
        "def rows():\n"
        "    small = TrainCollabConfig(batch_by='targets', batch_size=SIZE)\n"
        "    return {'large': TrainCollabConfig(), 'small': small}\n"
    )
    given = ["epochs", "--prepare-data", str(folder), "--steps", "1", "--comparison"]
    code, text, _ = run(*given, str(recipe))
    steps = {line.split()[0]: int(line.split()[3]) for line in text.splitlines()[1:3]}
    assert code == 0 and steps["large"] == 1 < steps["small"]
    (tmp_path / "broken.py").write_text("def rows(:\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "other.py").write_text("def rows():\n    return {'a': 1}\n")
    for wrong, words in (
        ([str(recipe), "--providers", "none"], "among large, small"),
        (["no.py"], "no.py: no such recipe"),
        ([str(tmp_path / "broken.py")], "cannot be loaded: .*line 1"),
        ([str(tmp_path / "empty.py")], "defines no function `rows`"),
        ([str(tmp_path / "other.py")], "row a must be a TrainCollabConfig .*got int"),
    ):
        code, text, said = run(*given, *wrong)
        assert code == 2 and not text and re.search(f"error: .*{words}", said), said


def test_epochs_are_timed_in_each_precision(run, folder):
    code, text, _ = run(
        *("epochs", "--prepare-data", str(folder), "--steps", "1", "--providers", "sasrec"),
        *("--precision", "float32", "bfloat16"),
    )
    assert code == 0 and len(re.findall(r"^sasrec (float32|bfloat16) +positions ", text, re.M)) == 2
