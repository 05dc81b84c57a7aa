"""Cells of comparisons: what each gets of the machine, and what becomes of those that fail or are busy."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from llmrec import arguments, jobs, machine, storage
from llmrec.errors import BusyError, ConfigError, DataError, TrainingError

CELL = """
import os, pathlib, signal, sys, time
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]

def save(*_):
    time.sleep(0.3)
    (folder / "saved").write_text("x")
    sys.exit(1)

signal.signal(signal.SIGTERM, save)
(folder / "begun").open("a").write("x")
if what == "die":
    print("12:00:00 finetune: epoch 1, fine", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "stay":
    time.sleep(60)
if what == "busy" and len((folder / "begun").read_text()) < 3:
    sys.exit({BUSY})
if what in ("fail", "refuse"):
    print("going on", flush=True)
    print("error: it did not work", file=sys.stderr)
    sys.exit({FAILED} if what == "fail" else {IMPOSSIBLE})
if what != "nothing":
    (folder / "result").write_text("0.5")
"""


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """Makes a cell whose process does what is asked, without importing anything of ours."""
    (tmp_path / "toy_cell.py").write_text(CELL.format(**vars(jobs)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(jobs, "WAIT_SECONDS", 0.02)

    def made(row: str, what: str, seed: int = 0) -> jobs.Cell:
        folder = tmp_path / row / f"seed{seed}"
        return jobs.Cell(
            row=row,
            seed=seed,
            folder=folder,
            command=["toy_cell", str(folder), what],
            stages=(folder / "finetune", folder / "evaluate"),
            done=(folder / "result").exists,
            outcome=lambda: f"recall@10 {(folder / 'result').read_text()}",
        )

    return made


def begun(cell: jobs.Cell) -> int:
    """How often a process was started for it."""
    file = cell.folder / "begun"
    return len(file.read_text()) if file.exists() else 0


def test_cells_that_fail_are_named_and_leave_the_others_be(cell, caplog):
    caplog.set_level("INFO")
    cells = [cell("good", "work"), cell("bad", "fail"), cell("empty", "nothing"), cell("good", "work", 1)]
    failed = jobs.run(cells, 2)  # in the order in which they end
    assert sorted(failed) == [
        f"bad, seed 0: it did not work ({cells[1].log})", f"empty, seed 0: it said nothing ({cells[2].log})",
    ]  # fmt: skip
    assert "compare: good, seed 0: recall@10 0.5; 1 of 4 done" in caplog.text and "2 of 4 done" in caplog.text
    assert jobs.run([cells[0], cells[3]], 2) == [] and [begun(one) for one in cells] == [1] * 4
    jobs.run(cells, 2)
    assert cells[1].log.read_text() == "going on\nerror: it did not work\n" * 2, "of both runs"


def test_a_row_that_cannot_be_run_is_begun_once_and_is_no_failure(cell, caplog):
    cells = [cell("refused", "refuse", seed) for seed in range(3)]
    good = cell("good", "work")
    assert jobs.run([*cells, good], 1) == [] and good.done()
    assert caplog.text.count("refused cannot be run with these settings: it did not work") == 1
    assert [begun(one) for one in cells] == [1, 0, 0]


def test_a_cell_that_another_process_took_first_is_tried_again(cell):
    taken, good = cell("taken", "busy"), cell("good", "work")
    assert jobs.run([taken, good], 1) == [] and (begun(taken), begun(good)) == (3, 1)


def test_cells_that_others_are_at_are_left_to_them_and_taken_up_if_they_stop(cell, monkeypatch):
    """One is finished by another process, the other is left unfinished."""
    theirs, left, good = cell("theirs", "work"), cell("left", "work"), cell("good", "work")
    looks, held = [], [storage.locked(one.stages[1]) for one in (theirs, left)]
    for lock in held:
        lock.__enter__()

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 40:
            assert good.done() and not begun(theirs) and not begun(left)
            (theirs.folder / "result").write_text("0.25")
            for lock in held:
                lock.__exit__(None, None, None)
        wait(seconds)

    wait = time.sleep
    monkeypatch.setattr(jobs.time, "sleep", sleep)
    assert jobs.run([theirs, left, good], 3) == []
    assert (begun(theirs), begun(left), begun(good)) == (0, 1, 1)


COMPARISON = """
import sys
from pathlib import Path
from llmrec import console, jobs
jobs.WAIT_SECONDS = 0.02
folder = Path(sys.argv[1])
cells = [
    jobs.Cell(
        row=name, seed=0, folder=folder / name, command=["toy_cell", str(folder / name), what], stages=(),
        done=(folder / name / "result").exists, outcome=lambda: "fine",
    )
    for name, what in (("a", "work"), ("b", "stay"), ("c", "stay"))
]
sys.exit(console.guarded(lambda: jobs.run(cells, 2)))
"""


def comparison(folder, module) -> subprocess.Popen:
    """A process with three cells, of which the last two stay, as a terminal starts it; back when these are at
    it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(module), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", COMPARISON, str(folder)], stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    while not all((folder / name / "begun").exists() for name in "bc") and process.poll() is None:
        time.sleep(0.02)
    return process


def processes_in(folder) -> list[psutil.Process]:
    """Those that were given it."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in str(one.info["cmdline"])]


def test_a_comparison_that_is_asked_to_stop_stops_its_cells(cell, tmp_path):
    """SIGTERM, as schedulers send it, and Ctrl-C and a terminal that closes, which cells hear of from their
    comparison alone; it ends once they have saved their work."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        folder = tmp_path / number.name
        process = comparison(folder, tmp_path)
        os.killpg(process.pid, number)  # as terminals do, to all that they started
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "stopped with 1 of 3 cells done; the same command" in line:
                assert (folder / "b" / "saved").exists() and (folder / "c" / "saved").exists()
                break
        process.communicate(timeout=60)
        assert process.returncode == 130 and "stopped with" in lines[-1], lines
        assert not processes_in(folder)


WATCHED = """
import pathlib, sys, time
from llmrec import jobs
from llmrec.stopping import stop_requests
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]

def work():
    if what == "stay":
        with stop_requests("saving") as stop:
            (folder / "begun").write_text("x")
            while not stop.asked:
                time.sleep(0.02)
        (folder / "saved").write_text("x")
    (folder / "result").write_text("0.5")

sys.exit(jobs.end_cell(work))
"""


def test_the_cells_of_a_comparison_that_is_killed_stop_and_keep_their_work(tmp_path):
    (tmp_path / "toy_cell.py").write_text(WATCHED)
    process = comparison(tmp_path / "runs", tmp_path)
    process.kill()
    process.communicate(timeout=60)
    psutil.wait_procs(processes_in(tmp_path / "runs"), timeout=60)
    assert not processes_in(tmp_path / "runs")
    for name in ("b", "c"):
        log = (tmp_path / "runs" / name / "log.txt").read_text()
        assert (tmp_path / "runs" / name / "saved").exists(), log
        assert "the comparison that began this has been killed" in log


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (TrainingError("it went wrong"), jobs.IMPOSSIBLE),
        (DataError("it went wrong"), jobs.FAILED),
        (BusyError("it went wrong"), jobs.BUSY),
    ],
)
def test_a_cell_ends_with_its_reason(error, code, capsys):
    def work() -> None:
        if error is not None:
            raise error

    assert jobs.end_cell(work, (TrainingError,)) == code
    assert capsys.readouterr().err == ("error: it went wrong\n" if error else "")


