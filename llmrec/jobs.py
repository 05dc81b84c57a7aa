"""The cells of a comparison side by side, each trained by a process of its own with its share of the machine.

A cell is some stages in a folder. Comparisons that are given the same cells share them, however they were
started: what another one is at is left to it, and taken up if it stops.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrec import launched, machine, storage
from llmrec.arguments import positive
from llmrec.errors import BusyError, LlmrecError, StoppedError
from llmrec.stopping import stop_requests

logger = logging.getLogger("llmrec")

WAIT_SECONDS = 1.0
"""Between looks at what has ended."""

FAILED, BUSY, IMPOSSIBLE = 2, 75, 78
"""How the process of a cell ends without a result: by an error, because another one is at the cell, or
because its row cannot be run with these settings."""

LIFELINE = "LLMREC_LIFELINE"
"""Variable that says that a cell's input ends with the process that began it."""

LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_"),
    *("FSDP_", "OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "MPI_LOCAL"),
)
"""How the variables begin by which launchers tell processes of each other."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row with one seed."""

    row: str
    seed: int
    folder: Path
    """Where it goes; what its processes say, one after another, to log.txt in it."""
    command: list[str]
    """Its process: arguments of ``python -m``."""
    stages: tuple[Path, ...]
    """The outputs it computes, which another process may be computing."""
    done: Callable[[], bool]
    outcome: Callable[[], str]
    """A phrase about the result."""

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def busy(self) -> bool:
        """Whether another process is at it."""
        return any(storage.is_locked(stage) for stage in self.stages)

    def last_words(self) -> str:
        """The last line of its log, which names the error that ended it."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:].removeprefix("error: ") if lines else "it said nothing"


def run(cells: list[Cell], jobs: int) -> list[str]:
    """Train the cells that are not done, some at a time; one that fails leaves the others be.

    Args:
        cells: in the order in which they are begun.
        jobs: how many at a time.

    Returns:
        A line for each that failed. Of a row that cannot be run with its settings a warning tells instead,
        and its other cells are not begun.

    Raises:
        StoppedError: this process was asked to stop, and has stopped the others, which keep their work.
    """
    from llmrec.progress import progress

    work = Work(remaining=[cell for cell in cells if not cell.done()])
    done = len(cells) - len(work.remaining)
    logger.info("compare: %d cells, %d to run, %d at a time", len(cells), len(work.remaining), jobs)
    with (
        stop_requests("stopping what runs, which keeps its work") as stop,
        progress(None, "compare", total=len(cells), unit="cell", initial=done) as bar,
    ):
        try:
            while work.remaining and not stop.asked:
                work.see_what_ended()
                for cell in work.take_done():
                    done += 1
                    bar.update()
                    outcome = cell.outcome()
                    logger.info("compare: %s: %s; %d of %d done", cell.name, outcome, done, len(cells))
                work.begin(jobs)
                if work.remaining:
                    time.sleep(WAIT_SECONDS)
        finally:
            work.stop()
    if stop.asked:
        raise StoppedError(
            f"stopped with {done} of {len(cells)} cells done; the same command goes on from there"
        )
    return work.failed


@dataclass(kw_only=True)
class Work:
    """What is left to do, and who is at it."""

    remaining: list[Cell]
    """Neither done nor given up"""
    running: dict[int, tuple[Cell, subprocess.Popen]] = field(default_factory=dict)
    """Processes of ours, by the number that says which share of the machine they have"""
    failed: list[str] = field(default_factory=list)
    impossible: set[str] = field(default_factory=set)
    """Rows that cannot be run"""
    lifeline: tuple[int, int] = field(default_factory=os.pipe)
    """A pipe that nobody writes to. The system closes our end of it if this process is killed; then the
    processes of cells, which hold the other one, know that they are alone."""

    def see_what_ended(self) -> None:
        """Take leave of processes that have ended, and give up cells that they say will never be done."""
        for job, (cell, process) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[job]
            if process.returncode == BUSY or cell.done():
                continue
            reason = killed_by(process.returncode) or cell.last_words()
            if process.returncode != IMPOSSIBLE:
                self.remaining.remove(cell)
                self.failed.append(f"{cell.name}: {reason} ({cell.log})")
                logger.warning("compare: %s failed: %s", cell.name, reason)
            elif cell.row not in self.impossible:
                self.impossible.add(cell.row)
                logger.warning("%s cannot be run with these settings: %s", cell.row, reason)
        self.remaining = [
            cell for cell in self.remaining if cell.row not in self.impossible or self.is_ours(cell)
        ]

    def take_done(self) -> list[Cell]:
        """Cells that are done now, by processes of ours or of other comparisons."""
        found = [cell for cell in self.remaining if not self.is_ours(cell) and cell.done()]
        for cell in found:
            self.remaining.remove(cell)
        return found

    def begin(self, jobs: int) -> None:
        """Start cells that nobody is at until `jobs` run."""
        for cell in self.remaining:
            if len(self.running) >= jobs:
                return
            if not self.is_ours(cell) and not cell.busy():
                job = min(set(range(jobs)) - self.running.keys())
                self.running[job] = cell, start(cell, share(job, jobs), self.lifeline[0])

    def stop(self) -> None:
        """End what is running. It keeps its work when asked to stop, as this process does."""
        for _, process in self.running.values():
            process.terminate()
        for _, process in self.running.values():
            process.wait()
        for end in self.lifeline:
            os.close(end)

    def is_ours(self, cell: Cell) -> bool:
        """Whether a process of ours is at a cell."""
        return any(cell is one for one, _ in self.running.values())


def search_path() -> str:
    """Where this process finds modules: a recipe's folder, models in it, and what a script has added."""
    return os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH"), *sys.path[1:]]))


