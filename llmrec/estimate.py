"""What a recipe will cost, fine-tuning above all, before it is paid: counts from the real data, the rest by
formula.

Exact: users, items, targets, tokens, optimiser steps, trainable parameters (the model is built without
memory, on torch's meta device), but for widths that only the items tell, which are told as the most they can
be. By formula: floating-point operations and memory of weights, gradients and optimiser states. Rough:
activations, and time, which assumes what an H200 reached with Llama-3-8B.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from llmrec.estimate_inputs import check_run, data_of, meta_model, vector_widths
from llmrec.finetune import base_model, build
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.fusion import folding_is_cheaper
from llmrec.finetune.modalities import modalities_of
from llmrec.finetune.model import MMESID
from llmrec.finetune.packing import count_tokens
from llmrec.finetune.steps import steps_of_epoch, training_targets
from llmrec.interactions import Interactions, Targets
from llmrec.recipe import Recipe
from llmrec.stage_times import Work, work_before

ITEM_MATRICES = 4.4
"""Tables of items x model width that a step holds at its peak beside the target table: folded or joined keys,
their gradient, and those of the sources they were folded from. Counted on a CPU."""


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
    ends_early: bool
    """Whether validation may end it before its last epoch"""
    others: dict[str, Work | str]
    """What the other stages ask of a GPU, or why that is not known, in order"""

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """How prompts are laid out, in the arguments of `count_tokens`."""

    instruction: int
    response: int
    layout: str
    shared: bool
    min_slots: int
    tokens_per_item: int

    def tokens(self, targets: Targets) -> int:
        """Tokens of a forward pass over the targets."""
        return count_tokens(targets, **asdict(self))


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
    model = meta_model(recipe, prompt, held, data)
    prompts = Prompts(
        instruction=len(prompt.instruction),
        response=len(prompt.response),
        layout=config.layout,
        # On a GPU rows stand in a stream unless told otherwise, with one instruction for all.
        shared=model.share_instruction or (config.share_instruction and config.rows == "auto"),
        min_slots=model.min_slots,
        tokens_per_item=model.item_tokens.tokens_per_item,
    )
    counts = counts_of(config, data, prompts)
    parameters = build.parameter_counts(model)
    memory = bytes_used(config, model, held, counts)
    return Estimate(
        counts=counts,
        parameters=parameters,
        bounds={name: width for name, width in bounds.items() if name in names},
        flops=operations(config, model, counts, parameters),
        memory=memory,
        moved=bytes_moved(config, counts["steps"], memory["frozen weights"], parameters["trainable"]),
        precision=config.precision,
        ends_early=config.patience is not None,
        others=work_before(recipe, data, widths) | {"evaluate": ranking(config, model, data, prompts)},
    )


def counts_of(config: FinetuneConfig, data: Interactions, prompts: Prompts) -> dict[str, int]:
    """`Estimate.counts`."""
    targets = training_targets(config, data)
    tokens, item_tokens, largest = 0, 0, 0
    steps = steps_of_epoch(targets, config, 1, prompts.response, prompts.tokens_per_item)
    for chosen in steps:
        step = targets.take(chosen)
        size = prompts.tokens(step)
        tokens, largest = tokens + size, max(largest, size)
        item_tokens += distinct_items(data.item, step)
    return {
        "users": data.num_users,
        "items": data.num_items,
        "interactions": len(data.item),
        "targets": len(targets),
        "steps": len(steps),
        "tokens": tokens,
        "tokens_per_prefix": replace(prompts, layout="per_prefix", shared=False).tokens(targets),
        "item_tokens": item_tokens,
        "largest_step": largest,
        "epochs": config.epochs,
    }


def distinct_items(item: np.ndarray, targets: Targets) -> int:
    """Different items in the histories of a step, which are turned into tokens once each."""
    if not len(targets):
        return 0
    longest: dict[int, int] = {}
    for start, stop in zip(targets.start.tolist(), targets.stop.tolist()):
        longest[start] = max(longest.get(start, 0), stop)
    return len(np.unique(np.concatenate([item[start:stop] for start, stop in longest.items()])))


def shape_of(model: MMESID) -> Any:
    """Configuration of the base model, which says how wide and deep it is."""
    return model.base.config


def operations(
    config: FinetuneConfig, model: MMESID, counts: dict[str, int], parameters: dict[str, int]
) -> dict[str, float]:
    """Floating-point operations of one epoch, forward and backward (see `build.flops_per_token`).

    A product takes 2 a weight and input, and 4 more for the gradients of both; those of item vectors, which
    are frozen, are not asked for.
    """
    width, scores = shape_of(model).hidden_size, model.item_scores
    vectors = sum(scores.vectors_of(name).shape[1] for name in scores.modalities)
    tokens, targets, rows = counts["item_tokens"], counts["targets"], counts["items"] + 1
    if config.loss == "bce_sampled":
        # Two items a target, the one that is right and the one that was drawn.
        scored, made = 2 * targets * width, 2 * targets * width * vectors
    elif folding_is_cheaper(targets / counts["steps"], width):
        scored, made = targets * rows * width, rows * width * vectors * counts["steps"]
    else:
        scored, made = targets * rows * (width + vectors + len(scores.modalities)), 0
    return {
        "base model": build.flops_per_token(model) * counts["tokens"],
        "item tokens": (4.0 * parameters["projections"] + 6.0 * parameters["item_mlp"]) * tokens,
        "catalogue scores": 6.0 * scored,
        "item matrix": 4.0 * made,
    }


def ranking(config: FinetuneConfig, model: MMESID, data: Interactions, prompts: Prompts) -> Work | str:
    """Ranking the catalogue for every test user: one pass over the histories, and all scores."""
    if config.is_mini:
        return "not known for a mini base"
    targets = data.targets("test", max_history=config.max_history)
    tokens = prompts.tokens(targets)
    linear = [module for module in model.base.modules() if isinstance(module, nn.Linear)]
    weights = sum(module.in_features * module.out_features for module in linear)
    scores = len(targets) * (data.num_items + 1) * shape_of(model).hidden_size
    precision: Any = {"fp32": "float32", "bf16": "bfloat16"}[config.precision]
    return Work(flops=2.0 * (weights * tokens + scores), precision=precision)


def bytes_used(
    config: FinetuneConfig, model: MMESID, widths: dict[str, int], counts: dict[str, int]
) -> dict[str, float]:
    """Bytes on one GPU: exact for what is kept, rough for activations."""
    kept: float = sum(
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
    base = shape_of(model)
    half = 2 if config.precision == "bf16" else 4
    # Per token and layer: inputs of the linear layers, queries, keys, values, and the feed-forward part.
    numbers = 10 * base.hidden_size + 4 * base.intermediate_size
    if config.checkpoint_activations:
        numbers += base.hidden_size * base.num_hidden_layers
    else:
        numbers *= base.num_hidden_layers
    tokens = min(config.micro_batch_tokens, counts["largest_step"])
    # Of sampled items a few rows are made, next to nothing.
    scored_rows = 0 if config.loss == "bce_sampled" else ITEM_MATRICES * (counts["items"] + 1)
    return {
        "frozen weights": float(kept),
        "trained weights, gradients, AdamW": (8.0 + states) * trained,
        "best weights so far": 4.0 * trained * (config.select == "valid"),
        "item vectors": 4.0 * (counts["items"] + 1) * sum(widths.values()),
        "item matrix and its gradients (rough)": 4.0 * scored_rows * base.hidden_size,
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
