"""The tools that measure a recommender run and print what they promise."""

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from tiny_recipe import tiny
from tool import TOOLS, ended, load
from worlds import interactions

from llmrec.data.config import PrepareDataConfig
from llmrec.errors import ConfigError, StoppedError

SMALL = ["--items", "300", "--width", "16", "--layers", "1", "--content-width", "8", "--cpu"]


@pytest.fixture
def run(capsys):
    return functools.partial(ended, load("benchmark_inference").main, capsys)


def test_latency_and_load_small(run):
    code, text, said = run("latency", *SMALL, "--users", "64", "--rounds", "1")
    assert code == 0, said
    assert (
        re.search(r"plain / ours, one user: median \d+\.\d\d", text) and "users/s" in text and "torch" in text
    )
    code, text, said = run("load", *SMALL, "--seconds", "2", "--clients", "4")
    assert code == 0 and re.search(r"right: 200 \d", text) and "p95" in text, said
    assert not re.search(r"right: (?!200)|wrong: 5", text), text


def test_fewer_users_than_are_asked_about_together_leave_that_line_out(run):
    code, text, said = run("latency", *SMALL, "--users", "5")
    assert code == 0 and "nan" not in text, said
    assert "64 users together: not measured, as --users is 5" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["latency", "--package", "there", "--items", "9"], "--items: of random weights"),
        (["load", "--package", "there", "--content-width", "9"], "--content-width: of random weights"),
        (["load", "--seconds", "0"], "at least 1, got '0'"),
        (["load", "--rounds", "2"], "unrecognized arguments: --rounds"),
        (["latency", "--clients", "2"], "unrecognized arguments: --clients"),
        (["latency", *SMALL, "--items", "12"], "error: 12 items are too few"),
    ],
)
def test_what_has_no_effect_or_sense_is_refused(arguments, words, run):
    code, text, said = run(*arguments)
    assert code == 2 and not text and words in said, said


def test_only_right_answers_count_and_no_error_silences_a_client():
    crowd = load("benchmark_inference").Crowd([["a"]], 1)

    def failing(error):
        def post():
            raise error

        return post

    for status in (200, 503):
        crowd.ask(lambda status=status: httpx.Response(status), bad=False)
    crowd.ask(lambda: httpx.Response(422), bad=True)
    for error in (httpx.ReadTimeout("late"), httpx.ConnectError("no one"), httpx.ReadError("gone")):
        crowd.ask(failing(error), bad=False)
    assert dict(crowd.statuses) == {
        "right: 200": 1, "right: 503": 1, "wrong: 422": 1,
        "right: ReadTimeout": 1, "right: ConnectError": 1, "right: broken off": 1,
    }  # fmt: skip
    assert len(crowd.taken) == 1


