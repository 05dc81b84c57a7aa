"""train_collab: learn one collaborative vector per item from the train split.

One trainer for every `CollabProvider`. It sees the train split alone, and the validation items if told so;
else these are only ranked, to choose the epoch, and not even looked at with ``select="last"``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrec import distributed, tracking
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, check_same_catalog
from llmrec.checkpoint import EpochCheckpoints
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.content import principal_components
from llmrec.collab.losses import Loss, Pooled
from llmrec.collab.own_checks import check_provider
from llmrec.collab.provider import make_provider, scorer_of
from llmrec.collab.rows import TrainingRows
from llmrec.data.batches import Batch
from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ConfigError, TrainingError
from llmrec.evaluation.metrics import of_validation
from llmrec.evaluation.rank import Scorer, popularity, rank_users
from llmrec.interactions import Interactions, Sequences, Split, Targets
from llmrec.precision import matrix_precision, tf32
from llmrec.progress import progress
from llmrec.stopping import END_OF_EPOCH, stop_requests

logger = logging.getLogger("llmrec")

SHOWN_ITEMS = 8
"""Most typical items of a group that metrics name."""

FEW_ROWS = 4
"""Rows that a model of the user's own is tried on before it is trained."""


def train_collab(
    config: TrainCollabConfig, data: Interactions, content: ContentEmbeddings | None = None
) -> CollabEmbeddings:
    """Collaborative item vectors from a sequential model, or from a file.

    Args:
        config: settings.
        data: who interacted with what.
        content: text and image vectors, for models whose settings ask for them.

    Raises:
        ConfigError: a setting does not fit the data; or content is missing, or nobody asked for it; or a
            model of the user's own does not do what it must.
        DataError: there is nothing to train on, or the file of vectors is unusable.
        TrainingError: the loss became NaN or infinite.
    """
    if content is not None and not config.content:
        raise ConfigError(
            f"encoded items were given, and provider={config.provider!r} as it is set asks for none; leave "
            "them out"
        )
    if config.provider == "precomputed":
        return use_precomputed(config, data)
    distributed.seed_everything(config.seed)
    settings = {"num_items": data.num_items, **config.of_model}
    components = content_components(config, data, content)
    model: Any = make_provider(config.provider, settings)
    if model.uses_time and not data.knows_times:
        logger.warning(
            "train_collab: %s reads times, and these data have places in histories in their stead%s",
            config.provider,
            "" if config.is_own else f"; leave that out with train_collab.{config.provider}.temporal=false",
        )  # fmt: skip
    if components:
        model.content.set_content(components)
    model = model.to(distributed.device())
    splits: tuple[Split, ...] = ("train", "valid") if config.include_valid else ("train",)
    sequences = data.sequences(*splits)
    rows = training_rows(model, config, sequences)
    valid = validation_targets(config, data)
    if config.is_own:
        again = lambda: make_provider(config.provider, settings).to(distributed.device())  # noqa: E731
        check_provider(config.provider, model, first_batch(rows), data.num_items, again)
    metrics, log = fit(model, config, data, rows, valid)
    if valid is not None:
        warn_if_popularity_is_as_good(config, metrics, data, valid)
    if hasattr(model, "never_began") and (missed := model.never_began(metrics["epochs"])):
        logger.warning("train_collab: %s ended with epoch %d, %s", config.provider, metrics["epochs"], missed)
    state = {name: tensor.cpu().numpy().copy() for name, tensor in model.state_dict().items()}
    vectors = model.item_embeddings().detach().float().cpu().numpy().copy()
    return CollabEmbeddings(
        catalog=data.catalog,
        provider=config.provider,
        vectors=vectors,
        model=settings,
        state=state,
        metrics={
            **metrics,
            "num_parameters": sum(weight.numel() for weight in model.parameters()),
            "num_targets": rows.num_targets,
            "items_never_trained": data.num_items - rows.num_items,
            "mean_vector_norm": mean_norm(vectors),
            "trained_on": list(splits),
            **item_groups(model),
        },
        log=log,
    )


def training_rows(model: Any, config: TrainCollabConfig, sequences: Sequences) -> TrainingRows:
    """Sequences as the rows that the settings ask for, on this process's device."""
    layout = model.layout if config.layout == "auto" else config.layout
    windows = config.windows
    if windows == "auto":
        windows = "all" if model.layout == "prefixes" else "last"
    return TrainingRows.of(sequences, model.max_history, layout, distributed.device(), windows)


def first_batch(rows: TrainingRows) -> Batch:
    """Of a few rows."""
    return next(rows.batches(np.arange(min(FEW_ROWS, rows.num_rows))))


def item_groups(model: Any) -> dict[str, Any]:
    """What a model that sorts items into groups made of them, as ``item_groups``: the groups' name, and of
    each the share of items that belong to it most and the items that belong to it most of all."""
    if not hasattr(model, "item_groups"):
        return {}
    name, weights = model.eval().item_groups()
    if not weights.shape[1]:
        return {}
    share = weights[1:].argmax(1).bincount(minlength=weights.shape[1]) / (len(weights) - 1)
    best = weights[1:].topk(min(SHOWN_ITEMS, len(weights) - 1), dim=0)
    groups = [
        {"share": round(float(share[k]), 4), "items": (best.indices[:, k] + 1).tolist(),
         "weights": [round(value, 4) for value in best.values[:, k].tolist()]}
        for k in range(weights.shape[1])
    ]  # fmt: skip
    return {"item_groups": {"name": name, "groups": groups}}


