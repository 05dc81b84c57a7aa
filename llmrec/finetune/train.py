"""finetune: train MME-SID on packed rows, with accelerate.

An optimiser step always holds `batch_targets` targets, however they are packed and however many
processes share them, so results do not depend on packing or world size beyond rounding.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from llmrec import distributed
from llmrec.artifacts import (
    CollabEmbeddings,
    ContentEmbeddings,
    Interactions,
    SemanticIds,
    Targets,
    check_same_catalog,
)
from llmrec.data.batches import length_groups, pad_histories
from llmrec.errors import ArtifactMismatchError, TrainingError
from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k
from llmrec.evaluation.rank import rank_users
from llmrec.finetune import build
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.model import MMESID
from llmrec.finetune.packing import PackedRows, count_tokens, group_rows, pack
from llmrec.finetune.scoring import heads_of, load_scorer, scorer_of
from llmrec.progress import progress

logger = logging.getLogger("llmrec")

CHECKED_HISTORIES = 64
ALIGN_ITEMS = 1024


@distributed.every_process
def finetune(
    config: FinetuneConfig,
    data: Interactions,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
) -> Adapter:
    """Fine-tune the base model on the train split.

    Every training item after which something was seen is a target; its history is all that came
    before it in the train split (MME-SID section 4.3; the official release trains the same instances,
    except that it pads histories of 0 and 1 items to two slots).

    Raises:
        ConfigError: settings that cannot work with these inputs.
        TrainingError: the loss became NaN or infinite.
    """
    check_same_catalog(data, collab, content, ids)
    device = distributed.device()
    distributed.seed_everything(config.seed)
    prompt = build.load_prompt(config)
    base = build.load_base(config, prompt)
    vectors = build.item_vectors(config, collab, content, ids)
    train_count = torch.from_numpy(data.train_count)
    model = build.build_model(config, base, prompt, vectors, ids, train_count, device)
    trainer = Trainer(config, data, model)
    if config.ctrl_stage == "two":
        align_first(config, model, data.num_items)
    trainer.run()
    heads = {name: value.detach().cpu() for name, value in heads_of(model).items()}
    weights: dict[str, Any] = {}
    if config.is_mini:
        weights["base"] = {name: value.cpu() for name, value in base.state_dict().items()}
        weights["base_config"] = base.config.to_dict()
    else:
        weights["lora"], weights["lora_config"] = build.lora_weights(base, config)
    adapter = Adapter(
        catalog=data.catalog,
        settings=build.settings_of(config, prompt, base),
        heads={**heads, "train_count": train_count},
        metrics=trainer.metrics(),
        log=trainer.log,
        **weights,
    )
    if distributed.is_main():
        check_saved(adapter, trainer.sample_scores(), data, collab, content, ids)
    return adapter


def check_saved(
    adapter: Adapter,
    expected: tuple[Tensor, Tensor],
    data: Interactions,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
) -> None:
    """Save, load and compare scores, so that no run ends with weights that cannot be loaded.

    Raises:
        ArtifactMismatchError: if the loaded model scores differently.
    """
    history, scores = expected
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder))
        loaded = load_scorer(Adapter.load(Path(folder)), collab, content, ids)
    difference = (loaded.score(history) - scores)[:, 1:].abs().max().item()
    tolerance = 0.0 if history.device.type == "cpu" else 1e-3 * scores.abs().max().item()
    if not difference <= tolerance:
        raise ArtifactMismatchError(
            f"the saved adapter scores differently from the trained one (largest difference {difference:g})"
        )
    logger.info("finetune: saved, loaded and compared; largest score difference %g", difference)


def align_first(config: FinetuneConfig, model: MMESID, num_items: int) -> None:
    """Train the item tokens' alignment loss alone, over all items, before the language model is tuned."""
    parameters = [value for value in model.item_tokens.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(config.seed)
    device = model.instruction.device
    for _ in progress(range(config.ctrl_epochs), "align", unit="epoch"):
        order = torch.from_numpy(rng.permutation(num_items) + 1).to(device)
        for items in order.split(ALIGN_ITEMS):
            loss = model.item_tokens.alignment(items)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    logger.info("finetune: alignment before fine-tuning, loss %.4f", float(loss.detach()))


@dataclass
class Progress:
    """What the current log window has seen."""

    loss: Tensor | float = 0.0
    targets: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)


