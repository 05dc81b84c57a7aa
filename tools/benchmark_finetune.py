"""How fast fine-tuning and its evaluation are, as ratios to what the same work takes the plain way.

    python tools/benchmark_finetune.py packing --prepare-data runs/x/prepare_data --users 256
    python tools/benchmark_finetune.py evaluation --prepare-data runs/x/prepare_data
    python tools/benchmark_finetune.py catalogue --items 1000000
    python tools/benchmark_finetune.py engine --prepare-data runs/x/prepare_data --shape llama3-8b

packing: the same training targets in packed prompts and in one prompt per target, alternating, with a random
`mini` base. evaluation: histories of test users in blocks with everything kept that can be, and one prompt
per user. catalogue: memory of training steps and of a full ranking in a very large catalogue. engine: tokens
per second, share of the measured matrix-product peak, memory and seconds per epoch of a random base of a
published shape with the whole side network, variant by variant; for a GPU (`--shape tiny` runs anywhere; on
a CPU, memory is the most of all variants so far).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec import arguments, distributed, finished, machine
from llmrec.artifacts import SemanticIds
from llmrec.console import guarded, set_up_logging, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.interactions import Interactions, Targets

if TYPE_CHECKING:
    import torch

    from llmrec.evaluation.rank import Scorer
    from llmrec.finetune.model import MMESID
    from llmrec.finetune.prompt import Prompt
    from llmrec.finetune.trainer import Trainer

LAYOUTS = ("packed", "per_prefix")
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "vocab_size": 1024,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
"""Published configs (llama3-8b: meta-llama/Meta-Llama-3-8B), but for the vocabulary, which only texts use."""

POPULAR_ITEMS = 100
"""Items that the random histories of `catalogue` name again and again; no catalogue may be smaller."""

VARIANTS: dict[str, dict[str, Any]] = {
    "16 targets": {"batch_size": 16},
    "64 targets": {"batch_size": 64},
    "256 targets": {"batch_size": 256},
    "64, not recorded": {"batch_size": 64, "cuda_graphs": False},
    "256, not recorded": {"batch_size": 256, "cuda_graphs": False},
    "256, dense masks": {"batch_size": 256, "attention": "sdpa"},
    "16, compiled": {"batch_size": 16, "compile": True},
    "64, compiled": {"batch_size": 64, "compile": True},
    "256, compiled": {"batch_size": 256, "compile": True},
    "64, liger": {"batch_size": 64, "kernels": "liger"},
    "256, liger": {"batch_size": 256, "kernels": "liger"},
    "256, recomputed": {"batch_size": 256, "checkpoint_activations": True},
    "64, 8-bit states": {"batch_size": 64, "optimizer": "adamw_8bit"},
    "64, read out at items": {"batch_size": 64, "readout": "item"},
    "64, one prompt per target": {"batch_size": 64, "layout": "per_prefix"},
    "16, 4-bit base": {"batch_size": 16, "quantize": "nf4", "optimizer": "adamw_8bit"},
}


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


def engine(options: argparse.Namespace) -> None:
    """One table: what every variant reaches on this device."""
    import torch

    data = finished.load(Interactions, Path(options.prepare_data))
    device = distributed.device()
    shape = SHAPES[options.shape]
    widths = {"collab": 64, "text": options.content_width, "image": options.content_width}
    vectors, ids, prompt = world(data, widths, shape["hidden_size"], options)
    precision: Literal["bf16", "fp32"] = "bf16" if device.type == "cuda" else "fp32"
    peak = machine.matmul_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    print(f"{machine.describe()}; matrix products reach {peak / 1e12:.3g} TFLOP/s")
    rows = []
    for name, settings in VARIANTS.items():
        if options.only and name not in options.only:
            continue
        if device.type != "cuda" and ("kernels" in settings or "quantize" in settings):
            print(f"{name}: needs a GPU")
            continue
        config = FinetuneConfig(
            base_model="random", precision=precision, eval_every_epochs=0, analyse=False,
            micro_batch_tokens=options.micro_batch_tokens, **settings,
        )  # fmt: skip
        own_prompt = dataclasses.replace(prompt, response=[]) if config.readout == "item" else prompt
        rows.append({"variant": name, **variant(config, data, (vectors, ids, own_prompt), peak, options)})
        print(" ".join(f"{key} {value}" for key, value in rows[-1].items()))
        if device.type == "cuda":
            gc.collect()  # compiled modules hold on to themselves
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if options.out:  # after every variant: one that ends the process must not take the others along
            options.out.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1))


def variant(
    config: FinetuneConfig,
    data: Interactions,
    made: tuple[dict[str, np.ndarray], SemanticIds, Prompt],
    peak: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What one of them reaches, or why it cannot be run."""
    import torch

    from llmrec.finetune import build
    from llmrec.finetune.lora import add_lora

    vectors, ids, prompt = made
    device = distributed.device()
    try:
        base = add_lora(random_base(SHAPES[options.shape], config, device), config)
        count = torch.from_numpy(data.train_count)
        model = build.build_model(config, base, prompt, vectors, ids, count, device)
        return measure(config, data, model, peak, options)
    except (ConfigError, torch.OutOfMemoryError) as error:
        return {"failed": " ".join(str(error).split())[:200]}


