"""What a recipe will cost, fine-tuning above all, before it is paid: counts from the real data, the rest by
formula.

Exact: users, items, targets, tokens, optimiser steps, trainable parameters (the model is built without
memory, on torch's meta device), but for widths that only the items tell, which are told as the most they can
be. By formula: floating-point operations and memory of weights, gradients and
optimiser states. Rough: activations, and time, which assumes what an H200 reached with Llama-3-8B.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.provider import make_provider
from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ConfigError, LlmrecError
from llmrec.finetune import base_model, build
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.fusion import folding_is_cheaper
from llmrec.finetune.lora import add_lora
from llmrec.finetune.modalities import modalities_of
from llmrec.finetune.packing import count_tokens
from llmrec.finetune.steps import steps_of_epoch, train_counts, training_targets
from llmrec.finished import load
from llmrec.interactions import Interactions
from llmrec.manifest import MANIFEST
from llmrec.network import resolves
from llmrec.preflight import to_fetch
from llmrec.recipe import Recipe
from llmrec.stage_changes import TO_DO, UNCERTAIN, statuses
from llmrec.stage_times import UTILISATION, Gpu, Work, duration, work_before

logger = logging.getLogger("llmrec")


GPUS = {
    "A100": Gpu(312e12, 80e9, 2.04e12, 19.5e12),
    "H100": Gpu(989e12, 80e9, 3.35e12, 67e12),
    "H200": Gpu(989e12, 141e9, 4.8e12, 67e12),
    "RTX4090": Gpu(165e12, 24e9, 1.01e12, 82.6e12),
    "L40S": Gpu(362e12, 48e9, 0.864e12, 91.6e12),
}

ITEM_MATRICES = 4.4
"""Tables of items x model width that a step holds at its peak beside the target table: folded or joined keys,
their gradient, and those of the sources they were folded from. Counted on a CPU."""

MOVED = 3.0
"""What a step takes beside them, in times of reading the frozen weights twice and of updating the trained
ones once. Both fitted to an H200 with Llama-3-8B at 16, 64 and 256 targets a step (tools/engine.md)."""

BOUNDED = ("tfidf", "classical")
"""Encoders whose vectors are narrower than the settings say if the items do not span as many directions."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of one epoch of fine-tuning, and what the other stages ask."""

    counts: dict[str, int]
    """users, items, interactions, targets, steps, tokens, tokens_per_prefix, item_tokens: of one epoch;
    largest_step, in tokens; epochs"""
    parameters: dict[str, int]
    """By part, see `build.parameter_counts`"""
    bounds: dict[str, int]
    """Most numbers of an item vector by modality, where the items may turn out to have fewer"""
    flops: dict[str, float]
    """Floating-point operations of one epoch by part"""
    moved: float | None
    """Bytes of weights and optimiser states that one epoch's steps read and write; None with settings whose
    time is not known"""
    precision: str
    """Of products: see finetune.precision"""
    memory: dict[str, float]
    """Bytes on one GPU by part"""
    others: dict[str, Work | str]
    """What the other stages ask of a GPU, or why that is not known, in order"""

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


