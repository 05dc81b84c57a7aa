"""How fast fine-tuning and its evaluation are, as ratios to what the same work takes the plain way.

    python tools/benchmark_finetune.py packing --prepare-data runs/x/prepare_data --users 256
    python tools/benchmark_finetune.py evaluation --prepare-data runs/x/prepare_data
    python tools/benchmark_finetune.py catalogue --items 1000000

packing: the same training targets in packed prompts and in one prompt per target, alternating, with a random
`mini` base. evaluation: histories of test users in blocks with everything kept that can be, and one prompt
per user. catalogue: memory of training steps and of a full ranking in a very large catalogue.
`tools/benchmark_engine.py` measures large base models on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec import arguments, distributed, finished, machine
from llmrec.artifacts import SemanticIds
from llmrec.console import guarded, set_up_logging, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.interactions import Interactions

if TYPE_CHECKING:
    from llmrec.finetune.model import MMESID
    from llmrec.finetune.prompt import Prompt

LAYOUTS = ("packed", "per_prefix")

POPULAR_ITEMS = 100
"""Items that the random histories of `catalogue` name again and again; no catalogue may be smaller."""


def world(
    data: Interactions, widths: dict[str, int], hidden: int, options: argparse.Namespace
) -> tuple[dict[str, np.ndarray], SemanticIds, Prompt]:
    """Random vectors, codes of 4 x 256 and a prompt of the wanted length."""
    import torch

    from llmrec.finetune.prompt import Prompt

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = data.num_items + 1
    vectors = {name: rng.standard_normal((rows, width), np.float32) for name, width in widths.items()}
    for table in vectors.values():
        table[0] = 0
    ids = SemanticIds(
        catalog=data.catalog,
        codes={name: rng.integers(0, 256, (rows, 4)) for name in vectors},
        codebooks={name: rng.standard_normal((4, 256, hidden), np.float32) for name in vectors},
    )
    prompt = Prompt(
        instruction=[n % 16 for n in range(options.instruction)],
        response=list(range(options.response)),
        vocab_size=16,
    )
    return vectors, ids, prompt


def mini_model(data: Interactions, config: FinetuneConfig, options: argparse.Namespace) -> MMESID:
    """MME-SID on a random mini base, the same for all layouts."""
    import torch

    from llmrec.finetune import base_model, build

    widths = {"collab": 64, "text": 64}
    vectors, ids, prompt = world(data, widths, options.width, options)
    base, count = base_model.load_base(config, prompt), torch.from_numpy(data.train_count)
    return build.build_model(config, base, prompt, vectors, ids, count, distributed.device())


def mini_config(options: argparse.Namespace, **settings: Any) -> FinetuneConfig:
    mini = MiniConfig(
        hidden_size=options.width, num_layers=options.layers, intermediate_size=2 * options.width
    )
    return FinetuneConfig(mini=mini, fusion_temperature=1.0, eval_every_epochs=0, **settings)


def packing(options: argparse.Namespace) -> None:
    """Seconds per training step, one prompt per target over packed."""
    from llmrec.finetune.packing import count_tokens
    from llmrec.finetune.trainer import Trainer

    data = finished.load(Interactions, Path(options.prepare_data))
    trainers = {}
    for layout in LAYOUTS:
        config = mini_config(options, layout=layout, batch_size=options.batch_size)
        trainers[layout] = Trainer(config, data, mini_model(data, config, options))
    targets = trainers["packed"].targets
    known = np.unique(targets.user)
    users = np.random.default_rng(0).choice(known, min(options.users, len(known)), replace=False)
    chosen = np.flatnonzero(np.isin(targets.user, users))
    steps = [
        targets.take(part)
        for part in np.split(chosen, range(options.batch_size, len(chosen), options.batch_size))
    ]

    def epoch(layout: str) -> float:
        return sum(float(trainers[layout].train_step(step)[0]) for step in steps) / len(chosen)

    print_ratio({name: partial(epoch, name) for name in LAYOUTS}, options.rounds, "mean loss")
    size = {"instruction": options.instruction, "response": options.response}
    for layout in LAYOUTS:
        tokens = count_tokens(targets, layout=layout, shared=False, **size)
        print(f"{layout:10s} an epoch has {tokens:,} tokens, instruction in every row")
    print(f"{len(chosen):,} targets of {len(users):,} users; {machine.describe()}")


def evaluation(options: argparse.Namespace) -> None:
    """Seconds to rank test users, one prompt per user over blocks."""
    import torch

    from llmrec.evaluation.rank import rank_users
    from llmrec.finetune.scoring import scorer_of

    data = finished.load(Interactions, Path(options.prepare_data))
    config = mini_config(options)
    model = mini_model(data, config, options).eval()
    targets = data.targets("test")
    users = np.random.default_rng(0).choice(len(targets), min(options.users, len(targets)), replace=False)
    targets = targets.take(np.sort(users))

    def blocks() -> float:
        return float(rank_users(scorer_of(model, config), data, targets, block_size=256).rank.mean())

    @torch.no_grad()
    def prompts() -> float:
        """A plain causal forward pass per user; the item matrix is folded once here too."""
        matrix, ranks = model.item_scores.folded(), []
        embed = model.base.get_input_embeddings()
        for start, stop, target in zip(targets.start, targets.stop, targets.item):
            history = torch.from_numpy(data.item[start:stop])
            parts = [embed(model.instruction), model.item_tokens(history), embed(model.response)]
            hidden = model.base(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state
            scores = (matrix @ hidden[0, -1])[1:]
            own = scores[target - 1]
            ahead = (scores > own).sum() + 0.5 * ((scores == own).sum() - 1)
            seen = scores[torch.unique(history[history != target]) - 1]
            ranks.append(float(ahead - (seen > own).sum() - 0.5 * (seen == own).sum()))
        return float(np.mean(ranks))

    print_ratio({"blocks": blocks, "one prompt per user": prompts}, options.rounds, "mean rank")
    print(f"{len(targets):,} users, {data.num_items:,} items; {machine.describe()}")


def print_ratio(runs: dict[str, Callable[[], float]], rounds: int, what: str) -> None:
    """Time the first against the second in turn, after one round of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            value = run()
            took = time.perf_counter() - begun
            print(f"{name:20s} {took:8.2f} s, {what} {value:.6f}")
            if number:
                seconds[name].append(took)
    fast, slow = seconds.values()
    ratios = [b / a for a, b in zip(fast, slow)]
    names = list(runs)
    print(
        f"{names[1]} / {names[0]}: median {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds"
    )


