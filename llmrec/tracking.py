"""Figures of a stage while it runs: JSON lines that grow, and the trackers that were asked for.

`pipeline.compute` opens a track for the stage; whatever trains tells its figures by `begin` and `log`, which
do nothing outside of a stage. The lines lie in the stage's unfinished folder until it is done. Trackers are
those of accelerate; each stage is a run of its own, as its steps are.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrec.config import flatten
from llmrec.errors import ConfigError

logger = logging.getLogger("llmrec")

VARIABLE = "LLMREC_TRACK"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")
PROJECT = "llmrec"
LINES = "log.jsonl"
STAGES = ("train_collab", "learn_semantic_ids", "finetune", "evaluate")
"""Those that have figures."""


def add_argument(parser: argparse.ArgumentParser) -> None:
    """``--track``, of a command that trains."""
    parser.add_argument(
        "--track",
        nargs="+",
        metavar="NAME",
        help=f"show figures as they come in {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]} (${VARIABLE}, or "
        "none)",
    )


def choose(names: Sequence[str] | None) -> None:
    """Use these trackers in this process and those that it starts; None: those that $LLMREC_TRACK names.

    Raises:
        ConfigError: an unknown one, or its package is not installed.
    """
    if names is not None:
        os.environ[VARIABLE] = " ".join(names)
    for name in chosen():
        if name not in TRACKERS:
            raise ConfigError(f"--track must be among {', '.join(TRACKERS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--track {name} needs its package: pip install {name}")


def chosen() -> tuple[str, ...]:
    """Names of the trackers in use."""
    return tuple(dict.fromkeys(os.environ.get(VARIABLE, "").replace(",", " ").split()))


@dataclass(kw_only=True)
class Track:
    """Where the figures of one stage go."""

    stage: str
    folder: Path
    """Its output, to be"""
    unfinished: Path
    config: Any
    trackers: dict[str, Any] = field(default_factory=dict)
    """By name"""
    thread: ThreadPoolExecutor | None = None
    """Where they are called: one that is slow holds up no step, and one that fails ends no training"""
    calls: list[tuple[str, Future]] = field(default_factory=list)
    """What they were asked for and is not known to have worked"""

    def begin(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Start the trackers, and the file anew, with the rows that a run before the last stop left."""
        rows = list(rows)
        self.unfinished.mkdir(parents=True, exist_ok=True)
        with (self.unfinished / LINES).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        choose(None)
        settings = {path: plain(value) for path, value in flatten(self.config)}
        for name in chosen():
            tracker = self.trackers[name] = made(name, self.folder, rows)
            self.call(name, tracker.start)
            if name != "tensorboard":  # it would make a run of its own of them
                self.call(name, tracker.store_init_configuration, settings)
            for _, call in self.calls:
                if error := call.exception():
                    self.trackers.clear()
                    raise ConfigError(f"--track {name} cannot start: {type(error).__name__}: {error}")

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Write a row down, and hand its numbers to the trackers."""
        with (self.unfinished / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.trackers:
            figures = {f"{self.stage}/{name}": value for name, value in numbers(row) if name != "step"}
            for name, tracker in self.trackers.items():
                # MLflow takes no @ in a name.
                mark = "_at_" if name == "mlflow" else "@"
                self.call(name, tracker.log, {key.replace("@", mark): figures[key] for key in figures}, step)
            self.let_go()

    def finish(self) -> None:
        """Close the trackers, once they have all that they were given."""
        for name, tracker in self.trackers.items():
            self.call(name, tracker.finish)
        if self.thread is not None:
            self.thread.shutdown()
        self.let_go()
        self.trackers.clear()

    def call(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        """Ask a tracker for something, behind all that was asked before."""
        if self.thread is None:
            self.thread = ThreadPoolExecutor(1, "track")
        self.calls.append((name, self.thread.submit(function, *arguments)))

    def let_go(self) -> None:
        """Part with trackers that failed, and say so; training goes on without them."""
        done = [(name, call) for name, call in self.calls if call.done()]
        self.calls = [one for one in self.calls if one not in done]
        for name, call in done:
            if (error := call.exception()) and self.trackers.pop(name, None) is not None:
                logger.warning(
                    "%s: --track %s failed, and is left out from here on: %s: %s",
                    self.stage, name, type(error).__name__, error,
                )  # fmt: skip


_track: contextvars.ContextVar[Track | None] = contextvars.ContextVar("track", default=None)


@contextlib.contextmanager
def tracking(track: Track) -> Iterator[None]:
    """Let `begin` and `log` speak to this track."""
    token = _track.set(track)
    try:
        yield
    finally:
        _track.reset(token)
        track.finish()


def begin(rows: Iterable[Mapping[str, Any]] = ()) -> None:
    """Say that training begins, or goes on after these rows of the log.

    Raises:
        ConfigError: $LLMREC_TRACK asks for what there is not.
    """
    if track := _track.get():
        track.begin(rows)


def log(row: Mapping[str, Any], step: int) -> None:
    """Hand on a row of the log, as JSON has it, at a step (or epoch) of this stage."""
    if track := _track.get():
        track.log(row, step)


def made(name: str, folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> Any:
    """An accelerate tracker for the stage whose output will be folder, not yet started.

    The run is named after its folder; TensorBoard's files go beside it, to ``tensorboard/STAGE``, where those
    of another run of the stage go, and what came after the rows that are kept is not shown.
    """
    from accelerate import tracking as of_accelerate

    from llmrec import distributed

    distributed.state()
    kind = of_accelerate.LOGGER_TYPE_TO_CLASS[name]
    parts = folder.resolve().parts
    run, group = "/".join(parts[-2:]), parts[-2]
    if name == "tensorboard":
        files = folder.parent / "tensorboard"
        if not rows:
            shutil.rmtree(files / parts[-1], ignore_errors=True)
            return kind(parts[-1], logging_dir=files)
        last = rows[-1].get("step", rows[-1].get("epoch"))
        return kind(parts[-1], logging_dir=files, purge_step=None if last is None else last + 1)
    if name == "mlflow":
        return kind(PROJECT, run_name=run)
    if name == "swanlab":
        return kind(PROJECT, experiment_name=run)
    return kind(PROJECT, name=run, group=group)


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, those of groups and lists below their names."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)):
            yield from numbers({str(place): one for place, one in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def plain(value: Any) -> Any:
    """A setting as trackers take it."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