def content_components(
    config: TrainCollabConfig, data: Interactions, content: ContentEmbeddings | None
) -> dict[str, np.ndarray]:
    """What the model's settings ask for, by modality: see `principal_components`.

    Raises:
        ConfigError: it is not there.
    """
    setting = f"train_collab.{config.provider}.content"
    if not config.content:
        return {}
    if content is None:
        raise ConfigError(f"{setting}={','.join(config.content)} needs the output of encode_items")
    check_same_catalog(data, content)
    for name in config.content:
        if name not in content.vectors:
            raise ConfigError(f"{setting} names {name} vectors, which encode_items did not make")
    width = getattr(config, config.provider).content_dim
    return {name: principal_components(content.vectors[name], width) for name in config.content}


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
        metrics={"items_without_vector": int(missing.sum()), "mean_vector_norm": mean_norm(vectors)},
    )


def mean_norm(vectors: np.ndarray) -> float:
    """Mean length of the items' vectors (N + 1, D) without row 0; models differ by orders of magnitude."""
    return float(np.linalg.norm(vectors[1:], axis=1).mean())


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
    rows: TrainingRows,
    valid: Targets | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train until the last epoch or until validation stops it; leaves the chosen weights in model.

    Returns:
        Metrics of the chosen epoch, and one log row per epoch.
    """
    optimizer = optimizer_of(model, config)
    rng = np.random.default_rng(config.seed)
    checkpoints = EpochCheckpoints(
        model, optimizer, {"order": rng}, minutes=config.save_every_minutes, what="train_collab"
    )
    done, loop, best_state = checkpoints.resume()
    log: list[dict[str, Any]] = loop.get("log", [])
    best = loop.get("best", {"best_epoch": config.epochs})
    tracking.begin(log)
    with stop_requests(END_OF_EPOCH) as stop:
        for epoch in range(done + 1, config.epochs + 1):
            if finished(config, best, log):
                break
            best_state = one_epoch(model, optimizer, config, data, rows, valid, rng, log, best) or best_state
            checkpoints.after_epoch(epoch, {"log": log, "best": best}, best_state, stop)
    if best_state is not None:
        model.load_state_dict(best_state)
    return {**best, "epochs": len(log)}, log


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


def finished(config: TrainCollabConfig, best: dict[str, Any], log: list[dict[str, Any]]) -> bool:
    """Whether validation has not improved for as long as the settings wait."""
    if config.patience is None or not log or "valid_ndcg@10" not in log[-1]:
        return False
    return log[-1]["epoch"] - best["best_epoch"] >= config.patience * config.eval_every_epochs


def one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainCollabConfig,
    data: Interactions,
    rows: TrainingRows,
    valid: Targets | None,
    rng: np.random.Generator,
    log: list[dict[str, Any]],
    best: dict[str, Any],
) -> dict[str, Tensor] | None:
    """Train, validate and log one epoch; its weights if they are the best so far."""
    epoch = len(log) + 1
    started = time.perf_counter()
    before = sum(row["steps"] for row in log)
    row = {"epoch": epoch, **train_epoch(model, optimizer, config, rows, rng, epoch, before)}
    row["train_seconds"] = round(time.perf_counter() - started, 3)
    if valid is not None and (epoch % config.eval_every_epochs == 0 or epoch == config.epochs):
        row |= validate(model, data, valid, mask_seen=config.mask_seen)
    row["seconds"] = round(time.perf_counter() - started, 3)
    log.append(row)
    tracking.log(row, epoch)
    logger.info("train_collab: %s", describe(row, best))
    if "valid_ndcg@10" not in row or row["valid_ndcg@10"] <= best.get("valid_ndcg@10", -1.0):
        return None
    best |= {"best_epoch": epoch} | {name: row[name] for name in row if name.startswith("valid")}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


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


def warn_if_popularity_is_as_good(
    config: TrainCollabConfig, metrics: dict[str, Any], data: Interactions, valid: Targets
) -> None:
    """Say so if a model has learned nothing of its users: its vectors would look like any others."""
    popular = valid_metrics(popularity(data), data, valid, config.mask_seen)["valid_ndcg@10"]
    if metrics["valid_ndcg@10"] <= popular:
        logger.warning(
            "train_collab: validation ndcg@10 of %s is %.4f (epoch %d of %d), and of popularity alone %.4f: "
            "it has learned nothing of its users; try another train_collab.learning_rate, smaller steps "
            "(train_collab.batch_size) or more train_collab.patience",
            *(config.provider, metrics["valid_ndcg@10"], metrics["best_epoch"], metrics["epochs"], popular),
        )


def describe(row: dict[str, Any], best: dict[str, Any]) -> str:
    """What a user waits for, of a log row and the best epoch before; all else is in the log file."""
    parts = [f"epoch {row['epoch']}", f"loss {row['train_loss']:.4f}"]
    if "valid_ndcg@10" in row:
        parts.append(f"valid ndcg@10 {row['valid_ndcg@10']:.4f}, recall@10 {row['valid_recall@10']:.4f}")
        if row["valid_ndcg@10"] <= best.get("valid_ndcg@10", -1.0):
            parts.append(f"best {best['valid_ndcg@10']:.4f} in epoch {best['best_epoch']}")
    return ", ".join([*parts, f"{row['seconds']:.1f} s"])
