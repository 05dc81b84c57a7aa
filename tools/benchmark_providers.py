"""Sequence models timed: against one padded row per target, per epoch, and by length of history.

    python tools/benchmark_providers.py layout --prepare-data runs/x/prepare_data [--provider sasrec]
    python tools/benchmark_providers.py epochs --prepare-data runs/x/prepare_data [--comparison FILE]
    python tools/benchmark_providers.py lengths

layout: the same model and weights trained by our data path and by that of RecBole-style code (one row per
target, every row padded to max_history, 2,048 shuffled rows a batch taken from host arrays, all logits
at once), alternating; beside them the softmax alone, which no data path makes cheaper. epochs: seconds per
epoch of every model, or of a comparison's rows, from some steps of real data. lengths: forward and backward
on random histories of 50, 200 and 1,000 items.
"""

from __future__ import annotations

import argparse
import itertools
import runpy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec import distributed, finished, machine
from llmrec.collab.compare_cli import every_provider
from llmrec.collab.config import PROVIDER_FIELDS, TrainCollabConfig
from llmrec.collab.provider import PROVIDERS
from llmrec.collab.rows import TrainingRows
from llmrec.collab.train import Sums, train_step, training_rows
from llmrec.data.batches import Batch
from llmrec.interactions import Interactions
from llmrec.item_softmax import item_cross_entropy

LENGTHS = (50, 200, 1000)


def make(provider: str, num_items: int, **settings: object) -> nn.Module:
    """A fresh model with its default settings, the same weights every time."""
    torch.manual_seed(0)
    chosen = asdict(getattr(TrainCollabConfig(), provider)) | settings
    return PROVIDERS[provider](num_items=num_items, **chosen).to(distributed.device()).train()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)


def wait() -> None:
    machine.finish(distributed.device())


def prefix_rows(data: Interactions, max_history: int) -> tuple[np.ndarray, np.ndarray]:
    """Every (prefix, target) of the train split, prefixes padded to max_history; host arrays."""
    offset, item, _ = data.sequences("train")
    rows, targets = [], []
    for start, stop in itertools.pairwise(offset):
        for end in range(start + 1, stop):
            shown = item[max(start, end - max_history) : end]
            rows.append(np.pad(shown, (0, max_history - len(shown))))
            targets.append(item[end])
    return np.array(rows), np.array(targets)


