"""Checkpoints of a run that is still going: whole or absent, verified when read, the one before kept.

A checkpoint is a folder ``step-00000500`` with tensors.safetensors, state.json and, written last,
manifest.json with the size and SHA-256 of both. It is written under another name, flushed to disk, and
renamed, so a stop at any moment leaves the former checkpoints as they were. No pickle.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrec import running
from llmrec.errors import StaleArtifactError, StoppedError, StorageError, TrainingError
from llmrec.files import read_json, write_json
from llmrec.manifest import (
    DamagedError,
    check_files,
    describe_files,
    flush,
    flush_all,
    read_manifest,
    write_manifest,
)
from llmrec.stopping import StopRequests

logger = logging.getLogger("llmrec")

KEPT = 2
"""Checkpoints that are kept: the newest, and one to fall back on."""

FORM = 2
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
            TrainingError: a weight is NaN or infinite; such a checkpoint must not replace a good one.
            StorageError: the disk is full or cannot be written; earlier checkpoints stay.
        """
        for name, value in checkpoint.tensors.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise TrainingError(
                    f"{name} is NaN or infinite at step {checkpoint.step}; lower the learning rate. The "
                    "checkpoint before is kept, and would lead here again"
                )
        final = self.folder / f"{PREFIX}{checkpoint.step:08d}"
        scratch = self.folder / f".{final.name}.{os.getpid()}"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            self._write(scratch, checkpoint)
            if final.exists():
                drop(final)
            os.replace(scratch, final)
            flush(self.folder)
            running.note_spent(self.folder)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"the checkpoint {final} cannot be written ({error}); make room and start again, which goes "
                "on from the one before"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for old in self.found()[:-KEPT]:
            drop(old)
        return final

    def require_room(self, wanted: int) -> None:
        """Look before long work whether there is room for the checkpoints that will be kept, and the next.

        Args:
            wanted: bytes of one checkpoint.

        Raises:
            StorageError: there is not.
        """
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        held = sum(file.stat().st_size for path in self.found() for file in path.iterdir())
        needed = (KEPT + 1) * wanted - held
        if needed > free:
            raise StorageError(
                f"checkpoints in {self.folder} need {size(needed)} more and {size(free)} is free; make room, "
                "use another folder, or set save_every_minutes=0 for none"
            )

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and of this run; None if there is none.

        Damaged ones, and those of another run, are named and kept aside.
        """
        for leftover in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self.found()):
            try:
                manifest = check(path)
            except (DamagedError, StaleArtifactError) as error:
                aside = put_aside(path, "damaged")
                logger.warning("%s; kept aside as %s, going on from the one before", error, aside.name)
                continue
            if manifest.get("made_from") != self.made_from:
                aside = put_aside(path, "other")
                logger.warning(
                    "%s was made with other settings or inputs and is not used; kept aside as %s",
                    path,
                    aside.name,
                )
                continue
            running.goes_on_with(self.folder)
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
        content = {"schema": FORM, "step": checkpoint.step, "made_from": self.made_from}
        write_manifest(folder / MANIFEST, {**content, "files": describe_files(folder)})
        flush_all(folder)


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB"


def put_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that it is no longer found; its new place."""
    aside = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def drop(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a stop half way leaves nothing that looks like one."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def check(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint after comparing every file with it.

    Raises:
        DamagedError: something is missing or different.
        StaleArtifactError: another version wrote it in another form.
    """
    try:
        manifest = read_manifest(path / MANIFEST, FORM)
        check_files(path, manifest)
    except DamagedError as error:
        raise DamagedError(f"checkpoint {path.name} is damaged: {error}") from None
    return manifest


def checkpoints_here(free: tuple[str, ...] = ()) -> Checkpoints | None:
    """The checkpoints of the stage that is running; None outside of a stage.

    Args:
        free: settings that may be others when work goes on, since they change no result.
    """
    run = running.current()
    if run is None:
        return None
    fixed = {name: value for name, value in run.made_from["config"].items() if name not in free}
    return Checkpoints(run.folder / "checkpoints", run.made_from | {"config": fixed})


class EpochCheckpoints:
    """Checkpoints at the ends of epochs, for training that runs in one process.

    Everything that the next epoch depends on is kept: weights and buffers, optimiser states, the states of
    all random number generators, and what the loop itself remembers.

    Args:
        model: trained.
        optimizer: of the model.
        generators: random number generators of the loop, by name; the global ones of Python, NumPy and torch
            are added, of which a model of the user's own may draw.
        minutes: between checkpoints; 0: none.
        what: the stage, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generators: dict[str, np.random.Generator | torch.Generator],
        *,
        minutes: float,
        what: str,
    ) -> None:
        self.store = checkpoints_here()
        self.model = model
        self.optimizer = optimizer
        self.generators = generators
        self.minutes = minutes
        self.what = what
        self.saved_at = time.monotonic()

    def resume(self) -> tuple[int, dict[str, Any], dict[str, Tensor] | None]:
        """Epochs done, what the loop remembered, and the best weights; (0, {}, None) to begin with.

        Raises:
            StorageError: there is no room for checkpoints.
        """
        if self.store is not None and self.minutes:
            # Weights, the best ones, and two states of an Adam.
            self.store.require_room(4 * sum(value.nbytes for value in self._values().values()))
        found = None if self.store is None else self.store.latest()
        if found is None:
            return 0, {}, None
        tensors, state = found.tensors, found.state
        with torch.no_grad():
            for name, value in self._values().items():
                value.copy_(tensors[f"model.{name}"])
        self.optimizer.load_state_dict(unpack_optimizer(tensors, state["optimizer"]))
        for name, generator in self.generators.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(tensors[f"generator.{name}"])
            else:
                generator.bit_generator.state = state["generators"][name]
        if "global_generators" in state:  # an earlier version did not keep them
            set_global_generators(state["global_generators"])
        torch.set_rng_state(tensors["generator.torch"])
        if "generator.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["generator.cuda"])
        best = {name[5:]: value for name, value in tensors.items() if name.startswith("best.")}
        logger.info("%s: going on after epoch %s", self.what, found.step)
        return found.step, state["loop"], best or None

    def after_epoch(
        self, epoch: int, loop: dict[str, Any], best: dict[str, Tensor] | None, stop: StopRequests
    ) -> None:
        """Save if it is time, or if the run is to stop.

        Raises:
            StoppedError: the process was asked to stop; the work is saved.
        """
        asked = stop.asked
        due = self.minutes and time.monotonic() - self.saved_at >= 60 * self.minutes
        if self.store is not None and (due or asked):
            self._save(epoch, loop, best)
            self.saved_at = time.monotonic()
        if asked:
            kept = "the same command goes on from there" if self.store else "nothing was kept"
            raise StoppedError(f"{self.what}: stopped after epoch {epoch}; {kept}")

    def _save(self, epoch: int, loop: dict[str, Any], best: dict[str, Tensor] | None) -> None:
        tensors, optimizer = pack_optimizer(self.optimizer.state_dict())
        tensors |= {f"model.{name}": value.clone() for name, value in self._values().items()}
        tensors |= {f"best.{name}": value.clone() for name, value in (best or {}).items()}
        tensors["generator.torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors["generator.cuda"] = torch.cuda.get_rng_state()
        plain = {}
        for name, generator in self.generators.items():
            if isinstance(generator, torch.Generator):
                tensors[f"generator.{name}"] = generator.get_state()
            else:
                plain[name] = generator.bit_generator.state
        state = {"optimizer": optimizer, "generators": plain, "loop": loop}
        state["global_generators"] = global_generators()
        assert self.store is not None
        self.store.save(Checkpoint(step=epoch, tensors=tensors, state=state))

    def _values(self) -> dict[str, Tensor]:
        """Weights and buffers, those included that are not saved with the model."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def global_generators() -> dict[str, Any]:
    """States of the global random number generators of Python and NumPy, as JSON."""
    numbers: Any = np.random.get_state()
    name, keys, *rest = numbers
    return {"random": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def set_global_generators(states: dict[str, Any]) -> None:
    """Inverse of `global_generators`, whose tuples JSON has made lists."""
    version, numbers, spare = states["random"]
    random.setstate((version, tuple(numbers), spare))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


def pack_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as tensors by name and JSON."""
    tensors, plain = pack_states(state["state"])
    groups = [
        {name: value for name, value in group.items() if not isinstance(value, Tensor)}
        for group in state["param_groups"]
    ]
    return tensors, {"plain": plain, "groups": groups}


def unpack_optimizer(tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `pack_optimizer`; other tensors are passed over."""
    return {"state": unpack_states(tensors, state["plain"]), "param_groups": state["groups"]}


def pack_states(states: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimiser remembers of each parameter, as tensors by name and JSON."""
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

    sort("", states)
    return tensors, plain


def unpack_states(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Inverse of `pack_states`; other tensors are passed over."""
    found = {name[9:]: value for name, value in tensors.items() if name.startswith("optimizer/")}
    entries: dict[Any, Any] = {}
    for path, value in {**found, **plain}.items():
        _, number, *inner, last = path.split("/")
        place = entries.setdefault(int(number), {})
        for name in inner:
            place = place.setdefault(name, {})
        place[last] = value
    return entries
