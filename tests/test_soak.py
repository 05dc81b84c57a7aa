"""Training and evaluating many times in one process: tools/soak.py in short."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from tool import load


@pytest.fixture(autouse=True)
def short_collections():
    """Collecting garbage after every cycle takes long among the objects of a whole test session."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_cycles_leave_no_file_and_no_folder_behind(tmp_path):
    tool = load("soak")
    found = tool.soak(tool.whole_cycle(tmp_path), 4)
    assert found[-1].files == found[1].files and found[-1].threads == found[1].threads
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


@pytest.mark.parametrize("leak", ["memory", "files", "none"])
def test_a_leak_is_seen(leak):
    tool = load("soak")
    held = []

    def cycle(number: int) -> None:
        if leak == "memory":
            held.append(np.ones(200_000))
        elif leak == "files":
            held.append(os.open(os.devnull, os.O_RDONLY))

    wrong = tool.judge(tool.soak(cycle, 40), 500.0)
    for handle in held if leak == "files" else []:
        os.close(handle)
    assert len(wrong) == (leak != "none") and all(leak in line for line in wrong)