def estimate(recipe: Recipe, run_dir: Path | None = None) -> Estimate:
    """Count and compute.

    Args:
        recipe: settings; its data are read (and fetched where the recipe does so).
        run_dir: stages that are finished there are read in place of computing or assuming.

    Raises:
        LlmrecError: the data or the base model cannot be read, or the run was made with other settings.
    """
    if run_dir is not None:
        check_run(recipe, run_dir)
    config = recipe.finetune
    data = data_of(recipe, run_dir)
    widths, bounds = vector_widths(recipe, run_dir, data)
    names = modalities_of(config, tuple(widths))
    prompt = base_model.load_prompt(config)
    held = {name: widths[name] for name in names}
    model = meta_model(recipe, config, meta_base(config, prompt), prompt, held, data)
    layout: dict[str, Any] = {
        "instruction": len(prompt.instruction),
        "response": len(prompt.response),
        "layout": config.layout,
        # On a GPU rows stand in a stream unless told otherwise, with one instruction for all.
        "shared": model.share_instruction or (config.share_instruction and config.rows == "auto"),
        "min_slots": model.min_slots,
        "tokens_per_item": model.item_tokens.tokens_per_item,
    }
    counts = counts_of(config, data, layout)
    parameters = build.parameter_counts(model)
    memory = bytes_used(config, model, held, counts)
    return Estimate(
        counts=counts,
        parameters=parameters,
        bounds={name: width for name, width in bounds.items() if name in names},
        flops=operations(model, counts, parameters),
        memory=memory,
        moved=bytes_moved(config, counts["steps"], memory["frozen weights"], parameters["trainable"]),
        precision=config.precision,
        others=work_before(recipe, data, widths) | {"evaluate": ranking(config, model, data, layout)},
    )


def check_run(recipe: Recipe, run_dir: Path) -> None:
    """Refuse a folder whose stages say nothing about this recipe.

    Raises:
        ConfigError: no such folder, or its stages were made with other settings.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"--run-dir {run_dir}: no such folder")
    for name, status in statuses(recipe, run_dir, "learn_semantic_ids").items():
        if status not in ("done", TO_DO, UNCERTAIN):
            what = status.partition("; ")[0]
            raise ConfigError(
                f"--run-dir {run_dir}: {name} {what}; give the folder of a run with these settings, or leave "
                "--run-dir out"
            )


def fitting(recipe: Recipe, run_dir: Path) -> Path | None:
    """A run folder, if there is one and its stages were made with these settings."""
    try:
        check_run(recipe, run_dir)
    except LlmrecError:
        return None
    logger.info("estimate: from the stages that are finished in %s", run_dir)
    return run_dir


def refuse_unreachable(recipe: Recipe) -> None:
    """Say at once that data cannot be fetched, where a run would try again and again.

    Raises:
        ConfigError: they are absent, and no host that has them can be found.
    """
    files, hosts = to_fetch(recipe)
    if files and not any(map(resolves, hosts)):
        raise ConfigError(
            f"{' and '.join(files)} cannot be fetched: the name of {' or '.join(hosts)} cannot be resolved "
            f"from here. Put them into {recipe.prepare_data.folder}, or give the --run-dir of a run that has "
            "finished prepare_data"
        )


def data_of(recipe: Recipe, run_dir: Path | None) -> Interactions:
    """The data: those of the run folder, or prepared now."""
    data = stage_of(run_dir, Interactions)
    if data is None:
        from llmrec.data.prepare import prepare_data

        refuse_unreachable(recipe)
        data = prepare_data(recipe.prepare_data)
    return data


def stage_of(run_dir: Path | None, artifact: Any) -> Any:
    """A stage's output in a run folder, or None."""
    folder = None if run_dir is None else run_dir / artifact.stage
    return load(artifact, folder) if folder is not None and (folder / MANIFEST).is_file() else None


def vector_widths(
    recipe: Recipe, run_dir: Path | None, data: Interactions
) -> tuple[dict[str, int], dict[str, int]]:
    """Width of the item vectors by modality: as they are in the run folder, else as the settings say; and
    those of them that are only the most there can be."""
    ids = stage_of(run_dir, SemanticIds)
    if ids is not None and ids.model:
        return dict(ids.model["dims"]), {}
    collab, content = stage_of(run_dir, CollabEmbeddings), stage_of(run_dir, ContentEmbeddings)
    widths = {"collab": collab.vectors.shape[1] if collab else collab_width(recipe.train_collab, data)}
    bounds = {}
    if content is not None:
        widths |= {name: table.shape[1] for name, table in content.vectors.items()}
    else:
        for name in ("text", "image"):
            encoder = getattr(recipe.encode_items, name)
            if encoder.encoder != "none":
                widths[name] = encoder_width(encoder, data, name)
            if encoder.encoder in BOUNDED:
                bounds[name] = widths[name]
    chosen = recipe.learn_semantic_ids.modalities
    return {name: width for name, width in widths.items() if chosen is None or name in chosen}, bounds


