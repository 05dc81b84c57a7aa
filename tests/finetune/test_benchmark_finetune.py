"""The benchmark runs, compares like with like, and prints ratios and the machine."""

from __future__ import annotations

import json
import re

import pytest
from tool import load
from worlds import cycle

from llmrec.pipeline import describe_stage, seal


@pytest.fixture(scope="module")
def tool():
    return load("benchmark_finetune")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    from llmrec.data.config import PrepareDataConfig

    folder = tmp_path_factory.mktemp("prepare_data")
    cycle(num_users=40).save(folder)
    seal(folder, describe_stage("prepare_data", PrepareDataConfig(), ()), 0.0)
    return str(folder)


@pytest.mark.parametrize("verb", ["packing", "evaluation"])
def test_both_ways_come_to_the_same_and_the_ratio_is_printed(verb, tool, prepared, capsys):
    more = ["--batch-size", "64"] if verb == "packing" else []
    size = ["--users", "20", "--rounds", "1", "--width", "16", "--layers", "1"]
    tool.main([verb, "--prepare-data", prepared, *size, *more])
    text = capsys.readouterr().out
    values = re.findall(r"(?:mean loss|mean rank) ([\d.]+)", text)
    first, second = values[:2]
    assert float(first) == pytest.approx(float(second), rel=1e-3)
    assert re.search(r"median \d+\.\d\d, \d", text) and "torch" in text


def test_the_catalogue_and_the_engine_run_small(tool, prepared, capsys, tmp_path):
    tool.main(["catalogue", "--items", "3000", "--width", "16", "--layers", "1"])
    assert capsys.readouterr().out.count("peak memory so far") == 5
    out = tmp_path / "rows.json"
    some = ["--steps", "2", "--out", str(out), "--only", "16 targets", "64, 8-bit states"]
    small = ["--shape", "tiny", "--content-width", "8", "--users", "8"]
    tool.main(["engine", "--prepare-data", prepared, *small, *some])
    rows = json.loads(out.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["16 targets", "64, 8-bit states"]
    assert all(row["tokens_per_second"] > 0 and row["seconds_per_epoch"] > 0 for row in rows)