def killed_by(returncode: int) -> str:
    """What ended a process from outside, if something did."""
    if returncode >= 0:
        return ""
    known = {one.value: one.name for one in signal.Signals}
    name = known.get(-returncode, f"signal {-returncode}")
    return f"killed by {name}{', most often for want of memory' if name == 'SIGKILL' else ''}"


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher says of processes: a cell is one by itself."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(LAUNCHER) or name == "ACCELERATE_USE_CPU"
    }


def start(cell: Cell, environment: dict[str, str], lifeline: int) -> subprocess.Popen:
    """Begin a cell. An interrupt from the keyboard is for the process that began it, to hand on.

    Args:
        cell: which.
        environment: variables that it gets besides ours.
        lifeline: the end of `Work.lifeline` to read.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("a") as log:
        return subprocess.Popen(  # noqa: S603 (our own module, with paths)
            [sys.executable, "-m", *cell.command],
            stdin=lifeline,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=without_launcher(os.environ) | environment | {"PYTHONPATH": search_path(), LIFELINE: "stdin"},
            start_new_session=True,
        )


def end_cell(work: Callable[[], None], impossible: tuple[type[LlmrecError], ...] = ()) -> int:
    """Do the work of a cell, in its process.

    Args:
        work: what there is to do.
        impossible: errors that say that its row cannot be run.

    Returns:
        How the process is to end. An error's message is the last line of the log.
    """
    if os.environ.pop(LIFELINE, None):
        threading.Thread(target=stop_when_alone, daemon=True).start()
    try:
        work()
    except LlmrecError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, BusyError):
            return BUSY
        return IMPOSSIBLE if isinstance(error, impossible) else FAILED
    return 0


def stop_when_alone() -> None:
    """Ask this process to stop, as a scheduler would, once the one that began it is gone."""
    while os.read(0, 1):
        pass
    logger.warning("the comparison that began this has been killed")
    os.kill(os.getpid(), signal.SIGTERM)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """``--jobs``, of a command that trains cells."""
    parser.add_argument(
        "--jobs",
        type=positive,
        help="cells trained at a time (one a GPU, or without any one a core); with more, they share a GPU",
    )


class Different(argparse.Action):
    """Values of which no two are equal: one run counted twice would be a spread of nothing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(set(values)) < len(values):
            raise argparse.ArgumentError(self, f"must differ, got {' '.join(map(str, values))}")
        setattr(namespace, self.dest, values)


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """``--seeds``, of a command that compares over several."""
    parser.add_argument(
        "--seeds", nargs="+", type=int, action=Different, default=[0, 1, 2], metavar="SEED",
        help="of every row (0 1 2)",
    )  # fmt: skip


class NamedRow(argparse.Action):
    """A name and settings behind it; each time that it is given, one row more."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, *settings = values
        if wrong := [setting for setting in settings if "=" not in setting]:
            raise argparse.ArgumentError(
                self, f"{name}: {wrong[0]!r} is not of the form FIELD=VALUE; another row takes another --row"
            )
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def add_row(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """``--row``, of a command that compares settings of the user's own."""
    parser.add_argument(
        "--row", nargs="+", action=NamedRow, default=[], required=required, metavar=("NAME", "FIELD=VALUE"),
        help=f"{text}; may be repeated",
    )  # fmt: skip


def default() -> int:
    """How many fit: one per GPU, or else one per core."""
    return len(gpus()) or machine.cores()


def share(job: int, jobs: int) -> dict[str, str]:
    """Environment of one of several processes: its share of the cores, and of several GPUs one.

    Args:
        job: its number, counted from 0.
        jobs: how many run at a time.
    """
    threads = str(launched.asked_threads() or max(1, machine.cores() // jobs))
    found = {"LLMREC_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    if len(visible := gpus()) > 1:
        found["CUDA_VISIBLE_DEVICES"] = visible[job % len(visible)]
    return found


def gpus() -> list[str]:
    """The GPUs that this process may use, as $CUDA_VISIBLE_DEVICES names them."""
    import torch

    number = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:number] if named else [str(gpu) for gpu in range(number)]