class Trainer:
    """The loop: epochs of optimiser steps of micro-batches.

    Args:
        config: settings.
        data: interactions; the train split is learned, the valid split is only ranked.
        model: trained in place.
    """

    def __init__(self, config: FinetuneConfig, data: Interactions, model: MMESID) -> None:
        distributed.state()
        self.config = config
        self.data = data
        self.model = model
        self.accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
        self.device = distributed.device()
        self.item = torch.from_numpy(data.item).to(self.device)
        self.targets = data.targets("train", max_history=config.max_history, max_targets=config.max_targets)
        self.steps_per_epoch = math.ceil(len(self.targets) / config.batch_targets)
        self.num_steps = config.epochs * self.steps_per_epoch
        parameters = list(build.trainable(model).values())
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        self.generator = np.random.default_rng(config.seed)
        self.log: list[dict[str, Any]] = []
        self.step = 0
        self.total_tokens = 0
        self.seconds = 0.0
        self.best: tuple[float, int, dict[str, Tensor]] | None = None

    def run(self) -> None:
        """Train all epochs; the model holds the selected weights afterwards."""
        logger.info(
            "finetune: %s targets, %s steps, %s trainable parameters",
            f"{len(self.targets):,}", f"{self.num_steps:,}",
            f"{build.parameter_counts(self.model)['trainable']:,}",
        )  # fmt: skip
        with progress(None, "finetune", total=self.num_steps, unit="step") as bar:
            for epoch in range(1, self.config.epochs + 1):
                self._train_epoch(epoch, bar)
                every = self.config.eval_every_epochs
                if every and (epoch % every == 0 or epoch == self.config.epochs):
                    self._validate(epoch)
        if self.config.select == "valid" and self.best is not None:
            with torch.no_grad():
                for name, value in self.best[2].items():
                    self.model.get_parameter(name).copy_(value)

    def metrics(self) -> dict[str, Any]:
        """Totals of the run, for metrics.json."""
        shown = [row for row in self.log if "valid_ndcg@10" in row]
        kept = self.best[1] if self.config.select == "valid" and self.best else self.config.epochs
        return {
            "targets_per_epoch": len(self.targets),
            "steps": self.step,
            "tokens": self.total_tokens,
            "train_seconds": round(self.seconds, 3),
            "epoch_kept": kept,
            "valid": next((row for row in shown if row["epoch"] == kept), None),
            "parameters": build.parameter_counts(self.model),
        }

    def sample_scores(self) -> tuple[Tensor, Tensor]:
        """A few histories and their scores by the trained model."""
        number = min(CHECKED_HISTORIES, len(self.targets))
        sample = self.targets.take(np.linspace(0, len(self.targets) - 1, number).astype(np.int64))
        start, stop = (torch.from_numpy(ends).to(self.device) for ends in (sample.start, sample.stop))
        history = pad_histories(self.item, start, stop)
        return history, scorer_of(self.model, self.config).score(history)

    def _train_epoch(self, epoch: int, bar: tqdm) -> None:
        self.model.train()
        window = Progress()
        for chosen in epoch_steps(self.targets, self.config, self.generator):
            begun = time.perf_counter()
            loss, tokens = self._train_step(self.targets.take(chosen))
            self.seconds += time.perf_counter() - begun
            self.step += 1
            self.total_tokens += tokens
            window.loss = window.loss + loss
            window.targets += len(chosen)
            window.tokens += tokens
            bar.update()
            if self.step % self.config.log_every_steps == 0 or self.step % self.steps_per_epoch == 0:
                self._log_window(epoch, window, bar)
                window = Progress()

    def _train_step(self, targets: Targets) -> tuple[Tensor, int]:
        """One optimiser step; the summed loss of all processes' targets and the tokens it took."""
        total = torch.zeros((), device=self.device)
        micro_batches = list(self._micro_batches(targets))
        for number, groups in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    loss = self.wrapped(groups)
                # DDP averages gradients over processes; the step's loss is the mean over its targets.
                scale = distributed.world_size() / len(targets)
                self.accelerator.backward(loss * scale)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if distributed.world_size() > 1:
            total = self.accelerator.reduce(total, "sum")
        tokens = count_tokens(
            targets,
            instruction=len(self.model.instruction),
            response=len(self.model.response),
            layout=self.config.layout,
            shared=self.model.share_instruction,
            tokens_per_item=self.model.item_tokens.tokens_per_item,
        )
        return total, tokens

    def _micro_batches(self, targets: Targets) -> Iterator[list[PackedRows]]:
        """This process's share of a step: forward passes of a few groups of similar row length."""
        row = group_rows(targets, self.config.layout)
        length = row_lengths(targets, row, len(self.model.response), self.model.item_tokens.tokens_per_item)
        if not self.model.share_instruction:
            length += len(self.model.instruction)
        world, own = distributed.world_size(), distributed.rank()
        if row[-1] + 1 < world:
            raise TrainingError(
                f"an optimiser step of {len(targets)} targets has {row[-1] + 1} rows for {world} processes; "
                "raise finetune.batch_targets, or use fewer processes"
            )
        order = np.argsort(-length, kind="stable")
        mine = order[own::world]
        groups, cells = [], 0
        for group in length_groups(length[mine], self.config.micro_batch_tokens):
            size = len(group) * int(length[mine[group]].max())
            if groups and cells + size > self.config.micro_batch_tokens:
                yield groups
                groups, cells = [], 0
            chosen = np.flatnonzero(np.isin(row, mine[group]))
            groups.append(pack(self.item, targets.take(chosen), row[chosen]))
            cells += size
        yield groups

    def _log_window(self, epoch: int, window: Progress, bar: tqdm) -> None:
        loss = float(window.loss) / window.targets
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}; lower finetune.learning_rate "
                f"({self.config.learning_rate:g}) or use finetune.precision=fp32"
            )
        seconds = time.perf_counter() - window.started
        row = {
            "epoch": epoch,
            "step": self.step,
            "loss": loss,
            "learning_rate": self.schedule.get_last_lr()[0],
            "tokens_per_second": round(window.tokens / seconds, 1),
            "targets_per_second": round(window.targets / seconds, 1),
        }
        self.log.append(row)
        bar.set_postfix_str(f"epoch {epoch}, loss {loss:.4f}, {row['tokens_per_second']:,.0f} tokens/s")

    def _validate(self, epoch: int) -> None:
        targets = self.data.targets("valid")
        if not len(targets):
            return
        scorer = scorer_of(self.model, self.config)
        rank = rank_users(scorer, self.data, targets, shard=True).rank
        row = {
            "epoch": epoch,
            "step": self.step,
            "valid_ndcg@10": float(ndcg_at_k(rank, 10).mean()),
            "valid_recall@10": float(recall_at_k(rank, 10).mean()),
            "fusion": fusion_shares(self.model),
        }
        self.log.append(row)
        logger.info(
            "finetune: epoch %s, valid ndcg@10 %.4f, recall@10 %.4f",
            epoch, row["valid_ndcg@10"], row["valid_recall@10"],
        )  # fmt: skip
        if self.best is None or row["valid_ndcg@10"] > self.best[0]:
            kept = {name: value.detach().clone() for name, value in build.trainable(self.model).items()}
            self.best = (row["valid_ndcg@10"], epoch, kept if self.config.select == "valid" else {})

    def _learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero; never 0 at the first step."""
        warmup = min(self.config.warmup_steps, self.num_steps // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.num_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def epoch_steps(targets: Targets, config: FinetuneConfig, generator: np.random.Generator) -> list[np.ndarray]:
    """Which targets each optimiser step of one epoch holds.

    Users (packed) or single targets (per_prefix) are shuffled and laid end to end; every
    `batch_targets` targets make a step, so a user may straddle two steps.
    """
    row = group_rows(targets, config.layout)
    place = generator.permutation(int(row[-1]) + 1)
    order = np.argsort(place[row], kind="stable")
    return np.split(order, range(config.batch_targets, len(order), config.batch_targets))


def row_lengths(targets: Targets, row: np.ndarray, response: int, tokens_per_item: int = 1) -> np.ndarray:
    """Tokens of each row without instruction: its longest history and its response copies."""
    longest = np.zeros(int(row[-1]) + 1, dtype=np.int64)
    np.maximum.at(longest, row, targets.stop - targets.start)
    return tokens_per_item * np.maximum(longest, 1) + response * np.bincount(row)


def fusion_shares(model: MMESID) -> dict[str, dict[str, float]] | None:
    """Per score source: mean weight, and share of items whose largest weight it is."""
    scores = model.item_scores
    if not scores.modalities:
        return None
    with torch.no_grad():
        weights = scores.gate()[1:]
    names = ("target", *scores.modalities)
    largest = torch.bincount(weights.argmax(dim=1), minlength=len(names)).double() / len(weights)
    return {
        "mean_weight": dict(zip(names, weights.double().mean(dim=0).tolist())),
        "largest_share": dict(zip(names, largest.tolist())),
    }
