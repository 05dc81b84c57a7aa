"""The loop of train_collab: epochs of optimiser steps, with validation, checkpoints and a log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrec import distributed, tracking
from llmrec.checkpoint import EpochCheckpoints
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.losses import Loss, Pooled
from llmrec.collab.provider import scorer_of
from llmrec.collab.rows import TrainingRows
from llmrec.data.batches import Batch
from llmrec.errors import TrainingError
from llmrec.evaluation.metrics import of_validation
from llmrec.evaluation.rank import Scorer, rank_users
from llmrec.interactions import Interactions, Targets
from llmrec.precision import matrix_precision, tf32
from llmrec.progress import progress
from llmrec.stopping import END_OF_EPOCH, stop_requests

logger = logging.getLogger("llmrec")


def fit(
    model: nn.Module,
    config: TrainCollabConfig,
    data: Interactions,
    rows: TrainingRows,
    valid: Targets | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train until the last epoch or until validation stops it; leaves the chosen weights in model.

    Returns:
        Metrics of the chosen epoch, and one log row per epoch.
    """
    rng = np.random.default_rng(config.seed)
    training = Training(model, optimizer_of(model, config), config, data, rows, valid, rng)
    checkpoints = EpochCheckpoints(
        model, training.optimizer, {"order": rng}, minutes=config.save_every_minutes, what="train_collab"
    )
    done, loop, best_state = checkpoints.resume()
    training.log = loop.get("log", [])
    training.best = loop.get("best", training.best)
    tracking.begin(training.log)
    with stop_requests(END_OF_EPOCH) as stop:
        for epoch in range(done + 1, config.epochs + 1):
            if training.has_converged():
                break
            best_state = training.one_epoch(epoch) or best_state
            state = {"log": training.log, "best": training.best}
            checkpoints.after_epoch(epoch, state, best_state, stop)
    if best_state is not None:
        model.load_state_dict(best_state)
    return {**training.best, "epochs": len(training.log)}, training.log


@dataclass
class Training:
    """What is trained, on what, and what came of its epochs so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainCollabConfig
    data: Interactions
    rows: TrainingRows
    valid: Targets | None
    rng: np.random.Generator
    """Of the order of the rows"""
    log: list[dict[str, Any]] = field(default_factory=list)
    """A row per epoch"""
    best: dict[str, Any] = field(init=False)
    """``best_epoch``, and what validation said of it; the last one, where nothing is validated"""

    def __post_init__(self) -> None:
        self.best = {"best_epoch": self.config.epochs}

    def has_converged(self) -> bool:
        """Whether validation has not improved for as long as the settings wait."""
        patience, last = self.config.patience, self.log[-1] if self.log else {}
        if patience is None or "valid_ndcg@10" not in last:
            return False
        return last["epoch"] - self.best["best_epoch"] >= patience * self.config.eval_every_epochs

    def one_epoch(self, epoch: int) -> dict[str, Tensor] | None:
        """Train, validate and log one epoch; its weights if they are the best so far."""
        model, config = self.model, self.config
        started = time.perf_counter()
        before = sum(row["steps"] for row in self.log)
        means = train_epoch(model, self.optimizer, config, self.rows, self.rng, epoch, before)
        row = {"epoch": epoch, **means, "train_seconds": round(time.perf_counter() - started, 3)}
        if self.valid is not None and (epoch % config.eval_every_epochs == 0 or epoch == config.epochs):
            row |= validate(model, self.data, self.valid, mask_seen=config.mask_seen)
        row["seconds"] = round(time.perf_counter() - started, 3)
        self.log.append(row)
        tracking.log(row, epoch)
        logger.info("train_collab: %s", describe(row, self.best))
        if "valid_ndcg@10" not in row or row["valid_ndcg@10"] <= self.best.get("valid_ndcg@10", -1.0):
            return None
        self.best |= {"best_epoch": epoch} | {name: row[name] for name in row if name.startswith("valid")}
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def optimizer_of(model: nn.Module, config: TrainCollabConfig) -> torch.optim.Optimizer:
    """AdamW; biases, norms and what models mark with ``no_weight_decay`` are not decayed."""
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for weight in model.parameters():
        spared = weight.ndim < 2 or getattr(weight, "no_weight_decay", False)
        (kept if spared else decayed).append(weight)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: TrainCollabConfig, epoch: int) -> float:
    """Of an epoch, counted from 1."""
    if config.decay_every_epochs is None:
        return config.learning_rate
    return config.learning_rate * config.decay_rate ** ((epoch - 1) // config.decay_every_epochs)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainCollabConfig,
    rows: TrainingRows,
    rng: np.random.Generator,
    epoch: int,
    before: int = 0,
) -> dict[str, Any]:
    """One pass over all rows in a new order.

    Args:
        before: optimiser steps of the epochs before.

    Returns:
        ``train_loss``, the mean loss per target; ``parts``, what the model reports, if anything; the
        number of ``steps``; and ``gradient_norm`` and ``largest_gradient_norm``, before clipping.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    steps = rows.steps(config.batch_by, config.batch_size, rng)
    sums, num_targets = Sums(), 0
    label = f"train_collab epoch {epoch} of at most {config.epochs}"
    for number, chosen in enumerate(progress(steps, label, unit="step")):
        batches = rows.batches(chosen, step=before + number, epoch=epoch)
        num_targets += train_step(model, optimizer, config, batches, sums)
    if not num_targets:
        raise TrainingError(
            f"train_collab: {config.provider} found nothing to predict in all of epoch {epoch}: its loss() "
            "gave num_targets=0 for every batch"
        )
    means = sums.over(num_targets) | {"steps": len(steps)} | sums.gradients()
    for name, what in (("train_loss", "training loss"), ("largest_gradient_norm", "gradient's norm")):
        if not math.isfinite(means[name]):
            raise TrainingError(
                f"train_collab: the {what} became {means[name]} in epoch {epoch}; lower "
                f"train_collab.learning_rate (now {config.learning_rate})"
            )
    return means


