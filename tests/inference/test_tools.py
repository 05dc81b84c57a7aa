"""The tools that measure a recommender run and print what they promise."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tool import load
from worlds import interactions


def test_latency_and_load_small(packaged, capsys):
    benchmark = load("benchmark_inference")
    small = ["--items", "300", "--width", "16", "--layers", "1", "--content-width", "8", "--cpu"]
    benchmark.main(["latency", *small, "--users", "64", "--rounds", "1"])
    text = capsys.readouterr().out
    assert (
        re.search(r"plain / ours, one user: median \d+\.\d\d", text) and "users/s" in text and "torch" in text
    )
    benchmark.main(["load", *small, "--seconds", "2", "--clients", "4"])
    text = capsys.readouterr().out
    assert re.search(r"right: 200 \d", text) and "p95" in text
    assert not re.search(r"right: (?!200)|wrong: 5", text), text


def test_withheld_items_are_in_no_table_and_users_are_those_who_end_with_one(tmp_path):
    cold = load("evaluate_cold_items")
    data = interactions([[1, 2, 3, 4], [2, 3, 1], [4, 1, 2]], 4)
    out = np.array([False, False, False, False, True])
    cold.write_rest(data, out, tmp_path)
    rows = (tmp_path / "interactions.csv").read_text().splitlines()[1:]
    assert len(rows) == 8 and not any(row.split(",")[1] == data.raw_ids[3] for row in rows)
    assert len((tmp_path / "items.csv").read_text().splitlines()) == 1 + 3
    raw = data.raw_ids
    assert cold.cold_users(data, out, set(raw[:3])) == [([raw[0], raw[1], raw[2]], raw[3])]
    assert cold.withhold(data, 0.5, 0)[1:].sum() == 2 and not cold.withhold(data, 0.5, 0)[0]


@pytest.mark.slow
def test_cold_items_from_training_to_table(tmp_path, capsys):
    cold = load("evaluate_cold_items")
    recipe = tmp_path / "tiny.py"
    recipe.write_text("from tiny_recipe import tiny\n\n\ndef recipe():\n    return tiny()\n")
    with pytest.raises(SystemExit) as left:
        cold.main([str(recipe), "--rate", "0.2", "--run-dir", str(tmp_path / "run")])
    assert not left.value.code, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert "new ones" in lines[0] and [line[:7] for line in lines[3:]] == ["MME-SID", "popular", "chance "]
    assert all(0 <= float(value) <= 1 for line in lines[3:] for value in line.split()[-4:])