def collab_width(config: TrainCollabConfig, data: Interactions) -> int:
    """Width of the item vectors that a sequence model hands on, or that a file has."""
    if config.provider == "precomputed":
        return read_vectors(str(config.vectors), data.raw_ids, "train_collab.vectors")[0].shape[1]
    if config.content:  # known to the model only with the content
        return config.of_model["embed_dim"]
    model = make_provider(config.provider, {"num_items": 1, **config.of_model})
    return model.item_embeddings().shape[1]


def encoder_width(encoder: Any, data: Interactions, name: str) -> int:
    """Width of an encoder's vectors.

    Raises:
        ConfigError: it is not known without the encoder's files.
        LlmrecError: a file of vectors cannot be used.
    """
    if encoder.encoder == "llm2clip":
        return 1280
    if encoder.encoder == "precomputed":
        return read_vectors(encoder.path, data.raw_ids, f"{name} vectors")[0].shape[1]
    if encoder.encoder in BOUNDED:
        return encoder.dim
    if encoder.encoder == "openclip":
        import open_clip

        found = open_clip.get_model_config(encoder.model)
        if found is not None:
            return int(found["embed_dim"])
    if encoder.encoder == "huggingface":
        try:
            found = AutoConfig.from_pretrained(encoder.model, revision=encoder.revision)
        except base_model.NOT_LOADABLE:
            found = None
        width = getattr(found, "projection_dim", None) or getattr(found, "hidden_size", None)
        if width is not None:
            return int(width)
    raise ConfigError(
        f"the width of {encoder.encoder} vectors ({encoder.model or encoder.path}) is not known before they "
        "exist; run the recipe with --until encode_items and give its --run-dir"
    )


def meta_base(config: FinetuneConfig, prompt: Any) -> nn.Module:
    """The base model with LoRA, without weights."""
    with torch.device("meta"):
        if config.is_mini:
            return base_model.load_base(config, prompt)
        try:
            known = AutoConfig.from_pretrained(config.base_model, revision=config.revision)
        except base_model.NOT_LOADABLE as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"finetune.base_model={config.base_model!r} cannot be read ({reason})"
            ) from None
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        return add_lora(AutoModel.from_config(known, dtype=dtype), config)


def meta_model(
    recipe: Recipe,
    config: FinetuneConfig,
    base: nn.Module,
    prompt: Any,
    widths: dict[str, int],
    data: Interactions,
) -> Any:
    """The whole module without weights."""
    ids = recipe.learn_semantic_ids
    rows = data.num_items + 1
    code_dims = {name: dim if ids.method == "rkmeans" else ids.code_dim for name, dim in widths.items()}
    made = SemanticIds(
        catalog=data.catalog,
        codes={name: np.zeros((rows, ids.num_levels), np.int64) for name in widths},
        codebooks={
            name: np.zeros((ids.num_levels, ids.num_codes, dim), np.float32)
            for name, dim in code_dims.items()
        },
    )
    vectors = {name: np.zeros((rows, dim), np.float32) for name, dim in widths.items()}
    with torch.device("meta"):
        counts = torch.from_numpy(train_counts(config, data))
        return build.build_model(config, base, prompt, vectors, made, counts, torch.device("meta"))


