"""Packed against per-prefix fine-tuning: wall-clock on the same training targets, in one process.

    python tools/benchmark_packing.py --prepare-data runs/x/prepare_data --users 256

Trains a random `mini` model of the given width for a few steps on the same users' targets in both
layouts, alternating, and prints tokens, seconds, the ratio and the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from llmrec import distributed, machine, pipeline
from llmrec.artifacts import Interactions, SemanticIds
from llmrec.finetune import build
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.finetune.packing import count_tokens
from llmrec.finetune.prompt import Prompt
from llmrec.finetune.train import Trainer

LAYOUTS = ("packed", "per_prefix")


def trainer(data: Interactions, options: argparse.Namespace, layout: str) -> Trainer:
    """A fresh trainer on random vectors and codes, with the same weights for every layout."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    config = FinetuneConfig(
        mini=MiniConfig(
            hidden_size=options.width, num_layers=options.layers, intermediate_size=2 * options.width
        ),
        layout=layout,
        fusion_temperature=1.0,
        batch_size=options.batch_size,
        eval_every_epochs=0,
    )
    num_rows = data.num_items + 1
    vectors = {name: rng.normal(size=(num_rows, 64)).astype(np.float32) for name in ("collab", "text")}
    ids = SemanticIds(
        catalog=data.catalog,
        codes={name: rng.integers(0, 256, (num_rows, 4)) for name in vectors},
        codebooks={name: rng.normal(size=(4, 256, options.width)).astype(np.float32) for name in vectors},
    )
    prompt = Prompt(
        instruction=[n % 16 for n in range(options.instruction)],
        response=list(range(options.response)),
        vocab_size=16,
    )
    base = build.load_base(config, prompt)
    count = torch.from_numpy(data.train_count)
    return Trainer(
        config, data, build.build_model(config, base, prompt, vectors, ids, count, distributed.device())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare-data", required=True, help="output folder of prepare_data")
    parser.add_argument("--users", type=int, default=600, help="users whose targets are trained on")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each layout")
    parser.add_argument("--width", type=int, default=128, help="H of the mini base model")
    parser.add_argument("--layers", type=int, default=2, help="its transformer blocks")
    parser.add_argument("--instruction", type=int, default=17, help="I, instruction tokens")
    parser.add_argument("--response", type=int, default=4, help="R, response tokens")
    parser.add_argument("--batch-size", type=int, default=4096, help="targets per optimiser step")
    options = parser.parse_args()

    data = pipeline.load(Interactions, Path(options.prepare_data))
    trainers = {layout: trainer(data, options, layout) for layout in LAYOUTS}
    targets = trainers["packed"].targets
    users = np.random.default_rng(0).choice(np.unique(targets.user), options.users, replace=False)
    chosen = np.flatnonzero(np.isin(targets.user, users))
    steps = [
        targets.take(part)
        for part in np.split(chosen, range(options.batch_size, len(chosen), options.batch_size))
    ]

    seconds = {layout: [] for layout in LAYOUTS}
    for _ in range(options.rounds + 1):
        for layout in LAYOUTS:
            begun = time.perf_counter()
            losses = [float(trainers[layout].train_step(step)[0]) for step in steps]
            seconds[layout].append(time.perf_counter() - begun)
            print(f"{layout:10s} {seconds[layout][-1]:8.2f} s, mean loss {sum(losses) / len(chosen):.6f}")
    size = {"instruction": options.instruction, "response": options.response}
    for layout in LAYOUTS:
        tokens = count_tokens(targets, layout=layout, shared=False, **size)
        middle = statistics.median(seconds[layout][1:])
        print(f"{layout:10s} median {middle:.2f} s; an epoch has {tokens:,} tokens, instruction in every row")
    ratios = [slow / fast for fast, slow in zip(seconds["packed"][1:], seconds["per_prefix"][1:])]
    middle = statistics.median(ratios)
    print(f"per_prefix / packed: median {middle:.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")
    print(f"{len(chosen):,} targets of {options.users} users; {machine.describe()}")


if __name__ == "__main__":
    main()
