"""How far fine-tuning has come, and the checkpoints that a stopped run goes on from."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmrec import distributed, launched
from llmrec.checkpoint import Checkpoint, Checkpoints, pack_states, unpack_states
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.engine import Engine

logger = logging.getLogger("llmrec")


@dataclass
class Window:
    """What has been seen since the last row of the log."""

    loss: Tensor | float = 0.0
    targets: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)


@dataclass
class RunState:
    """All that the loop goes on from beside tensors; the learning rate and the order of targets follow from
    it."""

    epoch: int = 1
    """Epoch that is being trained, from 1"""
    done: int = 0
    """Its steps that are done"""
    step: int = 0
    """Optimiser steps done in all"""
    tokens: int = 0
    """Tokens seen"""
    seconds: float = 0.0
    """Time spent in steps"""
    best: tuple[float, int] | None = None
    """Best validation ndcg@10, and its epoch"""
    bad_steps: int = 0
    """Steps left out"""
    log: list[dict[str, Any]] = field(default_factory=list)
    window: Window = field(default_factory=Window)

    def as_json(self) -> dict[str, Any]:
        """Everything; of the window how long it is open in place of the time of its start."""
        window = {"loss": float(self.window.loss), "targets": self.window.targets}
        window |= {"tokens": self.window.tokens, "seconds": time.perf_counter() - self.window.started}
        plain = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        return plain | {"window": window}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RunState:
        """Inverse of `as_json`."""
        best = None if found["best"] is None else tuple(found["best"])
        window = dict(found["window"])
        window["started"] = time.perf_counter() - window.pop("seconds")
        return cls(**found | {"best": best, "window": Window(**window)})


class RunCheckpoints:
    """Checkpoints of a run on any number of processes, for a run on any other number.

    Args:
        config: settings.
        engine: whose weights and optimiser states are kept.
        store: where; None: nowhere.
    """

    def __init__(self, config: FinetuneConfig, engine: Engine, store: Checkpoints | None) -> None:
        if store is not None and not engine.resumable:
            logger.warning("finetune: no checkpoints, since 8-bit optimiser states are spread over processes")
        self.store = store if engine.resumable else None
        self.engine = engine
        self.config = config
        self.saved_at = time.monotonic()

    def require_room(self) -> None:
        """Look for room before long work.

        Raises:
            StorageError: there is none.
        """
        if self.store is None or not self.config.save_every_minutes or not launched.is_main():
            return
        # Weights, two states of Adam, and the best weights where they are kept apart.
        copies = 4 if self.config.select == "valid" else 3
        self.store.require_room(4 * copies * sum(map(torch.numel, self.engine.parameters.values())))

    def due(self) -> bool:
        """Whether it is time for the next one."""
        minutes = self.config.save_every_minutes
        return bool(self.store and minutes and time.monotonic() - self.saved_at >= 60 * minutes)

    def save(self, state: RunState, best_weights: dict[str, Tensor]) -> None:
        """Write a checkpoint of this moment; every process must call."""
        self.saved_at = time.monotonic()
        if self.store is None or not (launched.is_main() or self.engine.sharded):
            return
        begun = time.perf_counter()
        tensors, optimizer = pack_states(self.engine.optimizer_states())
        tensors |= {f"weights.{name}": value for name, value in self.engine.weights().items()}
        if not launched.is_main():
            return
        tensors |= {f"best.{name}": value for name, value in best_weights.items()}
        plain = {"run": state.as_json(), "optimizer": optimizer}
        self.store.save(Checkpoint(step=state.step, tensors=tensors, state=plain))
        logger.info("finetune: step %s saved in %.1f s", state.step, time.perf_counter() - begun)
        self.saved_at = time.monotonic()

    def resume(self) -> tuple[RunState, dict[str, Tensor]]:
        """Take up the newest checkpoint; a new run's state if there is none. Every process must call.

        Returns:
            State, and the best weights so far.
        """
        found = None
        if self.store is not None:
            # The main process looks first, since looking also tidies up.
            if not launched.is_main():
                distributed.wait()
            found = self.store.latest()
            if launched.is_main():
                distributed.wait()
            step = 0 if found is None else found.step
            distributed.check_equal(step, "step of the checkpoint to go on from")
        if found is None:
            return RunState(), {}
        self.engine.set_weights({name: found.tensors[f"weights.{name}"] for name in self.engine.parameters})
        self.engine.set_optimizer_states(unpack_states(found.tensors, found.state["optimizer"]))
        best = {
            name.removeprefix("best."): value.to(distributed.device())
            for name, value in found.tensors.items()
            if name.startswith("best.")
        }
        return RunState.from_json(found.state["run"]), best
