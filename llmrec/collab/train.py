"""train_collab: learn one collaborative vector per item from the train split.

One trainer for every `CollabProvider`. It sees the train split alone; validation targets are only
ranked, to choose the epoch, and not even looked at with ``select="last"``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrec import distributed
from llmrec.artifacts import CollabEmbeddings, Interactions, Targets
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.provider import PROVIDERS
from llmrec.data.batches import length_groups, pad_histories
from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ConfigError, DataError, TrainingError
from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k
from llmrec.evaluation.rank import Scorer, rank_users
from llmrec.progress import progress

logger = logging.getLogger("llmrec")

MAX_CELLS = {"cpu": 1 << 14, "gpu": 1 << 18}
"""Most positions in one forward pass, padding included."""

OVERHEAD_CELLS = {"cpu": 512, "gpu": 1 << 15}
"""What one more forward pass of a step costs, in positions; on the CPU as measured on Beauty."""


def train_collab(config: TrainCollabConfig, data: Interactions) -> CollabEmbeddings:
    """Collaborative item vectors from a sequential model, or from a file.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: there is nothing to train on, or the file of vectors is unusable.
        TrainingError: the loss became NaN or infinite.
    """
    if config.provider == "precomputed":
        return use_precomputed(config, data)
    distributed.seed_everything(config.seed)
    settings = {"num_items": data.num_items, **asdict(getattr(config, config.provider))}
    model = PROVIDERS[config.provider](**settings).to(distributed.device())
    users = TrainingUsers.of(data, model.max_history, distributed.device())
    valid = validation_targets(config, data)
    metrics, log = fit(model, config, data, users, valid)
    state = {name: tensor.cpu().numpy().copy() for name, tensor in model.state_dict().items()}
    return CollabEmbeddings(
        catalog=data.catalog,
        provider=config.provider,
        vectors=model.item_embeddings().detach().float().cpu().numpy().copy(),
        model=settings,
        state=state,
        metrics={
            **metrics,
            "num_parameters": sum(weight.numel() for weight in model.parameters()),
            "num_targets": users.num_targets,
            "items_never_trained": int((data.train_count[1:] == 0).sum()),
        },
        log=log,
    )


def use_precomputed(config: TrainCollabConfig, data: Interactions) -> CollabEmbeddings:
    """Vectors made elsewhere; items without one get zeros and are counted."""
    assert config.vectors is not None
    vectors, missing = read_vectors(config.vectors, data.raw_ids, "train_collab.vectors")
    if missing.any():
        logger.warning("train_collab: %d of %d items have no vector", missing.sum(), data.num_items)
    return CollabEmbeddings(
        catalog=data.catalog,
        provider="precomputed",
        vectors=vectors,
        metrics={"items_without_vector": int(missing.sum())},
    )


@dataclass(frozen=True)
class TrainingUsers:
    """Train sequences on the device: the users that have something to predict."""

    item: Tensor
    """int64 (n,)"""
    start: Tensor
    """int64 (users,), first index of the last max_history + 1 train items"""
    stop: Tensor
    """int64 (users,)"""
    length: np.ndarray
    """int64 (users,), stop - start, at least 2"""

    @classmethod
    def of(cls, data: Interactions, max_history: int, device: torch.device) -> TrainingUsers:
        offset, item = data.train_sequences()
        start, stop = np.maximum(offset[:-1], offset[1:] - max_history - 1), offset[1:]
        keep = stop - start >= 2
        if not keep.any():
            raise DataError(
                f"train_collab: none of {data.num_users} users has two items in the train split, so there is "
                "no next item to learn from; give longer histories or filter less in prepare_data"
            )
        start, stop = start[keep], stop[keep]
        on_device = [torch.as_tensor(array, device=device) for array in (item, start, stop)]
        return cls(*on_device, length=stop - start)

    @property
    def num_targets(self) -> int:
        """Next items predicted in one epoch."""
        return int((self.length - 1).sum())

    def groups(self, users: np.ndarray) -> Iterator[Tensor]:
        """The sequences of some users, padded (B, T), in groups of similar length."""
        kind = "cpu" if self.item.device.type == "cpu" else "gpu"
        for group in length_groups(self.length[users], MAX_CELLS[kind], overhead_cells=OVERHEAD_CELLS[kind]):
            chosen = torch.as_tensor(users[group], device=self.item.device)
            yield pad_histories(self.item, self.start[chosen], self.stop[chosen])


def validation_targets(config: TrainCollabConfig, data: Interactions) -> Targets | None:
    """What chooses the epoch; None with select='last'."""
    if config.select == "last":
        return None
    targets = data.targets("valid")
    if len(targets) == 0:
        raise ConfigError(
            "train_collab.select='valid' needs validation targets to choose the epoch by, and the data set "
            "has none; set train_collab.select=last and train_collab.epochs, or change the split"
        )
    if len(targets) < 100:
        logger.warning("train_collab: only %d validation targets choose the epoch", len(targets))
    return targets


def fit(
    model: nn.Module,
    config: TrainCollabConfig,
    data: Interactions,
    users: TrainingUsers,
    valid: Targets | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train until the last epoch or until validation stops it; leaves the chosen weights in model.

    Returns:
        Metrics of the chosen epoch, and one log row per epoch.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    rng = np.random.default_rng(config.seed)
    log: list[dict[str, Any]] = []
    best, best_state = {"best_epoch": config.epochs}, None
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        row = {"epoch": epoch, "train_loss": train_epoch(model, optimizer, config, users, rng, epoch)}
        if valid is not None and epoch % config.eval_every_epochs == 0:
            row |= validate(model, data, valid)
        row["seconds"] = round(time.perf_counter() - started, 3)
        log.append(row)
        logger.info("train_collab: %s", ", ".join(f"{name} {value:.5g}" for name, value in row.items()))
        if "valid_ndcg@10" not in row:
            continue
        if row["valid_ndcg@10"] > best.get("valid_ndcg@10", -1.0):
            best = {"best_epoch": epoch} | {name: row[name] for name in row if name.startswith("valid")}
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        elif epoch - best["best_epoch"] >= config.patience * config.eval_every_epochs:
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    return {**best, "epochs": len(log)}, log


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainCollabConfig,
    users: TrainingUsers,
    rng: np.random.Generator,
    epoch: int,
) -> float:
    """One pass over all users in a new order; returns the mean loss per predicted item."""
    model.train()
    order = rng.permutation(len(users.length))
    steps = np.split(order, range(config.batch_size, len(order), config.batch_size))
    losses, num_targets = [], 0
    for step in progress(steps, f"train_collab epoch {epoch} of at most {config.epochs}", unit="step"):
        loss, number = train_step(model, optimizer, config.clip_norm, users.groups(step))
        losses.append(loss)
        num_targets += number
    mean = float(torch.stack(losses).double().sum()) / num_targets
    if not math.isfinite(mean):
        raise TrainingError(
            f"train_collab: the training loss became {mean} in epoch {epoch}; lower "
            f"train_collab.learning_rate (now {config.learning_rate})"
        )
    return mean


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, groups: Iterable[Tensor]
) -> tuple[Tensor, int]:
    """One update from the mean loss over all targets of the groups.

    Returns:
        Sum of the losses, a scalar left on the device, and how many targets it covers.
    """
    optimizer.zero_grad(set_to_none=True)
    total, num_targets = 0.0, 0
    for sequence in groups:
        loss, number = model.loss(sequence)
        loss.backward()
        total = total + loss.detach()
        num_targets += number
    for weight in model.parameters():
        if weight.grad is not None:
            weight.grad /= num_targets
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return total, num_targets


def validate(model: nn.Module, data: Interactions, targets: Targets) -> dict[str, float]:
    """Mean recall@10 and ndcg@10 of the validation targets, over all unseen items."""
    model.eval()
    scorer = Scorer(name="valid", score=model.score, max_history=model.max_history)
    rank = rank_users(scorer, data, targets, shard=False).rank
    return {
        "valid_ndcg@10": float(np.mean(ndcg_at_k(rank, 10))),
        "valid_recall@10": float(np.mean(recall_at_k(rank, 10))),
    }