def counts_of(config: FinetuneConfig, data: Interactions, layout: dict[str, Any]) -> dict[str, int]:
    """`Estimate.counts`.

    Args:
        config: settings.
        data: what is trained on.
        layout: all arguments of `count_tokens` but the targets.
    """
    targets = training_targets(config, data)
    tokens, item_tokens, largest = 0, 0, 0
    steps = steps_of_epoch(targets, config, 1, layout["response"], layout["tokens_per_item"])
    for chosen in steps:
        step = targets.take(chosen)
        size = count_tokens(step, **layout)
        tokens, largest = tokens + size, max(largest, size)
        item_tokens += distinct_items(data.item, step)
    return {
        "users": data.num_users,
        "items": data.num_items,
        "interactions": len(data.item),
        "targets": len(targets),
        "steps": len(steps),
        "tokens": tokens,
        "tokens_per_prefix": count_tokens(targets, **layout | {"layout": "per_prefix", "shared": False}),
        "item_tokens": item_tokens,
        "largest_step": largest,
        "epochs": config.epochs,
    }


def distinct_items(item: np.ndarray, targets: Any) -> int:
    """Different items in the histories of a step, which are turned into tokens once each."""
    if not len(targets):
        return 0
    longest: dict[int, int] = {}
    for start, stop in zip(targets.start.tolist(), targets.stop.tolist()):
        longest[start] = max(longest.get(start, 0), stop)
    return len(np.unique(np.concatenate([item[start:stop] for start, stop in longest.items()])))


def operations(model: Any, counts: dict[str, int], parameters: dict[str, int]) -> dict[str, float]:
    """Floating-point operations of one epoch, forward and backward (see `build.flops_per_token`)."""
    side = sum(parameters[name] for name in ("projections", "item_mlp"))
    width, scores = model.base.config.hidden_size, model.item_scores
    vectors = sum(scores.vectors_of(name).shape[1] for name in scores.modalities)
    rows = counts["items"] + 1
    per_step = counts["targets"] / counts["steps"]
    folded = folding_is_cheaper(per_step, width)
    scored = width + (0 if folded else vectors + len(scores.modalities))
    return {
        "base model": build.flops_per_token(model) * counts["tokens"],
        "item tokens": 6.0 * side * counts["item_tokens"],
        "catalogue scores": 6.0 * counts["targets"] * rows * scored,
        "item matrix": 6.0 * rows * width * vectors * counts["steps"] if folded else 0.0,
    }


def ranking(config: FinetuneConfig, model: Any, data: Interactions, layout: dict[str, Any]) -> Work | str:
    """Ranking the catalogue for every test user: one pass over the histories, and all scores; layout as in
    `counts_of`."""
    if config.is_mini:
        return "not known for a mini base"
    targets = data.targets("test", max_history=config.max_history)
    tokens = count_tokens(targets, **layout)
    linear = [module for module in model.base.modules() if isinstance(module, nn.Linear)]
    weights = sum(module.in_features * module.out_features for module in linear)
    scores = len(targets) * (data.num_items + 1) * model.base.config.hidden_size
    return Work(flops=2.0 * (weights * tokens + scores), half=config.precision == "bf16")


def bytes_used(
    config: FinetuneConfig, model: Any, widths: dict[str, int], counts: dict[str, int]
) -> dict[str, float]:
    """Bytes on one GPU: exact for what is kept, rough for activations."""
    kept = sum(
        value.numel() * value.element_size() for value in model.parameters() if not value.requires_grad
    )
    if config.quantize == "nf4":
        # Linear layers in 4 bits, and 0.127 bits of scales a weight (double quantisation).
        linear = [
            module for module in base_model.decoder_of(model.base).modules() if isinstance(module, nn.Linear)
        ]
        frozen = sum(m.weight.numel() for m in linear if not m.weight.requires_grad)
        kept -= frozen * (2 - 4.127 / 8)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    states = 2 if config.optimizer == "adamw_8bit" else 8
    base = model.base.config
    half = 2 if config.precision == "bf16" else 4
    # Per token and layer: inputs of the linear layers, queries, keys, values, and the feed-forward part.
    numbers = 10 * base.hidden_size + 4 * base.intermediate_size
    if config.checkpoint_activations:
        numbers += base.hidden_size * base.num_hidden_layers
    else:
        numbers *= base.num_hidden_layers
    tokens = min(config.micro_batch_tokens, counts["largest_step"])
    return {
        "frozen weights": float(kept),
        "trained weights, gradients, AdamW": (8.0 + states) * trained,
        "best weights so far": 4.0 * trained * (config.select == "valid"),
        "item vectors": 4.0 * (counts["items"] + 1) * sum(widths.values()),
        "item matrix and its gradients (rough)": ITEM_MATRICES
        * 4.0
        * (counts["items"] + 1)
        * base.hidden_size,
        "activations (rough)": float(half * tokens * numbers),
    }


