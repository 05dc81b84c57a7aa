"""The training loop: epochs of optimiser steps of forward passes, with validation and checkpoints.

An optimiser step always holds the same targets, however they are packed and however many processes share
them, so results do not depend on packing or world size beyond rounding.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llmrec import distributed, global_state, launched, machine, tracking
from llmrec.checkpoint import Checkpoints
from llmrec.data.batches import pad_histories
from llmrec.errors import StoppedError, TrainingError
from llmrec.evaluation.metrics import of_validation
from llmrec.evaluation.rank import rank_users
from llmrec.finetune import analysis, build
from llmrec.finetune.bad_steps import BadSteps, Step
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.engine import Engine
from llmrec.finetune.model import MMESID
from llmrec.finetune.passes import Passes
from llmrec.finetune.run_state import RunCheckpoints, RunState, Window
from llmrec.finetune.steps import steps_of_epoch, training_targets
from llmrec.interactions import Interactions, Targets
from llmrec.progress import progress
from llmrec.running import resume_folder
from llmrec.stopping import StopRequests, stop_requests

logger = logging.getLogger("llmrec")

CHECKED_HISTORIES = 64


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
        self.device = distributed.device()
        self.flops = build.flops_per_token(model)
        self.counts = build.parameter_counts(model)
        self.engine = Engine(config, model)
        self.passes = Passes(config, data, model)
        self.checkpoints = RunCheckpoints(config, self.engine, checkpoints)
        self.targets = training_targets(config, data)
        steps = [self._steps_in(epoch) for epoch in range(1, (config.schedule_epochs or config.epochs) + 1)]
        self.num_steps, self.schedule_steps = sum(steps[: config.epochs]), sum(steps)
        advice = f"lower finetune.learning_rate ({config.learning_rate:g}) or use finetune.precision=fp32"
        self.bad_steps = BadSteps(config.bad_steps, data, resume_folder(), advice)
        self.wanted = distributed.Agreement()
        self.state = RunState()
        self.best_weights: dict[str, Tensor] = {}
        self.peak = machine.matmul_peak(self.device, self.engine.dtype) if launched.is_main() else 1.0

    def run(self) -> None:
        """Train all epochs; the model holds the selected weights afterwards.

        Raises:
            TrainingError: the loss became NaN or infinite.
            StoppedError: the process was asked to stop; the work is saved.
            StorageError: there is no room for checkpoints.
        """
        self.checkpoints.require_room()
        self._resume()
        tracking.begin(self.state.log)
        logger.info(
            "finetune: %s targets, %s steps, %s trainable parameters",
            f"{len(self.targets):,}", f"{self.num_steps:,}", f"{self.counts['trainable']:,}",
        )  # fmt: skip
        state, every = self.state, self.config.eval_every_epochs
        with (
            stop_requests() as stop,
            progress(None, "finetune", total=self.num_steps, unit="step", initial=state.step) as bar,
        ):
            while state.epoch <= self.config.epochs and not self._waited_enough():
                last = state.epoch == self.config.epochs
                try:
                    self._train_epoch(bar, stop)
                    self._end_epoch(validate=bool(every) and (last or state.epoch % every == 0))
                except torch.OutOfMemoryError:
                    raise TrainingError(self._out_of_memory()) from None
                state.epoch, state.done = state.epoch + 1, 0
        self.wanted.settle()
        if self.config.select == "valid" and state.best is not None:
            self.engine.set_weights(self.best_weights)

    def metrics(self) -> dict[str, Any]:
        """Totals of the run, for metrics.json."""
        shown = [row for row in self.state.log if "valid_ndcg@10" in row]
        best = self.state.best if self.config.select == "valid" else None
        kept = best[1] if best else self.config.epochs
        return {
            "targets_per_epoch": len(self.targets),
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "train_seconds": round(self.state.seconds, 3),
            "epoch_kept": kept,
            "valid": next((row for row in shown if row["epoch"] == kept), None),
            "parameters": self.counts,
        }

    def sample_scores(self) -> tuple[Tensor, Tensor]:
        """A few histories and their scores by the trained model."""
        number = min(CHECKED_HISTORIES, len(self.targets))
        sample = self.targets.take(np.linspace(0, len(self.targets) - 1, number).astype(np.int64))
        start, stop = (torch.from_numpy(ends) for ends in (sample.start, sample.stop))
        history = pad_histories(self.passes.item, start, stop).to(self.device)
        return history, self.engine.scorer().score(history)

    def _train_epoch(self, bar: tqdm, stop: StopRequests) -> None:
        """What is left of the epoch."""
        self.model.train()
        state = self.state
        steps = self.steps_of(state.epoch)
        for chosen in steps[state.done :]:
            begun = time.perf_counter()
            targets = self.targets.take(chosen)
            loss, tokens, bad = self.train_step(targets)
            logged = (state.step + 1) % self.config.log_every_steps == 0 or state.done + 1 == len(steps)
            if logged:
                machine.finish(self.device)
            state.seconds += time.perf_counter() - begun
            state.step += 1
            state.done += 1
            state.tokens += tokens
            self.bad_steps.watch(Step(epoch=state.epoch, step=state.step, targets=targets, bad=bad))
            state.window.loss = state.window.loss + torch.where(bad, 0.0, loss)
            state.window.targets += len(chosen)
            state.window.tokens += tokens
            bar.update()
            if logged:
                self._log_window(bar)
            asked, due = self.wanted(stop.asked, self.checkpoints.due())
            if asked or due:
                self._save()
            if asked:
                self._stop()

    def train_step(self, targets: Targets) -> tuple[Tensor, int, Tensor]:
        """One optimiser step.

        Returns:
            The summed loss of all processes' targets (), the tokens it took, and whether it was left out,
            bool () (see `Engine.step`).
        """
        # Random numbers and the learning rate are functions of the step, so checkpoints need not hold them.
        step = self.state.step
        seed = np.random.SeedSequence((self.config.seed, step, launched.rank()))
        global_state.seed_everything(int(seed.generate_state(1)[0]))
        for group in self.engine.inner.param_groups:
            group["lr"] = self.learning_rate(step)
        total = torch.zeros((), device=self.device)
        passes, tokens = self.passes.of(targets, step)
        # The step's loss is the mean over its targets; gradients are averaged over processes.
        scale = launched.world_size() / len(targets)
        for number, given in enumerate(passes, start=1):
            total += self.engine.forward_backward(given, scale, last=number == len(passes))
        if launched.world_size() > 1:
            total = self.engine.accelerator.reduce(total, "sum")
        return total, tokens, self.engine.step(total)

    def _log_window(self, bar: tqdm) -> None:
        self._settle()
        window, self.state.window = self.state.window, Window()
        if not window.targets:
            return
        loss = float(window.loss) / window.targets
        seconds = time.perf_counter() - window.started
        speed = window.tokens / seconds / launched.world_size()
        row = {
            "epoch": self.state.epoch,
            "step": self.state.step,
            "loss": loss,
            "learning_rate": self.learning_rate(self.state.step - 1),
            "tokens_per_second": round(window.tokens / seconds, 1),
            "targets_per_second": round(window.targets / seconds, 1),
            "share_of_peak": round(speed * self.flops / self.peak, 4),
            "memory_bytes": machine.peak_memory(self.device),
        }
        self._tell(row)
        bar.set_postfix_str(
            f"epoch {self.state.epoch}, loss {loss:.4f}, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['share_of_peak']:.0%} of peak, {row['memory_bytes'] / 2**30:.1f} GiB"
        )

    def _tell(self, row: dict[str, Any]) -> None:
        """Add a row to the log, and show it to those who watch."""
        self.state.log.append(row)
        tracking.log(row, row["step"])

    def _settle(self) -> None:
        """Write down the steps that were left out since the last time.

        Raises:
            TrainingError: more than allowed; weights that come of it must not take the place of good ones.
        """
        left_out = self.bad_steps.settle()
        for row in left_out:
            self._tell(row)
        self.state.window.targets -= sum(row["targets"] for row in left_out)

    def _end_epoch(self, *, validate: bool) -> None:
        """Log where the fusion weights are, and what validation says if it is time for that."""
        row = {"epoch": self.state.epoch, "step": self.state.step}
        found = self._validate() if validate else {}
        self.model.eval()
        with torch.no_grad():
            weights = self.engine.wrapped("weights")
        sources = ("target", *self.model.item_scores.modalities)
        if fusion := analysis.fusion_shares(weights, sources, self.data.train_count):
            found["fusion"] = fusion
        if found:
            self._tell(row | found)
        self.state.window.started = time.perf_counter()

    def _validate(self) -> dict[str, Any]:
        """Rank the validation items, and keep the weights if they are the best so far."""
        targets = self.data.targets("valid")
        if not len(targets):
            return {}
        masked = self.config.mask_seen
        rank = rank_users(self.engine.scorer(), self.data, targets, mask_seen=masked, shard=True).rank
        state = self.state
        found = of_validation(rank)
        ndcg = found["valid_ndcg@10"]
        loss = next((f"loss {row['loss']:.4f}, " for row in reversed(state.log) if "loss" in row), "")
        best = ""
        if state.best is not None and ndcg <= state.best[0]:
            best = f", best {state.best[0]:.4f} in epoch {state.best[1]}"
        if state.best is None or ndcg > state.best[0]:
            state.best = (ndcg, state.epoch)
            if self.config.select == "valid":
                self.best_weights = self.engine.weights()
        logger.info(
            "finetune: epoch %s, %svalid ndcg@10 %.4f, recall@10 %.4f%s",
            state.epoch, loss, ndcg, found["valid_recall@10"], best,
        )  # fmt: skip
        return found

    def _out_of_memory(self) -> str:
        """What to turn when the GPU is full: the one thing that helps most."""
        tokens = self.config.micro_batch_tokens
        if tokens > 2048:
            advice = f"lower finetune.micro_batch_tokens ({tokens} now), which changes no result"
        elif self.model.graphs is not None:
            advice = "set finetune.cuda_graphs=false, which changes no result"
        elif not self.config.checkpoint_activations:
            advice = "set finetune.checkpoint_activations=true, which changes no result"
        elif not self.config.is_mini and self.config.quantize == "none":
            advice = "set finetune.quantize=nf4 finetune.optimizer=adamw_8bit"
        else:
            advice = "use a smaller base model, or spread it with recipes/accelerate/fsdp2.yaml"
        return f"out of memory at step {self.state.step + 1}; {advice}"

    def _save(self) -> None:
        """Write a checkpoint of this moment.

        Raises:
            TrainingError: too many steps since the last look were bad.
        """
        self._settle()
        began = time.perf_counter()
        self.state.bad_steps = self.bad_steps.count
        self.checkpoints.save(self.state, self.best_weights)
        self.state.window.started += time.perf_counter() - began  # no training, so no part of tokens/s

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        self.state, self.best_weights = self.checkpoints.resume()
        self.bad_steps.count = self.state.bad_steps
        if self.state.step:
            logger.info("finetune: going on after step %s of %s", self.state.step, self.num_steps)

    def _stop(self) -> None:
        kept = "the same command goes on from there" if self.checkpoints.store else "nothing was kept"
        raise StoppedError(f"stopped after step {self.state.step} of {self.num_steps}; {kept}")

    def _steps_in(self, epoch: int) -> int:
        if self.config.batch_by == "targets":
            return math.ceil(len(self.targets) / self.config.batch_size)
        return len(self.steps_of(epoch))

    def steps_of(self, epoch: int) -> list[np.ndarray]:
        """Which targets each step of an epoch holds."""
        model = self.model
        width = model.item_tokens.tokens_per_item
        return steps_of_epoch(self.targets, self.config, epoch, len(model.response), width)

    def _waited_enough(self) -> bool:
        """Whether validation has not improved for as long as the settings wait."""
        shown = [row for row in self.state.log if "valid_ndcg@10" in row]
        if self.config.patience is None or self.state.best is None:
            return False
        return sum(row["epoch"] > self.state.best[1] for row in shown) >= self.config.patience

    def learning_rate(self, step: int) -> float:
        """Of the step after `step` others: linear warm-up, then a cosine to zero; never 0 at the first."""
        peak, warmup = self.config.learning_rate, min(self.config.warmup_steps, self.schedule_steps // 2)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.schedule_steps - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
