"""Kill training again and again, and see that nothing is lost and nothing is wrong.

    python tools/crash_test.py --kills 200

Small runs of train_collab, learn_semantic_ids and finetune are killed with SIGKILL, half of the time at a
random moment and half of the time while a checkpoint is being written, and started again until they are done.
After every kill each checkpoint must be whole, no stage folder may be half there, and no saved step may be
lost; no start may end by itself without a result, and at the end every file must be that of a run nobody
disturbed. Prints counts; leaves with 1 if anything was wrong, or if the time was over before all this.

200 kills took 94 s on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llmrec import checkpoint
from llmrec.arguments import positive, positive_number, whole
from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.collab.train import train_collab
from llmrec.console import guarded, set_up_logging
from llmrec.contents import content_of
from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.finetune.train import finetune
from llmrec.jobs import killed_by
from llmrec.manifest import MANIFEST
from llmrec.pipeline import run_stage
from llmrec.progress import progress
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.learn import learn_semantic_ids

logger = logging.getLogger("llmrec")

ALWAYS = 1e-9
"""Minutes between checkpoints: one after every epoch or step."""
MOST_WRONG = 20
"""After so many things wrong nothing is learned from more."""

Stage = tuple[Callable[..., Any], Any, tuple[Any, ...]]
"""A function, its settings and its inputs."""


def stages(root: Path) -> dict[str, Stage]:
    """The training stages with small settings and their inputs."""
    market = SampleMarketConfig(num_users=120, num_items=96, num_interests=8, max_length=10)
    data = run_stage(prepare_data, PrepareDataConfig(market=market), (), root / "prepare_data")
    encode = EncodeItemsConfig(text=TextEncoderConfig(dim=16), image=ImageEncoderConfig(encoder="none"))
    content = run_stage(encode_items, encode, (data,), root / "encode_items")
    sasrec = SASRecConfig(embed_dim=16, num_layers=1, num_heads=2, inner_dim=32, dropout_rate=0.1)
    collab_config = TrainCollabConfig(sasrec=sasrec, epochs=20, patience=20, save_every_minutes=ALWAYS)
    ids_config = LearnSemanticIdsConfig(
        num_codes=8, num_levels=2, code_dim=16, hidden_dims=(32,), epochs=40, batch_size=24,
        save_every_minutes=ALWAYS,
    )  # fmt: skip
    mini = MiniConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    finetune_config = FinetuneConfig(
        mini=mini, prompt="compact", fusion_temperature=1.0, epochs=6, batch_size=128, learning_rate=3e-3,
        dropout_rate=0.1, select="valid", save_every_minutes=ALWAYS,
    )  # fmt: skip
    collab = run_stage(train_collab, collab_config, (data,), root / "whole" / "train_collab")
    inputs = (data, collab, content)
    ids = run_stage(learn_semantic_ids, ids_config, inputs, root / "whole" / "learn_semantic_ids")
    run_stage(finetune, finetune_config, (*inputs, ids), root / "whole" / "finetune")
    return {
        "train_collab": (train_collab, collab_config, (data,)),
        "learn_semantic_ids": (learn_semantic_ids, ids_config, inputs),
        "finetune": (finetune, finetune_config, (*inputs, ids)),
    }


def start(stage: Stage, folder: Path, log: Path) -> int:
    """Run a stage in a child of this process, which has imported everything; its number.

    What it says goes to `log`, an error in the last line.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        function, config, inputs = stage
        code = guarded(lambda: run_stage(function, config, inputs, folder))
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def wait_until(moment: str, checkpoints: Path, deadline: float, child: int) -> int | None:
    """Wait until then, or until a checkpoint is being written; the child's exit code if it ends before."""
    while time.monotonic() < deadline:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if moment == "saving" and next(checkpoints.glob(".step-*"), None) is not None:
            return None
        time.sleep(0.0005 if moment == "saving" else 0.005)
    return None


def kill(child: int) -> int:
    """End a child that may have ended; its exit code."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def last_words(log: Path) -> str:
    """The last line that a child wrote."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][-300:].removeprefix("error: ") if lines else "it said nothing"


def newest(checkpoints: Path) -> int:
    """Step of the newest checkpoint; every one there must be whole."""
    steps = [0]
    for path in checkpoints.glob("step-*"):
        steps.append(checkpoint.check(path)["step"])
    return max(steps)


