"""The benchmark runs, compares like with like, and prints ratios and the machine."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys

import pytest
import torch
from tool import TOOLS, ended, load
from worlds import cycle

from llmrec.pipeline import seal
from llmrec.running import Spent
from llmrec.stage_changes import describe_stage


@pytest.fixture(scope="module")
def tool():
    return load("benchmark_finetune")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    from llmrec.data.config import PrepareDataConfig

    folder = tmp_path_factory.mktemp("prepare_data")
    cycle(num_users=40).save(folder)
    seal(folder, describe_stage("prepare_data", PrepareDataConfig(), ()), Spent())
    return str(folder)


@pytest.fixture
def run(tool, capsys):
    return functools.partial(ended, tool.main, capsys)


@pytest.fixture
def engine(capsys):
    return functools.partial(ended, load("benchmark_engine").main, capsys)


@pytest.mark.parametrize(("verb", "users"), [("packing", "20"), ("evaluation", "20"), ("packing", "5000")])
def test_both_ways_come_to_the_same_and_the_ratio_is_printed(verb, users, run, prepared):
    more = ["--batch-size", "64"] if verb == "packing" else []
    size = ["--users", users, "--rounds", "1", "--width", "16", "--layers", "1"]
    code, text, said = run(verb, "--prepare-data", prepared, *size, *more)
    assert code == 0, said
    values = re.findall(r"(?:mean loss|mean rank) ([\d.]+)", text)
    first, second = values[:2]
    assert float(first) == pytest.approx(float(second), rel=1e-3)
    assert re.search(r"median \d+\.\d\d, \d", text) and "torch" in text
    assert f"{min(int(users), 40)} users" in text


def test_the_catalogue_runs_small(run):
    code, text, said = run("catalogue", "--items", "3000", "--width", "16", "--layers", "1")
    assert code == 0 and text.count("peak memory so far") == 5, said


def test_the_engine_runs_small(engine, prepared, tmp_path):
    out = tmp_path / "rows.json"
    some = ["--steps", "2", "--out", str(out), "--only", "16 targets", "64, 8-bit states"]
    small = ["--shape", "tiny", "--content-width", "8", "--users", "8"]
    code, text, said = engine("--prepare-data", prepared, *small, *some)
    assert code == 0, said
    rows = json.loads(out.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["16 targets", "64, 8-bit states"]
    assert all(row["tokens_per_second"] > 0 and row["seconds_per_epoch"] > 0 for row in rows)
    memory = "peak_gb" if torch.cuda.is_available() else "peak_gb_so_far"
    assert all(row["steps"] == 2 and row["users_ranked"] == 8 and memory in row for row in rows)
    assert text.count(f"{memory} ") == 2 and all(row["evaluation_seconds"] >= 0 for row in rows)
    code, text, said = engine(
        "--prepare-data", prepared, *small[:-1], "0", "--steps", "1", "--only", "64 targets"
    )
    assert code == 0 and "users_ranked 0" in text and "evaluation_seconds None" in text, said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["catalogue", "--rounds", "3"], "unrecognized arguments: --rounds 3"),
        (["catalogue", "--items", "99"], "error: --items must be at least 100"),
        (["packing", "--users", "0"], "at least 1, got '0'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(arguments, words, run):
    given = [] if arguments[0] == "catalogue" else ["--prepare-data", "no folder"]
    code, text, said = run(arguments[0], *given, *arguments[1:])
    assert code == 2 and not text and words in said, said


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("no/such/folder/rows.json", "no/such/folder: no such folder; make it"),
        (__file__, "exists; give another"),
    ],
)
def test_where_the_engines_rows_cannot_be_written_is_said_first(out, words, engine):
    code, text, said = engine("--prepare-data", "no folder", "--out", out)
    assert code == 2 and not text and words in said, said


@pytest.mark.parametrize("name", ["providers", "finetune", "engine", "semantic_ids", "inference"])
def test_help_is_there_at_once(name):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['benchmark_{name}.py', '--help']\n"
        f"sys.path.insert(0, {str(TOOLS)!r})\n"  # where Python looks first while a script runs
        "try:\n"
        f"    runpy.run_path({str(TOOLS / f'benchmark_{name}.py')!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    assert not left.code\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'accelerate', 'datasets', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOOLS.parent)
    assert done.returncode == 0 and not done.stderr, done.stderr
