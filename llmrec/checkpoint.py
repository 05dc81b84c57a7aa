"""Checkpoints of a run that is still going: whole or absent, verified when read, the one before kept.

A checkpoint is a folder ``step-00000500`` with tensors.safetensors, state.json and, written last,
manifest.json with the size and SHA-256 of both. It is written under another name, flushed to disk, and
renamed, so a stop at any moment leaves the former checkpoints as they were. No pickle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrec import distributed
from llmrec.artifacts import read_json, write_json
from llmrec.errors import LlmrecError

logger = logging.getLogger("llmrec")

KEPT = 2
"""Checkpoints that are kept: the newest, and one to fall back on."""

MANIFEST = "manifest.json"
PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a run needs to go on as if it had not been stopped."""

    step: int
    """Optimiser steps done"""
    tensors: dict[str, Tensor]
    """Weights, optimiser states and best weights, by name"""
    state: dict[str, Any] = field(default_factory=dict)
    """Everything else, as JSON"""


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: where they lie; made when the first is saved.
        made_from: what the run is made from (settings, inputs); checkpoints of anything else are discarded.
    """

    def __init__(self, folder: Path, made_from: Any) -> None:
        self.folder = folder
        self.made_from = json.loads(json.dumps(made_from, sort_keys=True))

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and drop those before the last `KEPT`.

        Raises:
            LlmrecError: the disk is full or cannot be written; earlier checkpoints stay.
        """
        final = self.folder / f"{PREFIX}{checkpoint.step:08d}"
        scratch = self.folder / f".{final.name}.{os.getpid()}"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            self._write(scratch, checkpoint)
            if final.exists():
                shutil.rmtree(final)
            os.replace(scratch, final)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise LlmrecError(
                f"the checkpoint {final} cannot be written ({error}); make room and start again, which goes "
                "on from the one before"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for old in self.found()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and of this run; None if there is none.

        Damaged ones are named and kept aside, those of another run deleted.
        """
        for leftover in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self.found()):
            try:
                manifest = check(path)
            except DamagedError as error:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                logger.warning("%s; kept aside as %s, going on from the one before", error, aside.name)
                continue
            if manifest.get("made_from") != self.made_from:
                logger.warning("%s was made with other settings or inputs and is not used", path)
                shutil.rmtree(path)
                continue
            return Checkpoint(
                step=manifest["step"],
                tensors=load_file(path / "tensors.safetensors"),
                state=read_json(path / "state.json"),
            )
        return None

    def found(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        plain = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
        save_file(plain, folder / "tensors.safetensors")
        write_json(folder / "state.json", checkpoint.state)
        files = {name: describe(folder / name) for name in ("tensors.safetensors", "state.json")}
        write_json(folder / MANIFEST, {"step": checkpoint.step, "made_from": self.made_from, "files": files})
        for path in (*folder.iterdir(), folder):
            flush(path)


class DamagedError(LlmrecError):
    """A checkpoint is not what its manifest says."""


def check(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint after comparing every file with it.

    Raises:
        DamagedError: something is missing or different.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        damaged = [name for name, expected in files.items() if describe(path / name) != expected]
        complete = isinstance(manifest["step"], int) and {"tensors.safetensors", "state.json"} <= set(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from None
    if damaged or not complete:
        raise DamagedError(
            f"checkpoint {path} is damaged ({', '.join(damaged) or 'its manifest is not whole'})"
        )
    return manifest


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    from llmrec.pipeline import sha256

    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class StopRequests:
    """Whether this run was asked to stop (SIGTERM, or Ctrl-C once)."""

    def __init__(self) -> None:
        self.asked = False

    def agreed(self) -> bool:
        """Whether any process was asked; with several, all must call, and all get the same answer."""
        if distributed.world_size() == 1:
            return self.asked
        return any(distributed.gather_numbers(self.asked))


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Turn SIGTERM and SIGINT into requests while work goes on; a second one acts at once.

    Outside of the main thread, where Python allows no handlers, nothing changes.
    """
    found = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _frame: Any) -> None:
        found.asked = True
        logger.warning("asked to stop: ending this step first")
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pack_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as tensors by name and JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}

    def sort(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                sort(f"{path}/{name}", inner)
        elif isinstance(value, Tensor):
            tensors[f"optimizer{path}"] = value
        else:
            plain[path] = value

    sort("", state["state"])
    groups = [
        {name: value for name, value in group.items() if not isinstance(value, Tensor)}
        for group in state["param_groups"]
    ]
    return tensors, {"plain": plain, "groups": groups}


def unpack_optimizer(tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `pack_optimizer`; other tensors are passed over."""
    found = {name[9:]: value for name, value in tensors.items() if name.startswith("optimizer/")}
    entries: dict[Any, Any] = {}
    for path, value in {**found, **state["plain"]}.items():
        _, number, *inner, last = path.split("/")
        place = entries.setdefault(int(number), {})
        for name in inner:
            place = place.setdefault(name, {})
        place[last] = value
    return {"state": entries, "param_groups": state["groups"]}
