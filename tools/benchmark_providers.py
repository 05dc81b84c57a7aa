"""Sequence models timed: against one padded row per target, per epoch, and by length of history.

    python tools/benchmark_providers.py layout --prepare-data runs/x/prepare_data [--provider sasrec]
    python tools/benchmark_providers.py epochs --prepare-data runs/x/prepare_data [--comparison FILE]
    python tools/benchmark_providers.py lengths

layout: the same model and weights trained by our data path and by that of RecBole-style code (one row per
target, every row padded to max_history, 2,048 shuffled rows a batch taken from host arrays, all logits
at once), alternating; beside them the softmax alone, which no data path makes cheaper; for models that know
at a position what they would know of the history up to it, from item ids alone. epochs: seconds per
epoch of every model, or of a comparison's rows, from some steps of real data. lengths: forward and backward
on random histories of 50, 200 and 1,000 items.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints

import numpy as np

from llmrec import arguments, distributed, finished, machine
from llmrec.collab.compare_cli import every_provider
from llmrec.collab.config import PROVIDER_FIELDS, TrainCollabConfig
from llmrec.console import guarded, set_up_logging, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.interactions import Interactions
from llmrec.recipe import module_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llmrec.data.batches import Batch

LENGTHS = (50, 200, 1000)
PRECISIONS = get_args(get_type_hints(TrainCollabConfig)["precision"])
LENGTHS_PROVIDERS = ("sasrec", "gru4rec", "mamba4rec", "mamba", "fuxi")
LAYOUT_PROVIDERS = ("sasrec", "gru4rec", "mamba4rec")
"""Models that `padded_step` trains as it should: the others read times, see the items that follow, draw
noise, or know something else at the end of a history than inside a longer one."""


def make(provider: str, num_items: int, **settings: Any) -> Any:
    """A fresh model with its default settings, the same weights every time."""
    import torch

    from llmrec.collab.provider import PROVIDERS

    torch.manual_seed(0)
    chosen = asdict(getattr(TrainCollabConfig(), provider)) | settings
    return PROVIDERS[provider](num_items=num_items, **chosen).to(distributed.device()).train()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    import torch

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


def padded_step(model: Any, optimizer: torch.optim.Optimizer, rows: np.ndarray, targets: np.ndarray) -> int:
    """One update of a model with `encode` and a tied table, as per-prefix code does it."""
    import torch
    from torch import nn
    from torch.nn import functional as F

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


def softmax_step(model: Any, number: int) -> int:
    """Value and gradients of the loss over all items for some random queries, as in our own steps."""
    import torch

    from llmrec.item_softmax import item_cross_entropy

    items = model.item.weight.detach().requires_grad_()
    query = torch.randn(number, items.shape[1], device=items.device, requires_grad=True)
    target = torch.randint(1, len(items), (number,), device=items.device)
    item_cross_entropy(query, items, target).backward()
    return number


def compare_layouts(options: argparse.Namespace, data: Interactions) -> None:
    """Targets per second of both data paths, in alternating rounds."""
    from llmrec.collab.rows import TrainingRows
    from llmrec.collab.trainer import Sums, train_step

    config = TrainCollabConfig(provider=options.provider)
    model = make(options.provider, data.num_items)
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
            (partial(train_step, model, ours, config, rows.batches(step), Sums()) for step in steps),
            keep=keep,
        )
        measure(
            "per prefix",
            (partial(padded_step, per_prefix, theirs, padded[batch], targets[batch]) for batch in batches),
            keep=keep,
        )
        measure("softmax alone", (partial(softmax_step, model, size) for size in sizes), keep=keep)
    for name, values in rates.items():
        print(f"{name:14}{statistics.median(values):12,.0f} targets per second")
    for name in ("ours", "softmax alone"):
        ratios = [fast / slow for fast, slow in zip(rates[name], rates["per prefix"])]
        spread = f"min {min(ratios):.2f}, max {max(ratios):.2f}"
        print(f"{name} / per prefix: median {statistics.median(ratios):.2f}, {spread}")
    print(f"{options.rounds} rounds; {options.provider}, {len(targets):,} targets")


def rows_timed(
    comparison: str | None, names: list[str] | None, precisions: list[str] | None = None
) -> dict[str, TrainCollabConfig]:
    """What `epochs` times: the rows of a comparison, or every model with its default settings; or some. Each
    as it is, or in every one of the precisions."""
    known = every_provider() if comparison is None else comparison_rows(comparison)
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"--providers must be among {', '.join(known)}, got {', '.join(unknown)}")
    chosen = {name: known[name] for name in names or known}
    if precisions is None:
        return chosen
    return {
        f"{name} {precision}": replace(cast(Any, config), precision=precision)
        for name, config in chosen.items()
        for precision in precisions
    }


def comparison_rows(path: str) -> dict[str, TrainCollabConfig]:
    """The rows of a comparison, from its recipe.

    Raises:
        ConfigError: there is none, it cannot be loaded, or it compares something else.
    """
    try:
        made = module_of(path, "providers_ml1m")
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"--comparison {path} cannot be loaded: {error}") from None
    if not callable(getattr(made, "rows", None)):
        raise ConfigError(
            f"--comparison {path} defines no function `rows`; give a recipe that compares sequence models, "
            "such as recipes/providers_ml1m.py"
        )
    rows = made.rows()
    if not isinstance(rows, dict):
        raise ConfigError(f"--comparison {path}: rows() must return a dict, got {type(rows).__name__}")
    for name, row in rows.items():
        if not isinstance(row, TrainCollabConfig) or row.provider not in PROVIDER_FIELDS:
            got = row.provider if isinstance(row, TrainCollabConfig) else type(row).__name__
            raise ConfigError(
                f"--comparison {path}: row {name} must be a TrainCollabConfig with a model of llmrec "
                f"({', '.join(PROVIDER_FIELDS)}), got {got}"
            )
    return rows


def time_epochs(options: argparse.Namespace, rows: dict[str, TrainCollabConfig], data: Interactions) -> None:
    """Seconds per epoch and per 1,000 targets of every row, from some of its steps."""
    wide = max(20, *(len(name) + 2 for name in rows))
    print(
        f"{'row':{wide}}{'layout':>11}{'parameters':>12}{'steps':>8}{'timed':>7}{'s / epoch':>11}"
        f"{'ms / 1,000 targets':>20}"
    )
    for name, config in rows.items():
        print(f"{name:{wide}}{epoch_figures(config, data, options)}")
    print("steps: of an epoch; timed: those that its seconds come from; validation is not in it")


def epoch_figures(config: TrainCollabConfig, data: Interactions, options: argparse.Namespace) -> str:
    """Those of a row, from some steps after those that warm up, or from all where there are no others."""
    from llmrec.collab.train import training_rows
    from llmrec.collab.trainer import Sums, train_step

    model = make(config.provider, data.num_items, **asdict(getattr(config, config.provider)))
    rows = training_rows(model, config, data.sequences("train"))
    optimizer = optimiser(model)
    steps = rows.steps(config.batch_by, config.batch_size, np.random.default_rng(0))
    targets = (rows.stop - rows.first_target).cpu().numpy()  # more than the masks that BERT4Rec draws of them

    def run(chosen: list[np.ndarray]) -> float:
        wait()
        started = time.perf_counter()
        for step in chosen:
            train_step(model, optimizer, config, rows.batches(step, epoch=options.epoch), Sums())
        wait()
        return (time.perf_counter() - started) / sum(int(targets[step].sum()) for step in chosen)

    if options.warm_up:
        run(steps[: options.warm_up])
    timed = steps[options.warm_up : options.warm_up + options.steps] or steps
    each = run(timed)
    size = sum(weight.numel() for weight in model.parameters())
    return (
        f"{rows.layout:>11}{size:12,}{len(steps):8,}{len(timed):7,}"
        f"{each * rows.num_targets:11.2f}{each * 1e6:20.2f}"
    )


def random_batch(length: int, num_items: int, rows: int) -> Batch:
    import torch

    from llmrec.data.batches import Batch

    items = torch.randint(1, num_items + 1, (rows, length + 1), device=distributed.device())
    time_ = torch.arange(length, device=items.device).expand(rows, -1) * 3600
    return Batch(item=items[:, :-1], target=items[:, 1:], time=time_, next_time=time_ + 3600)


def time_lengths(options: argparse.Namespace) -> None:
    """Milliseconds of forward and backward per 1,000 positions, so that linear growth is a flat line."""
    import torch

    print(
        f"{'provider':12}"
        + "".join(f"{f'T = {length}':>12}" for length in LENGTHS)
        + "   ms / 1,000 positions"
    )
    ran = {length: max(options.positions // length, 1) for length in LENGTHS}
    for provider in options.providers:
        found = []
        for length in LENGTHS:
            model = make(provider, 100, max_history=length)
            batch = random_batch(length, 100, ran[length])
            if model.layout == "prefixes":  # its cost for one whole history, not for each of its prefixes
                kept = torch.arange(length, device=batch.target.device) == length - 1
                batch = replace(batch, target=batch.target * kept)
            best = min(timed_pass(model, batch) for _ in range(options.rounds))
            found.append(best / batch.item.numel() * 1e6)
        print(f"{provider:12}" + "".join(f"{value:12.2f}" for value in found))
    positions = " / ".join(f"{length * rows:,}" for length, rows in ran.items())
    print(f"best of {options.rounds}; {positions} positions a pass, 100 items, default widths")


def timed_pass(model: Any, batch: Batch) -> float:
    wait()
    started = time.perf_counter()
    total: Tensor = model.loss(batch).total
    total.backward()
    wait()
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    show_lines_at_once()
    raise SystemExit(guarded(lambda: measure(options)))


def parser() -> argparse.ArgumentParser:
    made, verb = arguments.with_verbs(__doc__)
    layout = verb("layout", "our data path against one padded row per target, in alternating rounds")
    epochs = verb("epochs", "seconds per epoch of every model, or of a comparison's rows")
    lengths = verb("lengths", "milliseconds per 1,000 positions in histories of 50, 200 and 1,000 items")
    for one in (layout, epochs):
        one.add_argument(
            "--prepare-data", metavar="DIR", required=True, help="a finished prepare_data folder"
        )
    layout.add_argument(
        "--provider", default="sasrec", choices=LAYOUT_PROVIDERS, help="the model that both train (sasrec)"
    )
    arguments.add_count(
        layout, "--steps", 16, "steps of 256 users in a round, and an eighth as many of 2,048 rows"
    )
    arguments.add_count(layout, "--rounds", 4, "alternating rounds, after one that does not count")
    epochs.add_argument(
        "--providers", nargs="+", metavar="NAME", help="these models, or rows of --comparison, alone (all)"
    )
    epochs.add_argument(
        "--comparison", metavar="FILE",
        help="time the rows of a comparison, recipes/providers_ml1m.py for example, as they are set there "
        "(every model with its default settings)",
    )  # fmt: skip
    epochs.add_argument(
        "--precision", nargs="+", metavar="NAME", choices=PRECISIONS,
        help="time each in these, of float32, tf32 and bfloat16 (as it is set)",
    )  # fmt: skip
    arguments.add_count(epochs, "--steps", 16, "steps that are timed; fewer where an epoch has no more")
    arguments.add_count(epochs, "--warm-up", 1, "steps before them, 0 for none", arguments.whole)
    arguments.add_count(
        epochs, "--epoch", 1, "that they are of; from 32 on SIGMA-GMVAE has its hard interests, too"
    )
    lengths.add_argument(
        "--providers", nargs="+", metavar="NAME", choices=PROVIDER_FIELDS, default=LENGTHS_PROVIDERS,
        help=f"of {', '.join(PROVIDER_FIELDS)} ({' '.join(LENGTHS_PROVIDERS)})",
    )  # fmt: skip
    arguments.add_count(lengths, "--rounds", 4, "passes of which the best counts")
    arguments.add_count(lengths, "--positions", 8000, "positions in a pass, of whole histories, at least one")
    return made


def measure(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    set_up_logging()
    if options.verb == "lengths":
        time_lengths(options)
    elif options.verb == "layout":
        compare_layouts(options, finished.load(Interactions, Path(options.prepare_data)))
    else:
        rows = rows_timed(options.comparison, options.providers, options.precision)
        time_epochs(options, rows, finished.load(Interactions, Path(options.prepare_data)))
    import torch

    print(f"{machine.describe()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