def random_base(shape: dict[str, Any], config: FinetuneConfig, device: torch.device) -> torch.nn.Module:
    """A decoder of random weights, made on the device; through files where it is to be quantised."""
    import torch
    from transformers import AutoModel, LlamaConfig

    from llmrec.finetune import base_model

    known = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with device:
        base = AutoModel.from_config(known, dtype=dtype, trust_remote_code=False)
    if config.quantize == "none":
        return base
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        del base
        torch.cuda.empty_cache()
        place = {"": torch.cuda.current_device()}
        base = AutoModel.from_pretrained(
            folder,
            quantization_config=base_model.four_bits(),
            dtype=dtype,
            device_map=place,
            trust_remote_code=False,
        )
    torch.cuda.reset_peak_memory_stats()
    return base


def measure(
    config: FinetuneConfig, data: Interactions, model: MMESID, peak: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Some steps after a round of the same that does not count, and one ranking of some users, if of any."""
    from llmrec.finetune.scoring import scorer_of
    from llmrec.finetune.trainer import Trainer

    device = distributed.device()
    trainer = Trainer(config, data, model)
    steps = trainer.steps_of(1)
    timed = steps[: options.steps]
    seconds, tokens = training_time(trainer, timed)
    speed = tokens / seconds
    memory = machine.peak_memory(device)
    targets = data.targets("test")
    some = targets.take(np.arange(min(options.users, len(targets))))
    ranked = ranking_time(scorer_of(model, config), data, some) / len(some) if len(some) else None
    return {
        "steps": len(timed),
        "users_ranked": len(some),
        "tokens_per_second": round(speed),
        "share_of_peak": round(speed * trainer.flops / peak, 4),
        "seconds_per_step": round(seconds / len(timed), 5),
        "seconds_per_epoch": round(seconds / len(timed) * len(steps), 1),
        # A process's largest size is that of all that it has done, variants before this one included.
        "peak_gb" if device.type == "cuda" else "peak_gb_so_far": round(memory / 1e9, 2),
        "evaluation_seconds": None if ranked is None else round(ranked * len(targets), 1),
    }


def training_time(trainer: Trainer, steps: list[np.ndarray]) -> tuple[float, int]:
    """Seconds and tokens of steps, after a round of the same that does not count."""
    device = distributed.device()
    for chosen in steps:  # so that nothing is compiled or recorded while the clock runs
        trainer.train_step(trainer.targets.take(chosen))
    machine.finish(device)
    begun, tokens = time.perf_counter(), 0
    for chosen in steps:
        tokens += trainer.train_step(trainer.targets.take(chosen))[1]
    machine.finish(device)
    return time.perf_counter() - begun, tokens


def ranking_time(scorer: Scorer, data: Interactions, targets: Targets) -> float:
    """Seconds to rank users, once a GPU has compiled what it needs for every length of their histories."""
    import torch

    from llmrec.data.batches import pad_histories
    from llmrec.evaluation.rank import rank_users

    device = distributed.device()
    if device.type == "cuda":
        rank_users(scorer, data, targets)
    else:
        start, stop = (torch.from_numpy(place[:8]) for place in (targets.start, targets.stop))
        scorer.score(pad_histories(torch.from_numpy(data.item), start, stop))
    machine.finish(device)
    begun = time.perf_counter()
    rank_users(scorer, data, targets)
    machine.finish(device)
    return time.perf_counter() - begun


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    show_lines_at_once()
    raise SystemExit(guarded(lambda: run(options)))


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    set_up_logging()
    verbs = {"packing": packing, "evaluation": evaluation, "catalogue": catalogue, "engine": engine}
    verbs[options.verb](options)


def parser() -> argparse.ArgumentParser:
    made, verb = arguments.with_verbs(__doc__)
    packed = verb("packing", "training with packed prompts against one prompt per target, with a mini base")
    ranked = verb("evaluation", "ranking in blocks of users against one prompt per user, with a mini base")
    large = verb("catalogue", "memory and time of training and ranking in a very large catalogue")
    gpu = verb("engine", "every variant of training on a random base of a published shape; for a GPU")
    for one in (packed, ranked, gpu):
        one.add_argument(
            "--prepare-data", metavar="DIR", required=True, help="a finished prepare_data folder"
        )
    for one, users in ((packed, "whose targets are trained on"), (ranked, "ranked")):
        arguments.add_count(one, "--users", 600, f"users that are {users}; all where there are fewer")
    arguments.add_count(
        gpu, "--users", 600,
        "users that are ranked, which takes minutes of compiling first; all where there are fewer; 0: none",
        arguments.whole,
    )  # fmt: skip
    for one in (packed, ranked):
        arguments.add_count(one, "--rounds", 5, "timed rounds of each way, after one that does not count")
    for one in (packed, ranked, large):
        arguments.add_count(one, "--width", 128, "H of the mini base model, a multiple of 8")
        arguments.add_count(one, "--layers", 2, "its transformer blocks")
    for one in (packed, ranked, large, gpu):
        arguments.add_count(one, "--instruction", 33, "I, instruction tokens")
        arguments.add_count(one, "--response", 4, "R, response tokens")
    arguments.add_count(packed, "--batch-size", 4096, "targets per optimiser step")
    arguments.add_count(
        large, "--items", 1_000_000,
        "N; a million take 5.8 GB of memory and with one thread about 10 s for each of three steps and for "
        "the ranking, beside building the model",
    )  # fmt: skip
    gpu.add_argument(
        "--shape", choices=SHAPES, default="llama3-8b",
        help="of the base model; tiny runs anywhere (llama3-8b, which takes up to 32 GB of a GPU)",
    )  # fmt: skip
    arguments.add_count(gpu, "--content-width", 1280, "of text and image vectors")
    arguments.add_count(gpu, "--steps", 30, "timed steps of each variant; fewer where an epoch has no more")
    arguments.add_count(gpu, "--micro-batch-tokens", 16384, "most tokens of a forward pass")
    gpu.add_argument(
        "--only", nargs="+", choices=VARIANTS, metavar="VARIANT",
        help=f"some of the variants: {', '.join(map(repr, VARIANTS))} (all)",
    )  # fmt: skip
    gpu.add_argument(
        "--out", metavar="FILE", type=arguments.new_file, help="a new file for the rows as JSON (none)"
    )
    return made


if __name__ == "__main__":
    main()
