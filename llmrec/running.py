"""The stage that is running: what it is made from, where it may leave work for a run after a stop, and how
long it has taken, stopped runs included."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec import distributed
from llmrec.errors import MissingArtifactError
from llmrec.files import read_json, write_json

FILE = "seconds.json"


@dataclass(kw_only=True)
class Running:
    """One run of a stage."""

    folder: Path
    """Where it may leave work; deleted once the stage is done"""
    made_from: dict[str, Any]
    """Its settings, without those that change no result, and inputs (see `stage_changes.describe_stage`)"""
    started: float
    """`time.perf_counter` at its begin"""
    earlier: float = 0.0
    """Seconds of the runs that left the work it goes on with"""
    work: Path | None = None
    """The folder of work that it went on with or left last"""

    def seconds(self) -> float:
        """Seconds so far, those of earlier runs included."""
        return self.earlier + time.perf_counter() - self.started

    def goes_on_with(self, work: Path) -> None:
        """Count the seconds that are noted beside work. Those beside several works include each other's."""
        self.work = work
        self.earlier = max(self.earlier, seconds_beside(work))

    def note_seconds(self, work: Path) -> None:
        """Write them beside work that has just been left."""
        self.work = work
        if distributed.is_main():
            path = work / FILE
            scratch = path.with_name(f".{FILE}.{os.getpid()}")
            write_json(scratch, {"seconds": self.seconds()})
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
                run.note_seconds(run.work)


def seconds_beside(work: Path) -> float:
    """Seconds that runs noted beside work that they left; 0 where none did."""
    try:
        return read_json(work / FILE)["seconds"]
    except MissingArtifactError:
        return 0.0


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


def note_seconds(work: Path) -> None:
    """How long the stage has taken, beside work that it has just left in this folder; nothing outside of a
    stage."""
    run = current()
    if run is not None:
        run.note_seconds(work)
