"""What the training engine reaches on a device, variant by variant: tokens per second, share of the measured
matrix-product peak, memory and seconds per epoch.

    python tools/benchmark_engine.py --prepare-data runs/x/prepare_data --shape llama3-8b

The base model is of a published shape with random weights, with the whole side network on it. For a GPU
(`--shape tiny` runs anywhere; on a CPU, memory is the most of all variants so far).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from benchmark_finetune import add_prompt, world

from llmrec import arguments, distributed, finished, machine
from llmrec.artifacts import SemanticIds
from llmrec.console import guarded, set_up_logging, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.interactions import Interactions, Targets

if TYPE_CHECKING:
    import torch

    from llmrec.evaluation.rank import Scorer
    from llmrec.finetune.model import MMESID
    from llmrec.finetune.prompt import Prompt
    from llmrec.finetune.trainer import Trainer

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


def run(options: argparse.Namespace) -> None:
    """One table: what every variant reaches on this device."""
    set_up_logging()
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


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--prepare-data", metavar="DIR", required=True, help="a finished prepare_data folder")
    made.add_argument(
        "--shape", choices=SHAPES, default="llama3-8b",
        help="of the base model; tiny runs anywhere (llama3-8b, which takes up to 32 GB of a GPU)",
    )  # fmt: skip
    made.add_argument(
        "--only", nargs="+", choices=VARIANTS, metavar="VARIANT",
        help=f"some of the variants: {', '.join(map(repr, VARIANTS))} (all)",
    )  # fmt: skip
    arguments.add_count(made, "--steps", 30, "timed steps of each variant; fewer where an epoch has no more")
    arguments.add_count(made, "--micro-batch-tokens", 16384, "most tokens of a forward pass")
    arguments.add_count(
        made, "--users", 600,
        "users that are ranked, which takes minutes of compiling first; all where there are fewer; 0: none",
        arguments.whole,
    )  # fmt: skip
    arguments.add_count(made, "--content-width", 1280, "of text and image vectors")
    add_prompt(made)
    made.add_argument(
        "--out", metavar="FILE", type=arguments.new_file, help="a new file for the rows as JSON (none)"
    )
    return made


if __name__ == "__main__":
    main()
