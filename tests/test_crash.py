"""The crash test in short: a dozen kills of every training stage."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tool import TOOLS, load

TOOL = TOOLS / "crash_test.py"


@pytest.mark.slow
def test_a_dozen_kills_lose_nothing_and_change_nothing():
    """In a process of its own, since it forks."""
    command = [sys.executable, str(TOOL), "--kills", "12", "--seconds", "90"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = {
        words[-1]: int(words[0])
        for words in (line.split(None, 1) for line in done.stdout.splitlines() if line)
    }
    assert counts["things wrong"] == 0 and counts["kills"] >= 3 and counts["runs finished"] >= 3
    assert all(counts[f"kills of {name}"] for name in ("train_collab", "learn_semantic_ids", "finetune"))


def test_it_would_notice(tmp_path):
    """A checkpoint that is not whole, and files that differ, are told apart from good ones."""
    tool = load("crash_test")
    from llmrec.checkpoint import Checkpoint, Checkpoints, DamagedError

    store = Checkpoints(tmp_path, "x")
    assert tool.newest(tmp_path) == 0
    path = store.save(Checkpoint(step=3, tensors={}, state={}))
    assert tool.newest(tmp_path) == 3
    (path / "state.json").write_text("{ }")
    with pytest.raises(DamagedError):
        tool.newest(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.jsonl").write_text('{"loss": 1, "seconds": 2}\n')
    before = tool.content_of(tmp_path / "a")
    (tmp_path / "a" / "log.jsonl").write_text('{"loss": 1, "seconds": 3}\n')
    assert tool.content_of(tmp_path / "a") == before
    (tmp_path / "a" / "log.jsonl").write_text('{"loss": 2, "seconds": 3}\n')
    assert tool.content_of(tmp_path / "a") != before
