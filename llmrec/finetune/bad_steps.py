"""Steps whose loss or gradient is NaN or infinite: left out, named and counted; too many end the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrec import launched
from llmrec.errors import TrainingError
from llmrec.files import write_json
from llmrec.interactions import Interactions, Targets

logger = logging.getLogger("llmrec")


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimiser step whose outcome has not been looked at yet."""

    epoch: int
    step: int
    """Number in the whole run, from 1"""
    targets: Targets
    bad: Tensor
    """bool (), on the device: looking at it would wait for the device"""


class BadSteps:
    """Watches over the steps of a run.

    Args:
        allowed: how many may be bad before the run ends; each is left out.
        data: names the users and items of a bad step.
        folder: where a bad step's users and items are written down; None: nowhere.
        advice: what to do about it.
    """

    def __init__(self, allowed: int, data: Interactions, folder: Path | None, advice: str) -> None:
        self.allowed = allowed
        self.data = data
        self.folder = folder
        self.advice = advice
        self.count = 0
        self.open: list[Step] = []

    def watch(self, step: Step) -> None:
        """Remember a step until `settle`."""
        self.open.append(step)

    def settle(self) -> list[dict[str, Any]]:
        """Look at all steps since the last time.

        Returns:
            A row of the log for each that was left out.

        Raises:
            TrainingError: more are bad than allowed.
        """
        if not self.open:
            return []
        bad = torch.stack([step.bad for step in self.open]).tolist()
        found = [step for step, is_bad in zip(self.open, bad) if is_bad]
        self.open = []
        for step in found:
            self.count += 1
            where = self._describe(step)
            if self.count > self.allowed:
                allowed = f", and {self.allowed} are allowed (finetune.bad_steps)" if self.allowed else ""
                raise TrainingError(
                    f"the loss or a gradient is NaN or infinite in step {step.step}{allowed}{where}; "
                    f"{self.advice}"
                )
            logger.warning(
                "finetune: step %s left out, its loss or a gradient is NaN or infinite (%s of at most %s)%s",
                step.step, self.count, self.allowed, where,
            )  # fmt: skip
        reason = "its loss or a gradient is NaN or infinite"
        return [
            {"epoch": step.epoch, "step": step.step, "left_out": reason, "targets": len(step.targets)}
            for step in found
        ]

    def _describe(self, step: Step) -> str:
        """Write down whose step it was, and say where; the log would be published with the weights."""
        if self.folder is None or not launched.is_main():
            return ""
        raw_ids = self.data.raw_ids
        path = self.folder / f"bad_step_{step.step}.json"
        content = {
            "epoch": step.epoch,
            "step": step.step,
            "users": [self.data.user_raw_ids[user] for user in step.targets.user.tolist()],
            "items": [raw_ids[item - 1] for item in step.targets.item.tolist()],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        return f"; its users and items are in {path}"