@pytest.fixture
def no_settings(monkeypatch):
    for name in ("LLMREC_NUM_THREADS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)


def on(number: int, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_without_a_gpu_the_cores_are_shared(no_settings, monkeypatch):
    on(0, monkeypatch)
    assert jobs.default() == 12
    assert jobs.share(3, 4) == {"LLMREC_NUM_THREADS": "3", "OMP_NUM_THREADS": "3"}
    assert jobs.share(0, 20)["LLMREC_NUM_THREADS"] == "1"
    monkeypatch.setenv("LLMREC_NUM_THREADS", "2")
    assert jobs.share(0, 20)["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("LLMREC_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert jobs.share(0, 1) == {"LLMREC_NUM_THREADS": "5", "OMP_NUM_THREADS": "5"}


def test_each_job_gets_a_gpu_of_its_own(no_settings, monkeypatch):
    on(3, monkeypatch)
    assert jobs.default() == 3
    assert [jobs.share(job, 5)["CUDA_VISIBLE_DEVICES"] for job in range(5)] == ["0", "1", "2", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,7")
    assert [jobs.share(job, 3)["CUDA_VISIBLE_DEVICES"] for job in range(3)] == ["4", "GPU-a", "7"]


def test_one_gpu_is_left_as_it_is(no_settings, monkeypatch):
    on(1, monkeypatch)
    assert jobs.default() == 1 and "CUDA_VISIBLE_DEVICES" not in jobs.share(0, 2)


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1.5"])
def test_jobs_are_counted(bad, capsys):
    parser = argparse.ArgumentParser()
    jobs.add_argument(parser)
    assert parser.parse_args(["--jobs", "3"]).jobs == 3 and parser.parse_args([]).jobs is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--jobs", bad])
    assert "--jobs: must be a whole number of at least 1" in capsys.readouterr().err


def test_one_run_is_not_counted_twice(capsys):
    parser = argparse.ArgumentParser()
    jobs.add_seeds(parser)
    assert parser.parse_args([]).seeds == [0, 1, 2] and parser.parse_args(["--seeds", "3", "1"]).seeds == [
        3,
        1,
    ]
    with pytest.raises(SystemExit):
        parser.parse_args(["--seeds", "0", "0"])
    assert "argument --seeds: must differ, got 0 0" in capsys.readouterr().err


def test_a_cell_that_is_killed_is_said_to_have_been(cell):
    one = cell("dies", "die")
    assert jobs.run([one], 1) == [
        f"dies, seed 0: killed by SIGKILL, most often for want of memory ({one.log})"
    ]
    assert jobs.killed_by(-signal.SIGTERM) == "killed by SIGTERM" and jobs.killed_by(2) == ""


def test_threads_are_at_most_the_cores_that_a_process_was_given(no_settings, monkeypatch):
    from llmrec import distributed, machine

    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 24 if logical else 12)
    for given, expected in ((24, 12), (8, 8), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, given=given: set(range(given)), raising=False)
        assert (machine.cores(), distributed.num_threads()) == (expected, expected)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert distributed.num_threads() == 2


def test_threads_that_were_asked_for_are_taken_and_a_launchers_are_not(no_settings, monkeypatch):
    from llmrec import distributed

    for text, expected in (("3", 3), ("4,2", 4), ("", 12), ("0", 12), ("many", 12)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert distributed.num_threads() == expected, text
    for launcher in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        with monkeypatch.context() as under:
            under.setenv("OMP_NUM_THREADS", "1")
            under.setenv(launcher, "0")
            assert distributed.num_threads() == 12, launcher
            under.setenv("LLMREC_NUM_THREADS", "7")
            assert distributed.num_threads() == 7, launcher


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 3),  # docker run --cpus 2.5
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 1),
        ("0::/../outside", {"cpu.max": "200000 100000"}, 2),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "60000", "cpu/cpu.cfs_period_us": "10000"}, 6),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "10000"}, 12),
        ("0::/", {"cpu.max": "max 100000"}, 12),
        ("0::/", {}, 12),
        (None, {}, 12),
    ],
)  # fmt: skip
def test_a_container_counts_the_cores_it_is_granted(
    groups, files, expected, no_settings, monkeypatch, tmp_path
):
    monkeypatch.setattr(machine, "PROCESS", tmp_path / "self")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "self").mkdir()
    if groups is not None:
        (tmp_path / "self" / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert machine.cores() == expected


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5", ""])
def test_variables_that_are_no_numbers_are_refused(text, monkeypatch):
    from llmrec import distributed, launched

    monkeypatch.setenv("LLMREC_NUM_THREADS", text)
    with pytest.raises(ConfigError, match=rf"LLMREC_NUM_THREADS must be a whole number .*, got '{text}'"):
        distributed.num_threads()
    monkeypatch.setenv("LLMREC_TIMEOUT_MINUTES", "2.5")
    assert launched.timeout().total_seconds() == 150
    monkeypatch.setenv("LLMREC_TIMEOUT_MINUTES", "inf" if text == "1.5" else text)
    with pytest.raises(ConfigError, match="LLMREC_TIMEOUT_MINUTES must be a number above 0"):
        launched.timeout()


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (arguments.positive, {"1": 1, "12": 12}, ("0", "-3", "1.5", "", "x")),
        (arguments.whole, {"0": 0, "7": 7}, ("-1", "0.5", "", "x")),
        (arguments.positive_number, {"0.5": 0.5, "3": 3.0}, ("0", "-1", "nan", "inf", "", "x")),
    ],
)
def test_numbers_as_arguments(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be a .*number .*, got "):
            kind(text)


@pytest.mark.parametrize(("system", "counted"), [("linux", 3000), ("darwin", 3000 * 1024)])
def test_peak_memory_is_in_bytes_where_the_system_counts_otherwise(system, counted, tmp_path, monkeypatch):
    """Without /proc: getrusage counts KiB, and bytes on macOS."""
    monkeypatch.setattr(machine, "PROCESS", tmp_path)
    monkeypatch.setattr(machine.sys, "platform", system)
    monkeypatch.setattr(machine.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=counted))
    assert machine.peak_resident_memory() == 3000 * 1024