class Sums:
    """Running sums of losses and of the parts that models report, left on the device until read."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self.norms: list[Tensor] = []

    def add(self, loss: Loss) -> None:
        for name, part in {"train_loss": loss.total.detach(), **loss.parts}.items():
            added = part.double()
            self.parts[name] = self.parts[name] + added if name in self.parts else added

    def gradients(self) -> dict[str, float]:
        """The mean and the largest norm of the steps' gradients."""
        norms = torch.stack(self.norms)
        return {"gradient_norm": float(norms.mean()), "largest_gradient_norm": float(norms.max())}

    def over(self, num_targets: int) -> dict[str, Any]:
        """The means per target: ``train_loss`` and, if there are any, ``parts``, with the pooled figures."""
        means = {
            name: (part.figure() if isinstance(part, Pooled) else part / num_targets).tolist()
            for name, part in self.parts.items()
        }
        loss = {"train_loss": means.pop("train_loss")}
        return {**loss, "parts": means} if means else loss


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    config: TrainCollabConfig,
    batches: Iterable[Batch],
    sums: Sums,
) -> int:
    """One update from the mean loss over all targets of the batches, added to sums; their number. Without
    any target nothing is updated."""
    optimizer.zero_grad(set_to_none=True)
    num_targets, device = 0, distributed.device()
    for batch in batches:
        with matrix_precision(config.precision, device):
            loss = model.loss(batch)
        if not loss.num_targets:  # of a model of the user's own, which may draw what it predicts
            continue
        with tf32(device, config.precision == "tf32"):
            loss.total.backward()
        sums.add(loss)
        num_targets += loss.num_targets
    if not num_targets:
        return 0
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    torch._foreach_div_(gradients, num_targets)
    sums.norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).detach())
    optimizer.step()
    return num_targets


def validate(
    model: nn.Module, data: Interactions, targets: Targets, *, mask_seen: bool = True
) -> dict[str, float]:
    """Mean recall@10 and ndcg@10 of the validation targets, over all items or, with mask_seen, the unseen."""
    model.eval()
    return valid_metrics(scorer_of(model, "valid", quick=True), data, targets, mask_seen)


def valid_metrics(scorer: Scorer, data: Interactions, targets: Targets, mask_seen: bool) -> dict[str, float]:
    """See `validate`."""
    return of_validation(rank_users(scorer, data, targets, mask_seen=mask_seen, shard=False).rank)


def describe(row: dict[str, Any], best: dict[str, Any]) -> str:
    """What a user waits for, of a log row and the best epoch before; all else is in the log file."""
    parts = [f"epoch {row['epoch']}", f"loss {row['train_loss']:.4f}"]
    if "valid_ndcg@10" in row:
        parts.append(f"valid ndcg@10 {row['valid_ndcg@10']:.4f}, recall@10 {row['valid_recall@10']:.4f}")
        if row["valid_ndcg@10"] <= best.get("valid_ndcg@10", -1.0):
            parts.append(f"best {best['valid_ndcg@10']:.4f} in epoch {best['best_epoch']}")
    return ", ".join([*parts, f"{row['seconds']:.1f} s"])
