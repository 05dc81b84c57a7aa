"""Kill training again and again, and see that nothing is lost and nothing is wrong.

    python tools/crash_test.py --kills 200

Small runs of train_collab, learn_semantic_ids and finetune are killed with SIGKILL, half of the time at a
random moment and half of the time while a checkpoint is being written, and started again until they are done.
After every kill each checkpoint must be whole, no stage folder may be half there, and no saved step may be
lost; at the end every file must be that of a run nobody disturbed. Prints counts; leaves with 1 if anything
was wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrec import checkpoint
from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.collab.train import train_collab
from llmrec.contents import content_of
from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.finetune.train import finetune
from llmrec.manifest import MANIFEST
from llmrec.pipeline import run_stage
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.learn import learn_semantic_ids

ALWAYS = 1e-9
"""Minutes between checkpoints: one after every epoch or step."""


def stages(root: Path) -> dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]]:
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


def start(function: Callable[..., Any], config: Any, inputs: tuple[Any, ...], folder: Path) -> int:
    """Run a stage in a child of this process, which has imported everything; its number."""
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = 1
    try:
        run_stage(function, config, inputs, folder)
        code = 0
    finally:
        os._exit(code)


def wait_until(moment: str, checkpoints: Path, patience: float, child: int) -> bool:
    """Wait for a random time, or until a checkpoint is being written; whether the child still runs."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        if moment == "saving" and next(checkpoints.glob(".step-*"), None) is not None:
            return True
        time.sleep(0.0005 if moment == "saving" else 0.005)
    return not os.waitpid(child, os.WNOHANG)[0]


def newest(checkpoints: Path) -> int:
    """Step of the newest checkpoint; every one there must be whole."""
    steps = [0]
    for path in checkpoints.glob("step-*"):
        steps.append(checkpoint.check(path)["step"])
    return max(steps)


def torture(kills: int, seconds: float, root: Path, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill until there were enough kills or the time is over; counts and what was wrong.

    Every stage gets its share of the kills: on a slow machine the first ones would take them all.
    """
    # Children are forks, and pools of threads do not survive a fork.
    os.environ["LLMREC_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    work = stages(root)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    begun, round_, share = time.monotonic(), 0, -(-kills // len(work))
    expected = {name: content_of(root / "whole" / name) for name in work}
    while counts["kills"] < kills and time.monotonic() - begun < seconds:
        round_ += 1
        for name, (function, config, inputs) in work.items():
            folder = root / f"round{round_}" / name
            checkpoints = folder.with_name(f".{name}.unfinished") / "checkpoints"
            reached = 0
            while not folder.exists():
                moment = "saving" if rng.random() < 0.5 else "random"
                child = start(function, config, inputs, folder)
                more = counts[f"kills of {name}"] < share
                patience = float(rng.uniform(0.05, 0.6)) if more else 1e9
                if moment == "saving" and more:
                    time.sleep(float(rng.uniform(0.05, 0.4)))
                    patience = 1.0
                if wait_until(moment if patience < 1e9 else "end", checkpoints, patience, child):
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    counts["kills"] += 1
                    counts[f"kills while {moment}"] += 1
                    counts[f"kills of {name}"] += 1
                if folder.exists() and not (folder / MANIFEST).is_file():
                    wrong.append(f"{folder} is there without its manifest")
                    break
                if not folder.exists():
                    try:
                        step = newest(checkpoints)
                    except checkpoint.DamagedError as error:
                        wrong.append(str(error))
                        break
                    if step < reached:
                        wrong.append(f"{name}: step {reached} was saved, and then there was only {step}")
                    counts["kills that found more done"] += step > reached
                    reached = max(reached, step)
            counts["runs finished"] += folder.exists()
            if folder.exists() and content_of(folder) != expected[name]:
                wrong.append(f"{name}, round {round_}: files differ from the undisturbed run")
    return counts, wrong


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=int, default=200)
    made.add_argument("--seconds", type=float, default=1800, help="most time it takes (1800)")
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = torture(options.kills, options.seconds, Path(folder), options.seed)
    for name, count in sorted(counts.items()):
        print(f"{count:6}  {name}")
    print(f"{len(wrong):6}  things wrong")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