def bytes_moved(config: FinetuneConfig, steps: int, frozen: float, trained: int) -> float | None:
    """`Estimate.moved`.

    Args:
        config: settings.
        steps: of an epoch.
        frozen: bytes of frozen weights.
        trained: number of trained parameters.
    """
    plain = (config.quantize, config.optimizer, config.checkpoint_activations) == ("none", "adamw", False)
    if not plain or config.is_mini:
        return None
    # AdamW reads weight, gradient and both moments, and writes all but the gradient: 7 numbers of 4 bytes.
    return steps * (2 * frozen + 28.0 * trained)


def shown(found: Estimate, gpu: str) -> str:
    """The estimate as people read it."""
    memory = GPUS[gpu].memory
    counts, parts = found.counts, found.parameters
    fewer = counts["tokens_per_prefix"] / max(counts["tokens"], 1)
    lines = [
        f"data        {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['interactions']:,} interactions",
        f"per epoch   {counts['targets']:,} targets in {counts['steps']:,} steps; {counts['tokens']:,} "
        f"tokens ({fewer:.1f} times fewer than one prompt per target)",
        f"parameters  {'at most ' if found.bounds else ''}{parts['trainable']:,} trained, "
        + ("with" if parts["base_trainable"] == parts["base_total"] else "beside")
        + f" a base of {parts['base_total']:,}",
    ]
    lines += [
        f"            {count:>15,}  {name.replace('_', ' ')}"
        for name, count in parts.items()
        if count and name not in ("trainable", "base_total")
    ]
    if found.bounds:
        widths = " and ".join(f"{name} at most {width}" for name, width in found.bounds.items())
        lines.append(
            f"widths      {widths}; exact with the --run-dir of a run that has finished encode_items"
        )
    lines.append(f"operations  {scaled(found.total_flops, 'FLOP')} per epoch")
    lines += [
        f"            {scaled(value, 'FLOP'):>15}  {name}" for name, value in found.flops.items() if value
    ]
    fits = "fits" if found.total_memory < 0.92 * memory else "does not fit"
    lines.append(f"memory      {scaled(found.total_memory, 'B')}; {fits} one {gpu} ({scaled(memory, 'B')})")
    lines += [
        f"            {scaled(value, 'B'):>15}  {name}" for name, value in found.memory.items() if value
    ]
    return "\n".join([*lines, *times(found, gpu)])


def times(found: Estimate, gpu: str) -> list[str]:
    """Lines on how long each stage takes."""
    if found.moved is None:
        fine = "not known for a mini base, 4 bits, 8-bit states or recomputed activations"
    else:
        peak = GPUS[gpu].peak_fp32 if found.precision == "fp32" else GPUS[gpu].peak
        seconds = found.total_flops / (peak * UTILISATION) + MOVED * found.moved / GPUS[gpu].bandwidth
        number = found.counts["epochs"]
        fine = f"{duration(seconds * number)}: {number} epoch{'s' * (number != 1)} of {duration(seconds)}"
    others = {
        stage: work if isinstance(work, str) else work.shown(GPUS[gpu])
        for stage, work in found.others.items()
    }
    return [
        f"time        on one {gpu} (rough)",
        *(
            f"            {stage:18}  {others.get(stage, fine)}"
            for stage in ("train_collab", "encode_items", "learn_semantic_ids", "finetune", "evaluate")
        ),
    ]


def scaled(value: float, unit: str) -> str:
    """Three digits with a prefix: 1.23 GB."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}"
