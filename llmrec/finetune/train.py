"""finetune: train MME-SID on packed rows, with accelerate.

An optimiser step always holds the same targets, however they are packed and however many processes share
them, so results do not depend on packing or world size beyond rounding.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llmrec import distributed, machine
from llmrec.artifacts import (
    CollabEmbeddings,
    ContentEmbeddings,
    Interactions,
    SemanticIds,
    Targets,
    check_same_catalog,
)
from llmrec.checkpoint import (
    Checkpoint,
    Checkpoints,
    StopRequests,
    checkpoints_here,
    pack_states,
    stop_requests,
    unpack_states,
)
from llmrec.config import from_dict
from llmrec.data.batches import pad_histories
from llmrec.errors import ArtifactMismatchError, StoppedError, TrainingError
from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k
from llmrec.evaluation.rank import rank_users
from llmrec.finetune import analysis, build
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.bad_steps import BadSteps, Step
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.engine import Engine
from llmrec.finetune.model import MMESID
from llmrec.finetune.packing import PackedRows, count_tokens, group_rows, pack
from llmrec.finetune.scoring import CatalogueScores, for_scoring, load_scorer
from llmrec.finetune.steps import (
    micro_batches,
    row_lengths,
    sampled_items,
    share_rows,
    steps_of_epoch,
    train_counts,
    training_targets,
)
from llmrec.pipeline import resume_folder
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
    train_count = torch.from_numpy(train_counts(config, data))
    model = build.build_model(config, base, prompt, vectors, ids, train_count, device)
    longest = data.targets("train", "valid", "test", max_history=config.max_history)
    items = int((longest.stop - longest.start).max(initial=0)) * model.item_tokens.tokens_per_item
    build.check_context(config, base, len(prompt.instruction) + items + len(prompt.response))
    if config.ctrl_stage == "two":
        align_first(config, model, data.num_items)
    before = analysis.taus(model, data, collab.vectors) if config.analyse and distributed.is_main() else {}
    trainer = Trainer(config, data, model, checkpoints_here())
    trainer.run()
    expected = trainer.sample_scores()
    trainer.engine.close()
    trained = {name: value.cpu() for name, value in trainer.engine.weights().items()}
    heads = {name: value for name, value in trained.items() if not name.startswith("base.")}
    of_base = {name.removeprefix("base."): trained[name] for name in trained.keys() - heads.keys()}
    weights: dict[str, Any] = {}
    if config.is_mini:
        weights = {"base": of_base, "base_config": base.config.to_dict()}
    else:
        weights["lora"], weights["lora_config"] = build.lora_weights(base, config, of_base)
    adapter = Adapter(
        catalog=data.catalog,
        settings=build.settings_of(config, prompt, base),
        heads={**heads, "train_count": train_count},
        metrics=trainer.metrics(),
        log=trainer.log,
        **weights,
    )
    if distributed.is_main():
        loaded = check_saved(adapter, expected, collab, content, ids)
        if config.analyse:
            found = {
                "tau": {"before": before, "after": analysis.taus(loaded, data, collab.vectors)},
                "spectra": analysis.spectra(loaded, collab.vectors),
            }
            adapter = dataclasses.replace(adapter, analysis=found)
    return adapter


def check_saved(
    adapter: Adapter,
    expected: tuple[Tensor, Tensor],
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
) -> MMESID:
    """Save, load and compare scores, so that no run ends with weights that cannot be loaded.

    Returns:
        The loaded model.

    Raises:
        ArtifactMismatchError: if the loaded model scores differently.
    """
    history, scores = expected
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder))
        loaded = load_scorer(Adapter.load(Path(folder)), collab, content, ids)
    difference = (loaded.score(history) - scores)[:, 1:].abs().max().item()
    config = from_dict(FinetuneConfig, adapter.settings["config"])
    exact = history.device.type == "cpu" and config == for_scoring(config)
    tolerance = 0.0 if exact else 1e-3 * scores.abs().max().item()
    if not difference <= tolerance:
        raise ArtifactMismatchError(
            f"the saved adapter scores differently from the trained one (largest difference {difference:g})"
        )
    logger.info("finetune: saved, loaded and compared; largest score difference %g", difference)
    return cast(CatalogueScores, loaded.score).run


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
class Window:
    """What has been seen since the last row of the log."""

    loss: Tensor | float = 0.0
    targets: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)


class Trainer:
    """The loop: epochs of optimiser steps of micro-batches, with checkpoints.

    Args:
        config: settings.
        data: interactions; the train split is learned, the valid split is only ranked.
        model: trained in place.
        checkpoints: where to leave work for a run after a stop, and to look for it; None: nowhere.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        data: Interactions,
        model: MMESID,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        distributed.state()
        self.config = config
        self.data = data
        self.model = model
        self.flops = build.flops_per_token(model)
        self.counts = build.parameter_counts(model)
        self.engine = Engine(config, model)
        self.checkpoints = checkpoints if self.engine.resumable else None
        if self.checkpoints is not checkpoints:
            logger.warning("finetune: no checkpoints, since 8-bit optimiser states are spread over processes")
        self.device = distributed.device()
        self.item = torch.from_numpy(data.item)
        self.targets = training_targets(config, data)
        sizes = [self._steps_in(epoch) for epoch in range(1, config.epochs + 1)]
        self.num_steps = sum(sizes)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.engine.inner, self._learning_rate_factor)
        self.log: list[dict[str, Any]] = []
        advice = f"lower finetune.learning_rate ({config.learning_rate:g}) or use finetune.precision=fp32"
        self.bad_steps = BadSteps(config.bad_steps, data, resume_folder(), advice)
        self.step = 0
        self.total_tokens = 0
        self.seconds = 0.0
        self.window = Window()
        self.best: tuple[float, int] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self.peak = machine.matmul_peak(self.device, self.engine.dtype) if distributed.is_main() else 1.0
        self.fusion_sources = ("target", *model.item_scores.modalities)

    def run(self) -> None:
        """Train all epochs; the model holds the selected weights afterwards.

        Raises:
            TrainingError: the loss became NaN or infinite.
            StoppedError: the process was asked to stop; the work is saved.
            StorageError: there is no room for checkpoints.
        """
        if self.checkpoints is not None and self.config.save_every_minutes and distributed.is_main():
            # Weights, two states of Adam, and the best weights where they are kept apart.
            copies = 4 if self.config.select == "valid" else 3
            self.checkpoints.require_room(4 * copies * self.counts["trainable"])
        epoch, done = self._resume()
        logger.info(
            "finetune: %s targets, %s steps, %s trainable parameters",
            f"{len(self.targets):,}", f"{self.num_steps:,}",
            f"{self.counts['trainable']:,}",
        )  # fmt: skip
        with (
            stop_requests() as stop,
            progress(None, "finetune", total=self.num_steps, unit="step", initial=self.step) as bar,
        ):
            while epoch <= self.config.epochs:
                self._train_epoch(epoch, done, bar, stop)
                every = self.config.eval_every_epochs
                if every and (epoch % every == 0 or epoch == self.config.epochs):
                    self._validate(epoch)
                epoch, done = epoch + 1, 0
        if self.config.select == "valid" and self.best is not None:
            self.engine.set_weights(self.best_weights)

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
            "parameters": self.counts,
        }

    def sample_scores(self) -> tuple[Tensor, Tensor]:
        """A few histories and their scores by the trained model."""
        number = min(CHECKED_HISTORIES, len(self.targets))
        sample = self.targets.take(np.linspace(0, len(self.targets) - 1, number).astype(np.int64))
        start, stop = (torch.from_numpy(ends) for ends in (sample.start, sample.stop))
        history = pad_histories(self.item, start, stop).to(self.device)
        return history, self.engine.scorer().score(history)

    def _train_epoch(self, epoch: int, done: int, bar: tqdm, stop: StopRequests) -> None:
        """The steps of an epoch after the first `done`."""
        self.model.train()
        steps = steps_of_epoch(self.targets, self.config, epoch, len(self.model.response))
        for number, chosen in enumerate(steps[done:], start=done + 1):
            begun = time.perf_counter()
            targets = self.targets.take(chosen)
            try:
                loss, tokens, bad = self.train_step(targets)
            except torch.OutOfMemoryError:
                raise TrainingError(self._out_of_memory()) from None
            self.seconds += time.perf_counter() - begun
            self.step += 1
            self.total_tokens += tokens
            self.bad_steps.watch(Step(epoch=epoch, step=self.step, targets=targets, bad=bad))
            self.window.loss = self.window.loss + torch.where(bad, 0.0, loss)
            self.window.targets += len(chosen)
            self.window.tokens += tokens
            bar.update()
            logged = self.step % self.config.log_every_steps == 0 or number == len(steps)
            if logged:
                self._log_window(epoch, bar)
            if logged or distributed.world_size() == 1:
                # Several processes have to agree, and waiting for that in every step would cost time.
                asked, due = distributed.any_process(stop.asked, self._save_is_due())
                if asked or due:
                    self._save(epoch, number)
                if asked:
                    self._stop()

    def train_step(self, targets: Targets) -> tuple[Tensor, int, Tensor]:
        """One optimiser step.

        Returns:
            The summed loss of all processes' targets (), the tokens it took, and whether it was left out,
            bool () (see `Engine.step`).
        """
        # The state of random numbers is a function of the step, so checkpoints need not hold it.
        seed = np.random.SeedSequence((self.config.seed, self.step, distributed.rank()))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        total = torch.zeros((), device=self.device)
        passes = self._passes(targets)
        for number, (groups, weight) in enumerate(passes, start=1):
            # The step's loss is the mean over its targets; gradients are averaged over processes.
            scale = weight * distributed.world_size() / len(targets)
            loss = self.engine.forward_backward(groups, scale, last=number == len(passes))
            total += weight * loss
        if distributed.world_size() > 1:
            total = self.engine.accelerator.reduce(total, "sum")
        bad = self.engine.step(total)
        self.schedule.step()
        return total, self._count_tokens(targets), bad

    def _count_tokens(self, targets: Targets) -> int:
        return count_tokens(
            targets,
            instruction=len(self.model.instruction),
            response=len(self.model.response),
            layout=self.config.layout,
            shared=self.model.share_instruction,
            min_slots=self.model.min_slots,
            tokens_per_item=self.model.item_tokens.tokens_per_item,
        )

    def _passes(self, targets: Targets) -> list[tuple[list[PackedRows], float]]:
        """This process's forward passes of a step, and their weights.

        Wrappers that share parameters need as many passes in every process; those that are missing are
        filled with rows of weight 0.
        """
        model, config = self.model, self.config
        row = group_rows(targets, config.layout, model.min_slots)
        length = row_lengths(targets, row, len(model.response), model.item_tokens.tokens_per_item)
        room = config.micro_batch_tokens
        if model.stream:
            room = max(room - len(model.instruction), 1)
        elif not model.share_instruction:
            length += len(model.instruction)
        shares = share_rows(length, distributed.world_size())
        passes = [micro_batches(length[own], room, stream=model.stream) for own in shares]
        own = shares[distributed.rank()]
        negative = None
        if config.loss == "bce_sampled":
            seed = (config.seed, self.step, 1)
            negative = sampled_items(targets.item, self.data.num_items, seed)

        def packed(rows: np.ndarray) -> PackedRows:
            chosen = np.flatnonzero(np.isin(row, rows))
            sampled = None if negative is None else negative[chosen]
            return pack(self.item, targets.take(chosen), row[chosen], sampled)

        mine = [([packed(own[group]) for group in groups], 1.0) for groups in passes[distributed.rank()]]
        missing = max(map(len, passes)) - len(mine)
        return mine + [([packed(np.array([0]))], 0.0)] * missing

    def _log_window(self, epoch: int, bar: tqdm) -> None:
        self._settle()
        window, self.window = self.window, Window()
        if not window.targets:
            return
        loss = float(window.loss) / window.targets
        seconds = time.perf_counter() - window.started
        speed = window.tokens / seconds / distributed.world_size()
        row = {
            "epoch": epoch,
            "step": self.step,
            "loss": loss,
            "learning_rate": self.schedule.get_last_lr()[0],
            "tokens_per_second": round(window.tokens / seconds, 1),
            "targets_per_second": round(window.targets / seconds, 1),
            "share_of_peak": round(speed * self.flops / self.peak, 4),
            "memory_bytes": machine.peak_memory(self.device),
        }
        self.log.append(row)
        bar.set_postfix_str(
            f"epoch {epoch}, loss {loss:.4f}, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['share_of_peak']:.0%} of peak, {row['memory_bytes'] / 2**30:.1f} GiB"
        )

    def _settle(self) -> None:
        """Write down the steps that were left out since the last time.

        Raises:
            TrainingError: more than allowed; weights that come of it must not take the place of good ones.
        """
        left_out = self.bad_steps.settle()
        self.log += left_out
        self.window.targets -= sum(row["targets"] for row in left_out)

    def _validate(self, epoch: int) -> None:
        targets = self.data.targets("valid")
        if not len(targets):
            return
        rank = rank_users(self.engine.scorer(), self.data, targets, shard=True).rank
        with torch.no_grad():
            weights = self.engine.wrapped("weights")
            fusion = fusion_shares(weights, self.fusion_sources, self.data.train_count)
        ndcg = float(ndcg_at_k(rank, 10).mean())
        better = self.best is None or ndcg > self.best[0]
        if better and self.config.select == "valid":
            self.best_weights = self.engine.weights()
        row = {
            "epoch": epoch,
            "step": self.step,
            "valid_ndcg@10": ndcg,
            "valid_recall@10": float(recall_at_k(rank, 10).mean()),
            "fusion": fusion,
        }
        self.log.append(row)
        logger.info(
            "finetune: epoch %s, valid ndcg@10 %.4f, recall@10 %.4f",
            epoch, ndcg, row["valid_recall@10"],
        )  # fmt: skip
        if better:
            self.best = (ndcg, epoch)
        self.window.started = time.perf_counter()

    def _out_of_memory(self) -> str:
        """What to turn when the GPU is full: the one thing that helps most."""
        tokens = self.config.micro_batch_tokens
        if tokens > 2048:
            advice = f"lower finetune.micro_batch_tokens ({tokens} now), which changes no result"
        elif not self.config.checkpoint_activations:
            advice = "set finetune.checkpoint_activations=true, which changes no result"
        elif not self.config.is_mini and self.config.quantize == "none":
            advice = "set finetune.quantize=nf4 finetune.optimizer=adamw_8bit"
        else:
            advice = "use a smaller base model, or spread it with recipes/accelerate/zero3.yaml"
        return f"out of memory at step {self.step + 1}; {advice}"

    def _save_is_due(self) -> bool:
        minutes = self.config.save_every_minutes
        return bool(self.checkpoints and minutes and time.monotonic() - self.saved_at >= 60 * minutes)

    def _save(self, epoch: int, done: int) -> None:
        """Write a checkpoint of this moment: `done` steps of the epoch.

        Raises:
            TrainingError: too many steps since the last look were bad.
        """
        self.saved_at = time.monotonic()
        self._settle()
        if self.checkpoints is None or not (distributed.is_main() or self.engine.sharded):
            return
        begun = time.perf_counter()
        tensors, optimizer = pack_states(self.engine.optimizer_states())
        tensors |= {f"weights.{name}": value for name, value in self.engine.weights().items()}
        if not distributed.is_main():
            return
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        state = {
            "epoch": epoch,
            "done": done,
            "optimizer": optimizer,
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "log": self.log,
            "total_tokens": self.total_tokens,
            "seconds": self.seconds,
            "window": {
                "loss": float(self.window.loss),
                "targets": self.window.targets,
                "tokens": self.window.tokens,
            },
            "best": self.best,
            "bad_steps": self.bad_steps.count,
        }
        self.checkpoints.save(Checkpoint(step=self.step, tensors=tensors, state=state))
        logger.info("finetune: step %s saved in %.1f s", self.step, time.perf_counter() - begun)
        self.saved_at = time.monotonic()

    def _resume(self) -> tuple[int, int]:
        """Take up the newest checkpoint; the epoch to go on with and how many of its steps are done."""
        found = None
        if self.checkpoints is not None:
            # The main process looks first, since looking also tidies up.
            if not distributed.is_main():
                distributed.wait()
            found = self.checkpoints.latest()
            if distributed.is_main():
                distributed.wait()
        if found is None:
            return 1, 0
        self.engine.set_weights({name: found.tensors[f"weights.{name}"] for name in self.engine.parameters})
        state = found.state
        self.engine.set_optimizer_states(unpack_states(found.tensors, state["optimizer"]))
        for group, rate in zip(self.engine.inner.param_groups, self.schedule.base_lrs):
            group["lr"] = rate * self._learning_rate_factor(state["schedule"]["last_epoch"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.schedule._last_lr = [group["lr"] for group in self.engine.inner.param_groups]
        self.best_weights = {
            name.removeprefix("best."): value.to(self.device)
            for name, value in found.tensors.items()
            if name.startswith("best.")
        }
        self.step, self.log = found.step, state["log"]
        self.total_tokens, self.seconds = state["total_tokens"], state["seconds"]
        self.bad_steps.count = state["bad_steps"]
        self.window = Window(**state["window"])
        self.best = None if state["best"] is None else tuple(state["best"])
        logger.info("finetune: going on after step %s of %s", self.step, self.num_steps)
        return state["epoch"], state["done"]

    def _stop(self) -> None:
        kept = "the same command goes on from there" if self.checkpoints else "nothing was kept"
        raise StoppedError(f"stopped after step {self.step} of {self.num_steps}; {kept}")

    def _steps_in(self, epoch: int) -> int:
        if self.config.batch_by == "targets":
            return math.ceil(len(self.targets) / self.config.batch_size)
        return len(steps_of_epoch(self.targets, self.config, epoch, len(self.model.response)))

    def _learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero; never 0 at the first step."""
        warmup = min(self.config.warmup_steps, self.num_steps // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.num_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def fusion_shares(
    weights: Tensor, sources: tuple[str, ...], train_count: np.ndarray
) -> dict[str, dict[str, Any]] | None:
    """Per score source: mean weight, also by popularity, and share of items whose largest weight it is.

    Args:
        weights: mixing weights (N, S).
        sources: S names.
        train_count: int64 (N + 1,).

    Returns:
        None if there is one source.
    """
    if len(sources) == 1:
        return None
    largest = torch.bincount(weights.argmax(dim=1), minlength=len(sources)).double() / len(weights)
    return {
        "mean_weight": dict(zip(sources, weights.double().mean(dim=0).tolist())),
        "largest_share": dict(zip(sources, largest.tolist())),
        "by_frequency": analysis.weights_by_frequency(weights, sources, train_count),
    }