@dataclass(kw_only=True)
class Trial:
    """Kills, and what became of what was killed."""

    root: Path
    work: dict[str, Stage]
    expected: dict[str, Any]
    """Contents of every stage of the undisturbed run"""
    kills: int
    deadline: float
    """Of `time.monotonic`"""
    rng: np.random.Generator
    bar: tqdm
    """Over kills"""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline or len(self.wrong) >= MOST_WRONG

    def run(self) -> None:
        """Round after round until there were enough kills; nothing longer than to the deadline."""
        number = 0
        while self.counts["kills"] < self.kills and not self.is_over():
            number += 1
            for name in self.work:
                if self.is_over() or not self.round(name, number):
                    break

    def round(self, name: str, number: int) -> bool:
        """Start and kill a stage until it is done; whether it is, with nothing wrong but its files."""
        folder, reached = self.root / f"round{number}" / name, 0
        checkpoints = folder.with_name(f".{name}.unfinished") / "checkpoints"
        folder.parent.mkdir(exist_ok=True)
        while not folder.exists():
            if self.is_over():
                self.counts["runs cut short"] += 1
                return False
            problem = self.disturb(name, folder, checkpoints)
            if problem is None and folder.exists() and not (folder / MANIFEST).is_file():
                problem = f"{folder} is there without its manifest"
            if problem is not None:
                self.wrong.append(f"{name}, round {number}: {problem}")
                return False
            if folder.exists():
                break
            try:
                step = newest(checkpoints)
            except checkpoint.DamagedError as error:
                self.wrong.append(f"{name}, round {number}: {error}")
                return False
            if step < reached:
                self.wrong.append(f"{name}: step {reached} was saved, and then there was only {step}")
            self.counts["kills that found more done"] += step > reached
            reached = max(reached, step)
        self.counts["runs finished"] += 1
        if content_of(folder) != self.expected[name]:
            self.wrong.append(f"{name}, round {number}: files differ from the undisturbed run")
        return True

    def disturb(self, name: str, folder: Path, checkpoints: Path) -> str | None:
        """Start a stage and kill it, or let it end once it had its share of the kills; what was wrong.

        Every stage gets its share: on a slow machine the first ones would take them all.
        """
        moment = "end"
        if self.counts[f"kills of {name}"] < -(-self.kills // len(self.work)):
            moment = "saving" if self.rng.random() < 0.5 else "random"
        log = folder.with_name(f"{name}.log")
        child, code = start(self.work[name], folder, log), None
        try:
            code = self.watch(child, moment, checkpoints)
        finally:
            ended = code is not None
            if code is None:
                code = kill(child)
        if not ended and code == -signal.SIGKILL:
            if moment != "end":  # the time is over
                self.count(name, moment)
            return None
        if code == 0 and folder.exists():
            return None
        how = killed_by(code) or f"ended by itself with exit code {code}"
        return f"a start {how}, and without a result: {last_words(log)}"

    def watch(self, child: int, moment: str, checkpoints: Path) -> int | None:
        """Wait until a child is to be killed; its exit code if it ends before."""
        now = time.monotonic()
        if moment == "end":
            return wait_until(moment, checkpoints, self.deadline, child)
        if moment == "random":
            later = now + float(self.rng.uniform(0.05, 0.6))
            return wait_until(moment, checkpoints, min(later, self.deadline), child)
        later = now + float(self.rng.uniform(0.05, 0.4))  # so that it is not always the first checkpoint
        code = wait_until("random", checkpoints, min(later, self.deadline), child)
        if code is None:
            code = wait_until(moment, checkpoints, min(later + 1.0, self.deadline), child)
        return code

    def count(self, name: str, moment: str) -> None:
        self.counts["kills"] += 1
        self.counts[f"kills while {moment}"] += 1
        self.counts[f"kills of {name}"] += 1
        self.bar.update()


def torture(kills: int, seconds: float, root: Path, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill until there were enough kills or the time is over; counts and what was wrong."""
    # Children are forks, and threads do not survive a fork: neither pools nor the one that watches bars.
    os.environ["LLMREC_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    logger.info("crash test: an undisturbed run first")
    with quiet():
        work = stages(root)
    expected = {name: content_of(root / "whole" / name) for name in work}
    with progress(None, "crash test", total=kills, unit="kill") as bar:
        trial = Trial(
            root=root, work=work, expected=expected, kills=kills, deadline=time.monotonic() + seconds,
            rng=np.random.default_rng(seed), bar=bar,
        )  # fmt: skip
        trial.run()
    return trial.counts, trial.wrong


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Log warnings alone, and show no bars."""
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def command(options: argparse.Namespace) -> None:
    """Torture, print, and leave with 1 if anything was wrong or too little was done."""
    set_up_logging()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = torture(options.kills, options.seconds, Path(folder), options.seed)
    for name, count in sorted(counts.items()):
        print(f"{count:6}  {name}")
    print(f"{len(wrong):6}  things wrong")
    print("\n".join(wrong))
    too_few, cut = counts["kills"] < options.kills, counts["runs cut short"]
    if len(wrong) >= MOST_WRONG:
        print(f"with so much wrong it was left off after {counts['kills']} of {options.kills} kills")
    elif too_few:
        print(f"only {counts['kills']} of {options.kills} kills in {options.seconds:g} seconds")
    elif cut:
        print(f"{options.seconds:g} seconds were over before what was killed last was done and compared")
    sys.exit(bool(wrong or too_few or cut))


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=positive, default=200, help="of all three stages together (200)")
    made.add_argument(
        "--seconds", type=positive_number, default=1800.0,
        help="most time the kills take, after one undisturbed run (1800)",
    )  # fmt: skip
    made.add_argument("--seed", type=whole, default=0, help="of the moments of the kills (0)")
    options = made.parse_args(arguments)
    raise SystemExit(guarded(lambda: command(options)))


if __name__ == "__main__":
    main()
