"""Train and evaluate again and again in one process, and see that memory and open files stay as they are.

    python tools/soak.py --cycles 500

A cycle runs train_collab, encode_items, learn_semantic_ids, finetune and evaluate on a small market, into a
folder that is then deleted. The first tenth of the cycles warms up caches; after it, the line through memory
may rise by at most --kib-per-cycle, and open files and threads by none from the first five cycles to the last
five. Leaves with 1 if they do more.

A cycle after the first takes about a second.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from llmrec.arguments import positive, positive_number
from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.console import guarded
from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.errors import ConfigError
from llmrec.evaluation.config import EvaluateConfig
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.pipeline import RunDir, run
from llmrec.progress import progress
from llmrec.recipe import Recipe
from llmrec.semantic_ids.config import LearnSemanticIdsConfig

FEWEST = 12
"""Cycles of which, without the first tenth, the first five and the last five are different ones."""


def recipe() -> Recipe:
    """Every stage, in about a second."""
    return Recipe(
        prepare_data=PrepareDataConfig(
            market=SampleMarketConfig(num_users=80, num_items=48, num_interests=4, max_length=8)
        ),
        train_collab=TrainCollabConfig(
            sasrec=SASRecConfig(embed_dim=8, num_layers=1, num_heads=1, inner_dim=16), epochs=2
        ),
        encode_items=EncodeItemsConfig(
            text=TextEncoderConfig(dim=8), image=ImageEncoderConfig(encoder="none")
        ),
        learn_semantic_ids=LearnSemanticIdsConfig(
            num_codes=4, num_levels=2, code_dim=8, hidden_dims=(16,), epochs=5, min_utilisation=0.0
        ),
        finetune=FinetuneConfig(
            mini=MiniConfig(hidden_size=8, num_layers=1, num_heads=1, intermediate_size=16), prompt="compact",
            fusion_temperature=1.0, epochs=1, batch_size=64, save_every_minutes=1e-9,
        ),
        evaluate=EvaluateConfig(bootstrap_samples=20, num_examples=2),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the process holds after a cycle."""

    bytes: int
    """Resident memory"""
    files: int
    threads: int


def usage() -> Usage:
    gc.collect()
    process = psutil.Process()
    return Usage(bytes=process.memory_info().rss, files=process.num_fds(), threads=process.num_threads())


def whole_cycle(root: Path) -> Callable[[int], None]:
    """Run every stage after prepare_data into a folder of its own, and delete it."""
    chosen = recipe()
    run(chosen, RunDir(root / "first"), until="prepare_data")

    def cycle(number: int) -> None:
        folder = root / f"cycle{number}"
        shutil.copytree(root / "first" / "prepare_data", folder / "prepare_data")
        run(chosen, RunDir(folder))
        shutil.rmtree(folder)

    return cycle


def soak(cycle: Callable[[int], None], cycles: int) -> list[Usage]:
    """What the process holds after each cycle."""
    found = []
    for number in progress(range(cycles), "soak", unit="cycle"):
        cycle(number)
        found.append(usage())
    return found


def judge(found: list[Usage], kib_per_cycle: float) -> list[str]:
    """What grew after the first tenth."""
    kept = found[len(found) // 10 :]
    slope = slope_of(kept)
    wrong = []
    if slope > kib_per_cycle:
        wrong.append(f"memory grows by {slope:.1f} KiB a cycle, at most {kib_per_cycle:g} allowed")
    for name in ("files", "threads"):
        first, last = (max(getattr(one, name) for one in part) for part in (kept[:5], kept[-5:]))
        if last > first:
            wrong.append(f"{name} grow from {first} to {last}")
    return wrong


def slope_of(found: list[Usage]) -> float:
    """KiB a cycle, by least squares."""
    return float(np.polyfit(np.arange(len(found)), [one.bytes / 1024 for one in found], 1)[0])


def command(options: argparse.Namespace) -> None:
    """Soak, print, and leave with 1 if anything grew."""
    if options.cycles < FEWEST:
        raise ConfigError(
            f"--cycles must be at least {FEWEST}, got {options.cycles}: the first five after the warm-up are "
            "compared with the last five"
        )
    os.environ.setdefault("LLMREC_NUM_THREADS", "1")
    logging.getLogger("llmrec").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(whole_cycle(Path(folder)), options.cycles)
    print(f"{'cycle':>6} {'MiB':>8} {'files':>6} {'threads':>8}")
    for number in sorted({*range(0, len(found), max(1, len(found) // 10)), len(found) - 1}):
        one = found[number]
        print(f"{number + 1:6} {one.bytes / 2**20:8.1f} {one.files:6} {one.threads:8}")
    print(f"memory after the first tenth: {slope_of(found[len(found) // 10 :]):+.2f} KiB a cycle")
    wrong = judge(found, options.kib_per_cycle)
    print("\n".join(wrong))
    sys.exit(bool(wrong))


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--cycles",
        type=positive,
        default=500,
        help=f"how many, at least {FEWEST} (500); with few, caches that fill late look like growth",
    )
    made.add_argument(
        "--kib-per-cycle", type=positive_number, default=20.0, help="memory may grow by this (20)"
    )
    options = made.parse_args(arguments)
    raise SystemExit(guarded(lambda: command(options)))


if __name__ == "__main__":
    main()
