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


@dataclass(frozen=True, kw_only=True)
class Running:
    """One run of a stage."""

    folder: Path
    """Where it may leave work; deleted once the stage is done"""
    made_from: dict[str, Any]
    """Its settings, without those that change no result, and inputs (see `stage_changes.describe_stage`)"""
    started: float
    """`time.perf_counter` at its begin"""
    earlier: float
    """Seconds of the runs that left the work it goes on with"""

    def seconds(self) -> float:
        """Seconds so far, those of earlier runs included."""
        return self.earlier + time.perf_counter() - self.started

    def note_seconds(self) -> None:
        """Write them beside work that has just been left."""
        if distributed.is_main():
            path = self.folder / FILE
            scratch = path.with_name(f".{FILE}.{os.getpid()}")
            write_json(scratch, {"seconds": self.seconds(), "made_from": self.made_from})
            os.replace(scratch, path)


_running: contextvars.ContextVar[Running | None] = contextvars.ContextVar("running", default=None)


@contextlib.contextmanager
def running(folder: Path, made_from: dict[str, Any]) -> Iterator[Running]:
    """While a stage runs, what it may ask here.

    Args:
        folder: see `Running`; what earlier runs left there counts if it was made from the same.
        made_from: see `Running`.
    """
    run = Running(
        folder=folder,
        made_from=json.loads(json.dumps(made_from)),
        started=time.perf_counter(),
        earlier=seconds_of(folder, made_from),
    )
    token = _running.set(run)
    try:
        yield run
    finally:
        _running.reset(token)
        if (folder / FILE).exists():  # else nothing is left
            with contextlib.suppress(OSError):  # why it stopped is what is told
                run.note_seconds()


def seconds_of(folder: Path, made_from: dict[str, Any]) -> float:
    """Seconds that earlier runs noted; 0 where they were made from something else."""
    try:
        found = read_json(folder / FILE)
    except MissingArtifactError:
        return 0.0
    return found["seconds"] if found["made_from"] == json.loads(json.dumps(made_from)) else 0.0


def current() -> Running | None:
    """The stage that is running; None outside of one."""
    return _running.get()


def resume_folder() -> Path | None:
    """Where the stage that is running may leave work for the run after a stop; None outside of a stage.

    It is deleted once the stage is done. What lies in it must say what it was made from.
    """
    run = current()
    return None if run is None else run.folder


def note_seconds() -> None:
    """How long the stage has taken, beside work that it has just left; nothing outside of a stage."""
    run = current()
    if run is not None:
        run.note_seconds()
