"""The stage that is running: what it is made from, where it may leave work for a run after a stop, and what
time and memory it has taken, stopped runs included."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmrec import launched, machine
from llmrec.errors import MissingArtifactError
from llmrec.files import read_json, write_json

FILE = "spent.json"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a stage has taken."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Most that its process held"""
    peak_gpu_memory_bytes: int | None = None
    """Most that was allocated on its GPU; None without one"""

    def most(self, other: Spent) -> Spent:
        """The more of each."""
        gpu = [one.peak_gpu_memory_bytes for one in (self, other)]
        return Spent(
            seconds=max(self.seconds, other.seconds),
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
            peak_gpu_memory_bytes=max((peak for peak in gpu if peak is not None), default=None),
        )


@dataclass(kw_only=True)
class Running:
    """One run of a stage."""

    folder: Path
    """Where it may leave work; deleted once the stage is done"""
    made_from: dict[str, Any]
    """Its settings, without those that change no result, and inputs (see `stage_changes.describe_stage`)"""
    started: float
    """`time.perf_counter` at its begin"""
    earlier: Spent = Spent()
    """By the runs that left the work it goes on with"""
    work: Path | None = None
    """The folder of work that it went on with or left last"""

    def spent(self) -> Spent:
        """What it has taken so far, earlier runs included: their seconds too, and the most memory of any."""
        here = Spent(
            seconds=self.earlier.seconds + time.perf_counter() - self.started,
            peak_memory_bytes=machine.peak_resident_memory(),
            peak_gpu_memory_bytes=machine.peak_gpu_memory(),
        )
        return here.most(self.earlier)

    def goes_on_with(self, work: Path) -> None:
        """Count what is noted beside work. Notes beside several works include each other's."""
        self.work = work
        self.earlier = self.earlier.most(spent_beside(work))

    def note_spent(self, work: Path) -> None:
        """Write it beside work that has just been left."""
        self.work = work
        if launched.is_main():
            path = work / FILE
            scratch = path.with_name(f".{FILE}.{os.getpid()}")
            write_json(scratch, asdict(self.spent()))
            os.replace(scratch, path)


_running: contextvars.ContextVar[Running | None] = contextvars.ContextVar("running", default=None)


@contextlib.contextmanager
def running(folder: Path, made_from: dict[str, Any]) -> Iterator[Running]:
    """While a stage runs, what it may ask here.

    Args:
        folder: see `Running`.
        made_from: see `Running`.
    """
    run = Running(folder=folder, made_from=json.loads(json.dumps(made_from)), started=time.perf_counter())
    token = _running.set(run)
    try:
        yield run
    finally:
        _running.reset(token)
        if run.work is not None:  # else nothing is left
            with contextlib.suppress(OSError):  # why it stopped is what is told
                run.note_spent(run.work)


def spent_beside(work: Path) -> Spent:
    """What runs noted beside work that they left; nothing where none did."""
    try:
        return Spent(**read_json(work / FILE))
    except MissingArtifactError:
        return Spent()


def current() -> Running | None:
    """The stage that is running; None outside of one."""
    return _running.get()


def resume_folder() -> Path | None:
    """Where the stage that is running may leave work for the run after a stop; None outside of a stage.

    It is deleted once the stage is done. What lies in it must say what it was made from.
    """
    run = current()
    return None if run is None else run.folder


def goes_on_with(work: Path) -> None:
    """The stage goes on with work that an earlier run left in this folder; nothing outside of a stage."""
    run = current()
    if run is not None:
        run.goes_on_with(work)


def note_spent(work: Path) -> None:
    """What the stage has taken, beside work that it has just left in this folder; nothing outside of one."""
    run = current()
    if run is not None:
        run.note_spent(work)