def test_an_interrupt_ends_the_load_at_once_and_says_so_alone():
    command = [sys.executable, str(TOOLS / "benchmark_inference.py"), "load", *SMALL, "--seconds", "300"]
    path = os.pathsep.join([str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes) as process:
        assert process.stdout.readline() == "300 items, asked by 16 clients for 300 s\n"
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert process.returncode == 130 and said.splitlines() == ["interrupted"], said


def test_withheld_items_are_in_no_table_and_users_are_those_who_end_with_one(tmp_path):
    """Leave-one-out cannot split the third user, who has two items left."""
    cold = load("evaluate_cold_items")
    data = interactions([[1, 2, 3, 4], [2, 3, 1], [4, 1, 2]], 4)
    out = np.array([False, False, False, False, True])
    assert cold.rows_left(data, out, "global_time").sum() == 8
    cold.write_rest(data, cold.rows_left(data, out, "leave_one_out"), tmp_path)
    rows = (tmp_path / "interactions.csv").read_text().splitlines()[1:]
    assert len(rows) == 6 and not any(row.split(",")[1] == data.raw_ids[3] for row in rows)
    assert len((tmp_path / "items.csv").read_text().splitlines()) == 1 + 3
    raw = data.raw_ids
    assert cold.cold_users(data, out, set(raw[:3])) == [([raw[0], raw[1], raw[2]], raw[3])]
    assert cold.withhold(data, 0.5, 0)[1:].sum() == 2 and not cold.withhold(data, 0.5, 0)[0]


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """The tool with its recipe's file; it ends where training would begin."""
    tool = load("evaluate_cold_items")
    (tmp_path / "tiny.py").write_text("from tiny_recipe import tiny\n\n\ndef recipe():\n    return tiny()\n")
    own = tool.run

    def without_training(recipe, run_dir, until):
        if until == "finetune":
            raise StoppedError("training would begin")
        return own(recipe, run_dir, until=until)

    monkeypatch.setattr(tool, "run", without_training)
    return tool


def said(cold, tmp_path, capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as left:
        cold.main([str(tmp_path / "tiny.py"), "--run-dir", str(tmp_path / "run"), *options])
    assert left.value.code
    return capsys.readouterr().err.splitlines()[-1]


def test_another_draw_needs_another_folder_and_half_written_tables_are_written_again(cold, tmp_path, capsys):
    """Tables of one draw, and targets of another, would be items that were trained on."""
    begin = ("--rate", "0.2", "--seed", "0")
    assert said(cold, tmp_path, capsys, *begin) == "training would begin"
    rest = tmp_path / "run" / "rest"
    whole = (rest / "interactions.csv").read_text()
    assert said(cold, tmp_path, capsys, *begin) == "training would begin"
    for option, drawn in (
        (("--seed", "1"), "seed 0, got seed 1"),
        (("--rate", "0.3"), "rate 0.2, got rate 0.3"),
    ):
        line = said(cold, tmp_path, capsys, *begin, *option)
        assert line.startswith("error: ") and drawn in line and "another --run-dir" in line
    (rest / "draw.json").unlink()
    (rest / "interactions.csv").write_text(whole[: len(whole) // 2])
    assert said(cold, tmp_path, capsys, *begin) == "training would begin"
    assert (rest / "interactions.csv").read_text() == whole


def test_items_that_are_to_be_new_must_not_have_been_trained_on(cold, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cold, "rows_left", lambda data, out, split: np.ones(len(data.item), dtype=bool))
    line = said(cold, tmp_path, capsys, "--rate", "0.2")
    assert "knows 18 of the items that are to be new" in line, "one of 19 nobody had"


def test_the_rest_is_split_as_the_recipe_says_and_filtered_no_more(cold, tmp_path):
    """Items with fewer than five interactions left stay, as do places that were given as times."""
    asked = PrepareDataConfig(
        source="table", interactions="x.csv", k_core=7, min_rating=3.0, rating_column="rating",
        split="global_time", valid_rate=0.2, test_rate=0.3, ties="shuffle", seed=3,
    )  # fmt: skip
    data = interactions([[1, 2, 3, 4]], 4)
    found = cold.on_the_rest(replace(tiny(), prepare_data=asked), data, tmp_path).prepare_data
    assert (found.split, found.valid_rate, found.test_rate) == ("global_time", 0.2, 0.3)
    assert found.k_core == 0 and found.ties == "file" and found.timestamp_column == "timestamp"
    data.summary["times_are_positions"] = True
    assert cold.on_the_rest(tiny(), data, tmp_path).prepare_data.timestamp_column is None
    cold.write_rest(data, np.ones(4, dtype=bool), tmp_path)
    assert (tmp_path / "interactions.csv").read_text().splitlines()[0] == "user_id,item_id"


def test_a_draw_that_leaves_nobody_to_rank_is_told_before_training(cold, tmp_path):
    data, options = interactions([[1, 2, 3, 4], [4, 2, 3]], 4), argparse.Namespace(rate=0.1, seed=0)
    for out in ([0, 1, 0, 0, 0], [0, 0, 1, 1, 1]):
        with pytest.raises(ConfigError, match="nobody to rank; give a rate further from 0 and 1"):
            cold.train(tiny(), data, np.array(out, dtype=bool), tmp_path, options)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"], "and nothing is written"
    with pytest.raises(SystemExit) as left:
        cold.main(["tiny.py", "--seed", "-1"])
    assert left.value.code == 2


def test_a_package_of_an_earlier_training_is_not_used(cold, tmp_path, monkeypatch):
    trained = iter("aab")
    monkeypatch.setattr(cold, "read_manifest", lambda *_: {"files": {"x": {"sha256": next(trained)}}})
    monkeypatch.setattr(cold, "package_run", lambda _, folder: folder.mkdir() or folder)
    first, again, later = (cold.packaged(tmp_path) for _ in range(3))
    assert first == again != later and later.is_dir()


def test_chance_among_few_items():
    """Of two items in random order the target is first or second: (1 + 1 / log2(3)) / 2."""
    cold = load("evaluate_cold_items")
    assert cold.by_chance(2) == (1.0, pytest.approx((1 + 0.63092975) / 2))
    assert cold.by_chance(1) == (1.0, 1.0)
    assert cold.by_chance(60) == (10 / 60, pytest.approx(4.5435595 / 60))


@pytest.mark.slow
def test_cold_items_from_training_to_table(tmp_path, capsys):
    cold = load("evaluate_cold_items")
    recipe = tmp_path / "tiny.py"
    recipe.write_text("from tiny_recipe import tiny\n\n\ndef recipe():\n    return tiny()\n")
    with pytest.raises(SystemExit) as left:
        cold.main([str(recipe), "--rate", "0.2", "--run-dir", str(tmp_path / "run")])
    assert not left.value.code, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert "new ones" in lines[0] and [line[:7] for line in lines[3:]] == ["mme_sid", "popular", "chance "]
    assert all(0 <= float(value) <= 1 for line in lines[3:] for value in line.split()[-4:])
