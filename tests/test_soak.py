"""Training and evaluating many times in one process: tools/soak.py in short."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tool import load


@pytest.fixture(autouse=True)
def short_collections():
    """Collecting garbage after every cycle takes long among the objects of a whole test session."""
    gc.freeze()
    yield
    gc.unfreeze()


CYCLES = """
import dataclasses, json, sys
from pathlib import Path
sys.path[:0] = {paths}
from tool import load
tool = load("soak")
found = tool.soak(tool.whole_cycle(Path(sys.argv[1])), 4)
print(json.dumps([dataclasses.asdict(one) for one in found]))
"""


def test_cycles_leave_no_file_and_no_folder_behind(tmp_path):
    """In a process of its own: pools of threads that other tests have started fill up whenever they like."""
    script = CYCLES.format(paths=[str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4
    assert found[-1]["files"] == found[1]["files"]
    # A pool of libraries' may start one more at any time; two cycles that leave one each have two more.
    assert found[-1]["threads"] <= found[1]["threads"] + 1
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_open_files_are_counted():
    tool = load("soak")
    held = []
    found = tool.soak(lambda _: held.append(os.open(os.devnull, os.O_RDONLY)), 12)
    for handle in held:
        os.close(handle)
    assert [line for line in tool.judge(found, 1e9) if line.startswith("files grow from")]


@pytest.mark.parametrize(
    ("kib", "threads", "said"),
    [
        (800, 0, ["memory grows by 800.0 KiB a cycle, at most 500 allowed"]),
        (400, 0, []),
        (0, 1, ["threads grow from 10 to 50"]),
    ],
)
def test_what_grows_is_named(kib, threads, said):
    """The first tenth may do what it likes."""
    tool = load("soak")
    rng = np.random.default_rng(0)
    found = [
        tool.Usage(
            bytes=2**30 + 1024 * kib * cycle + int(rng.integers(0, 2)), files=9, threads=1 + threads * cycle
        )
        for cycle in range(50)
    ]
    found[:5] = [tool.Usage(bytes=2**33, files=99, threads=99)] * 5
    assert tool.judge(found, 500.0) == said


@pytest.mark.parametrize(
    ("cycles", "said"),
    [("11", "must be at least 12, got 11"), ("1", "got 1:"), ("0", "got '0'"), ("-3", "got '-3'")],
)
def test_too_few_cycles_are_refused(cycles, said, capsys):
    """With fewer, growth would be sought between cycles that are the same ones."""
    with pytest.raises(SystemExit) as left:
        load("soak").main(["--cycles", cycles])
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_growth_shows_in_the_fewest_cycles():
    tool = load("soak")
    found = [tool.Usage(bytes=2**30, files=9 + (cycle > 6), threads=1) for cycle in range(tool.FEWEST)]
    assert tool.judge(found, 1.0) == ["files grow from 9 to 10"]


@pytest.mark.parametrize("grows", [0, 1])
def test_growth_leaves_with_1(grows, monkeypatch, capsys):
    tool, numbers = load("soak"), iter(range(12))
    logger = logging.getLogger("llmrec")
    before = logger.level
    monkeypatch.setenv("LLMREC_NUM_THREADS", "1")
    monkeypatch.setattr(tool, "whole_cycle", lambda root: lambda number: None)
    monkeypatch.setattr(
        tool, "usage", lambda: tool.Usage(bytes=2**30, files=9 + grows * next(numbers), threads=1)
    )
    try:
        with pytest.raises(SystemExit) as left:
            tool.main(["--cycles", "12"])
    finally:
        logger.setLevel(before)
    assert left.value.code == grows and ("files grow" in capsys.readouterr().out) == bool(grows)
