"""The crash test in short: a dozen kills of every training stage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tool import TOOLS, load

TOOL = TOOLS / "crash_test.py"


@pytest.mark.slow
def test_a_dozen_kills_lose_nothing_and_change_nothing():
    """In a process of its own, since it forks."""
    command = [sys.executable, str(TOOL), "--kills", "12", "--seconds", "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "finetune" not in done.stderr, "what stages say is not mixed into what the test says"
    counts = {
        words[-1]: int(words[0])
        for words in (line.split(None, 1) for line in done.stdout.splitlines() if line)
    }
    assert counts["things wrong"] == 0 and counts["kills"] == 12 and counts["runs finished"] >= 3
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


TOYS = """
import json, sys, time
from pathlib import Path
import numpy as np
from tqdm import tqdm
sys.path[:0] = {paths}
from tool import load
from llmrec.errors import ConfigError
tool = load("crash_test")
tool.run_stage = lambda function, config, inputs, folder: function(folder)
root, found = Path(sys.argv[1]), {{}}

def fails(folder):
    print("going on", flush=True)
    raise KeyError("no luck")

def refuses(folder):
    raise ConfigError("this cannot work")

def forgets(folder):
    pass

def hangs(folder):
    time.sleep(60)

for toy in (fails, refuses, forgets, hangs):
    (root / toy.__name__).mkdir()
    begun = time.monotonic()
    trial = tool.Trial(
        root=root / toy.__name__, work={{"toy": (toy, None, ())}}, expected={{}}, kills=1000,
        deadline=begun + 3.0, rng=np.random.default_rng(0), bar=tqdm(disable=True),
    )
    trial.run()
    counts = trial.counts
    found[toy.__name__] = [time.monotonic() - begun, counts["kills"], trial.wrong, counts["runs cut short"]]
print(json.dumps(found))
"""


def test_what_never_gets_done_ends_in_time_and_is_named(tmp_path):
    """Starts that fail, leave nothing, or take for ever; in a process of its own, since it forks."""
    script = TOYS.format(paths=[str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    found = json.loads(done.stdout.splitlines()[-1])
    ended = "a start ended by itself with exit code"
    for toy, said in (
        ("fails", f"toy, round 1: {ended} 1, and without a result: KeyError: 'no luck'"),
        ("refuses", f"toy, round 1: {ended} 2, and without a result: this cannot work"),
        ("forgets", f"toy, round 1: {ended} 0, and without a result: it said nothing"),
    ):
        assert said in found[toy][2][:1] and len(found[toy][2]) <= 20
    assert not found["hangs"][2] and 2 <= found["hangs"][1] < 1000 and found["hangs"][3] == 1
    assert all(seconds < 10 for seconds, *_ in found.values())


@pytest.mark.parametrize(
    ("kills", "counts", "code", "said"),
    [
        ("3", {}, 0, "0  things wrong"),
        ("5", {}, 1, "only 3 of 5 kills in 7 seconds"),
        ("3", {"runs cut short": 1}, 1, "7 seconds were over before what was killed last was done"),
    ],
)
def test_less_than_was_asked_for_is_no_success(kills, counts, code, said, monkeypatch, capsys):
    tool = load("crash_test")
    monkeypatch.setattr(tool, "torture", lambda *_: (Counter(counts, kills=3), []))
    with pytest.raises(SystemExit) as left:
        tool.main(["--kills", kills, "--seconds", "7"])
    assert left.value.code == code and said in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--kills", "0"), ("--seconds", "-1"), ("--seed", "-1")])
def test_numbers_that_make_no_sense_are_refused(option, capsys):
    with pytest.raises(SystemExit) as left:
        load("crash_test").main([*option])
    assert left.value.code == 2 and "must be a" in capsys.readouterr().err
