"""The benchmark of sequence models runs, trains the same targets in both layouts and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tool import load
from worlds import cycle

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


def test_layouts_are_compared_as_a_ratio(tool, folder, capsys):
    tool.main(["layout", "--prepare-data", str(folder), "--steps", "1", "--rounds", "1"])
    text = capsys.readouterr().out
    for name in ("ours", "softmax alone"):
        assert re.search(rf"{name} / per prefix: median \d+\.\d\d, min", text)
    with pytest.raises(SystemExit, match="mind is not a causal model"):
        tool.main(["layout", "--prepare-data", str(folder), "--provider", "mind"])


def test_every_provider_is_timed(tool, folder, capsys):
    names = ["sasrec", "mind", "moe"]
    tool.main(["epochs", "--prepare-data", str(folder), "--steps", "1", "--providers", *names])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["sasrec", "positions"],
        ["mind", "prefixes"],
        ["moe", "positions"],
    ]
    tool.main(["lengths", "--positions", "100", "--rounds", "1", "--providers", "gru4rec", "mamba"])
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_rows_of_a_comparison_are_timed_as_it_sets_them(tool, folder, capsys, tmp_path):
    recipe = tmp_path / "some.py"
    recipe.write_text(
        "from llmrec.collab.config import TrainCollabConfig\n"
        "def rows():\n"
        "    small = TrainCollabConfig(batch_by='targets', batch_size=16)\n"
        "    return {'large': TrainCollabConfig(), 'small': small}\n"
    )
    given = ["epochs", "--prepare-data", str(folder), "--steps", "1", "--comparison"]
    tool.main([*given, str(recipe)])
    steps = {line.split()[0]: int(line.split()[3]) for line in capsys.readouterr().out.splitlines()[1:3]}
    assert steps["large"] == 1 < steps["small"]
    for wrong, words in (
        ([str(recipe), "--providers", "none"], "among large, small"),
        (["no.py"], "no recipe"),
    ):
        with pytest.raises(SystemExit, match=words):
            tool.main([*given, *wrong])