def catalogue(options: argparse.Namespace) -> None:
    """Memory of steps of several sizes and of a full ranking, one after the other in one process."""
    from llmrec.evaluation.rank import rank_users
    from llmrec.finetune.scoring import scorer_of
    from llmrec.finetune.trainer import Trainer

    if options.items < POPULAR_ITEMS:
        raise ConfigError(
            f"--items must be at least {POPULAR_ITEMS}, which the random histories name, got {options.items}"
        )
    data = random_data(options.items)
    config = mini_config(options, batch_size=16)
    model = mini_model(data, config, options)
    trainer = Trainer(config, data, model)
    show_memory("built")
    for size in (16, 64, 256):
        begun = time.perf_counter()
        loss, *_ = trainer.train_step(trainer.targets.take(np.arange(size)))
        show_memory(f"step of {size} targets, loss {float(loss) / size:.3f}", begun)
    begun = time.perf_counter()
    targets = data.targets("test").take(np.arange(256))
    rank = rank_users(scorer_of(model, config), data, targets, top_k=20).rank
    show_memory(f"256 users ranked, mean rank {rank.mean():,.0f}", begun)
    print(f"{data.num_items:,} items, width {options.width}; {machine.describe()}")


def show_memory(what: str, begun: float | None = None) -> None:
    took = "" if begun is None else f", {time.perf_counter() - begun:.1f} s"
    print(f"{what}{took}; peak memory so far {machine.peak_memory(distributed.device()) / 1e9:.2f} GB")


def random_data(num_items: int, num_users: int = 500) -> Interactions:
    """Users of 12 items each: popular ones at every seventh of the first N places, and random ones."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    split = np.tile(np.array([0] * 10 + [1, 2], dtype=np.int8), num_users)
    item = rng.integers(1, num_items + 1, len(split))
    popular = item[:num_items:7]
    popular[:] = np.arange(1, len(popular) + 1) % POPULAR_ITEMS + 1
    names = [str(number) for number in range(1, num_items + 1)]
    count = np.bincount(item[split == 0], minlength=num_items + 1)[1:]
    table = pa.table({"raw_id": names, "title": names, "train_count": count})
    return Interactions(
        user_raw_ids=[str(user) for user in range(num_users)],
        items=table,
        offset=np.arange(num_users + 1) * 12,
        item=item,
        timestamp=np.arange(len(item)),
        split=split,
        summary={},
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    show_lines_at_once()
    raise SystemExit(guarded(lambda: run(options)))


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    set_up_logging()
    verbs = {"packing": packing, "evaluation": evaluation, "catalogue": catalogue}
    verbs[options.verb](options)


def parser() -> argparse.ArgumentParser:
    made, verb = arguments.with_verbs(__doc__)
    packed = verb("packing", "training with packed prompts against one prompt per target, with a mini base")
    ranked = verb("evaluation", "ranking in blocks of users against one prompt per user, with a mini base")
    large = verb("catalogue", "memory and time of training and ranking in a very large catalogue")
    for one in (packed, ranked):
        one.add_argument(
            "--prepare-data", metavar="DIR", required=True, help="a finished prepare_data folder"
        )
    for one, users in ((packed, "whose targets are trained on"), (ranked, "ranked")):
        arguments.add_count(one, "--users", 600, f"users that are {users}; all where there are fewer")
    for one in (packed, ranked):
        arguments.add_count(one, "--rounds", 5, "timed rounds of each way, after one that does not count")
    for one in (packed, ranked, large):
        arguments.add_count(one, "--width", 128, "H of the mini base model, a multiple of 8")
        arguments.add_count(one, "--layers", 2, "its transformer blocks")
        add_prompt(one)
    arguments.add_count(packed, "--batch-size", 4096, "targets per optimiser step")
    arguments.add_count(
        large, "--items", 1_000_000,
        "N; a million take 5.8 GB of memory and with one thread about 10 s for each of three steps and for "
        "the ranking, beside building the model",
    )  # fmt: skip
    return made


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """How long the prompts of `world` are."""
    arguments.add_count(parser, "--instruction", 33, "I, instruction tokens")
    arguments.add_count(parser, "--response", 4, "R, response tokens")


if __name__ == "__main__":
    main()