def padded_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: np.ndarray, targets: np.ndarray
) -> int:
    """One update of a model with `encode` and a tied table, as per-prefix code does it."""
    device = distributed.device()
    history, target = torch.from_numpy(rows).to(device), torch.from_numpy(targets).to(device)
    last = (history != 0).sum(1) - 1
    query = model.encode(history)[torch.arange(len(history), device=device), last]
    loss = F.cross_entropy(query @ model.item.weight.T, target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return len(target)


def softmax_step(model: nn.Module, number: int) -> int:
    """Value and gradients of the loss over all items for some random queries, as in our own steps."""
    items = model.item.weight.detach().requires_grad_()
    query = torch.randn(number, items.shape[1], device=items.device, requires_grad=True)
    target = torch.randint(1, len(items), (number,), device=items.device)
    item_cross_entropy(query, items, target).backward()
    return number


def compare_layouts(options: argparse.Namespace, data: Interactions) -> None:
    """Targets per second of both data paths, in alternating rounds."""
    model = make(options.provider, data.num_items)
    if model.layout != "positions" or not hasattr(model, "encode") or model.uses_time:
        raise SystemExit(f"error: {options.provider} is not a causal model of item ids alone")
    per_prefix = make(options.provider, data.num_items)
    ours, theirs = optimiser(model), optimiser(per_prefix)
    rows = TrainingRows.of(data.sequences("train"), model.max_history, "positions", distributed.device())
    padded, targets = prefix_rows(data, model.max_history)
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"ours": [], "per prefix": [], "softmax alone": []}

    def measure(name: str, steps: Iterable[Callable[[], int]], *, keep: bool) -> None:
        wait()
        started = time.perf_counter()
        number = sum(step() for step in steps)
        wait()
        if keep:
            rates[name].append(number / (time.perf_counter() - started))

    for turn in range(options.rounds + 1):
        steps = rows.steps("users", 256, rng)[: options.steps]
        order = rng.permutation(len(targets))
        batches = np.array_split(order, max(len(order) // 2048, 1))[: max(1, options.steps // 8)]
        sizes = [int((batch.target != 0).sum()) for step in steps for batch in rows.batches(step)]
        keep = turn > 0  # the first round warms up
        measure(
            "ours",
            (lambda step=step: train_step(model, ours, 5.0, rows.batches(step), Sums()) for step in steps),
            keep=keep,
        )
        measure(
            "per prefix",
            (
                lambda batch=batch: padded_step(per_prefix, theirs, padded[batch], targets[batch])
                for batch in batches
            ),
            keep=keep,
        )
        measure("softmax alone", (lambda size=size: softmax_step(model, size) for size in sizes), keep=keep)
    for name, values in rates.items():
        print(f"{name:14}{statistics.median(values):12,.0f} targets per second")
    for name in ("ours", "softmax alone"):
        ratios = [fast / slow for fast, slow in zip(rates[name], rates["per prefix"])]
        spread = f"min {min(ratios):.2f}, max {max(ratios):.2f}"
        print(f"{name} / per prefix: median {statistics.median(ratios):.2f}, {spread}")
    print(f"{options.rounds} rounds; {options.provider}, {len(targets):,} targets")


def rows_timed(options: argparse.Namespace) -> dict[str, TrainCollabConfig]:
    """What `epochs` times: the rows of a comparison, or every model with its default settings."""
    if options.comparison is None:
        known = every_provider()
    else:
        made = runpy.run_path(options.comparison) if Path(options.comparison).is_file() else {}
        if "rows" not in made:
            raise SystemExit(f"error: --comparison {options.comparison} is no recipe with a function `rows`")
        known = made["rows"]()
    if unknown := [name for name in options.providers or () if name not in known]:
        raise SystemExit(f"error: --providers must be among {', '.join(known)}, got {', '.join(unknown)}")
    return {name: known[name] for name in options.providers or known}


def time_epochs(options: argparse.Namespace, data: Interactions) -> None:
    """Seconds per epoch and per 1,000 targets of every row, from some of its steps."""
    print(
        f"{'row':20}{'layout':>11}{'parameters':>12}{'steps':>8}{'s / epoch':>11}{'ms / 1,000 targets':>20}"
    )
    for name, config in rows_timed(options).items():
        model = make(config.provider, data.num_items, **asdict(getattr(config, config.provider)))
        rows = training_rows(model, config, data.sequences("train"))
        optimizer = optimiser(model)
        steps = rows.steps(config.batch_by, config.batch_size, np.random.default_rng(0))

        def run(chosen: list[np.ndarray], model=model, optimizer=optimizer, rows=rows) -> float:
            wait()
            started, number = time.perf_counter(), 0
            for step in chosen:
                number += train_step(model, optimizer, 5.0, rows.batches(step), Sums())
            wait()
            return (time.perf_counter() - started) / number

        run(steps[: options.warm_up])
        each = run(steps[options.warm_up : options.warm_up + options.steps] or steps)
        size = sum(weight.numel() for weight in model.parameters())
        print(
            f"{name:20}{rows.layout:>11}{size:12,}{len(steps):8,}"
            f"{each * rows.num_targets:11.2f}{each * 1e6:20.2f}",
            flush=True,
        )
    print(f"from {options.steps} steps; validation is not in it")


def random_batch(length: int, num_items: int, rows: int) -> Batch:
    items = torch.randint(1, num_items + 1, (rows, length + 1), device=distributed.device())
    time_ = torch.arange(length, device=items.device).expand(rows, -1) * 3600
    return Batch(item=items[:, :-1], target=items[:, 1:], time=time_)


def time_lengths(options: argparse.Namespace) -> None:
    """Milliseconds of forward and backward per 1,000 positions, so that linear growth is a flat line."""
    print(
        f"{'provider':12}"
        + "".join(f"{f'T = {length}':>12}" for length in LENGTHS)
        + "   ms / 1,000 positions"
    )
    for provider in options.providers:
        found = []
        for length in LENGTHS:
            model = make(provider, 100, max_history=length)
            batch = random_batch(length, 100, max(options.positions // length, 1))
            if model.layout == "prefixes":  # its cost for one whole history, not for each of its prefixes
                kept = torch.arange(length, device=batch.target.device) == length - 1
                batch = replace(batch, target=batch.target * kept)
            best = min(timed_pass(model, batch) for _ in range(options.rounds))
            found.append(best / batch.item.numel() * 1e6)
        print(f"{provider:12}" + "".join(f"{value:12.2f}" for value in found), flush=True)
    print(f"best of {options.rounds}; {options.positions:,} positions a pass, 100 items, default widths")


def timed_pass(model: nn.Module, batch: Batch) -> float:
    wait()
    started = time.perf_counter()
    total: Tensor = model.loss(batch).total
    total.backward()
    wait()
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("layout", "epochs", "lengths"))
    parser.add_argument("--prepare-data", metavar="DIR", help="a finished prepare_data folder")
    parser.add_argument("--provider", default="sasrec", choices=PROVIDER_FIELDS, help="for layout")
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", help="for epochs and lengths: these rows or models alone"
    )
    parser.add_argument(
        "--steps", type=int, default=16, help="steps measured, 256 users each for layout (16)"
    )
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them, for epochs (1)")
    parser.add_argument(
        "--comparison",
        metavar="FILE",
        help="for epochs: time the rows of a comparison (recipes/providers_ml1m.py) as they are set there",
    )
    parser.add_argument("--rounds", type=int, default=4, help="alternating rounds, or repeats (4)")
    parser.add_argument("--positions", type=int, default=8000, help="positions in a pass, for lengths (8000)")
    options = parser.parse_args(arguments)
    if options.what == "lengths":
        options.providers = options.providers or ["sasrec", "gru4rec", "mamba4rec", "mamba", "fuxi"]
        if unknown := [name for name in options.providers if name not in PROVIDER_FIELDS]:
            parser.error(f"--providers must be among {', '.join(PROVIDER_FIELDS)}, got {', '.join(unknown)}")
        time_lengths(options)
    else:
        if options.prepare_data is None:
            parser.error(f"{options.what} needs --prepare-data")
        data = finished.load(Interactions, Path(options.prepare_data))
        compare_layouts(options, data) if options.what == "layout" else time_epochs(options, data)
    print(f"{machine.describe()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
