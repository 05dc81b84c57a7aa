"""How long the stages of a recipe take on a GPU, roughly, before any of it is paid; for fine-tuning see
`llmrec.estimate`.

Large networks are reckoned by their operations. Small ones wait for the CPU that asks for these: their times
are what an H200 took on MovieLens-1M (tools/README.md), whatever the GPU, width and length of histories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.provider import make_provider
from llmrec.collab.train import training_rows
from llmrec.encoders.config import EncodeItemsConfig
from llmrec.encoders.encode import item_texts
from llmrec.interactions import Interactions
from llmrec.recipe import Recipe
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.learn import model_settings
from llmrec.semantic_ids.mm_rqvae import MMRQVAE


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet."""

    peak: float
    """Dense bfloat16 operations per second"""
    memory: float
    """Bytes"""
    bandwidth: float
    """Bytes moved per second"""
    peak_fp32: float
    """float32 operations per second, without TF32"""
    peak_tf32: float
    """Dense TF32 operations per second"""


UTILISATION = 0.4
"""Share of the peak in matrix products, which grow with tokens. Fitted to an H200 with Llama-3-8B
(tools/engine.md)."""

PER_MILLION_TARGETS: dict[str, float] = {
    **{"sasrec": 0.48, "comirec": 0.45, "fuxi": 1.4, "gmvae": 1.9, "moe": 2.9, "bert4rec": 0.71, "svae": 6.6},
    **{"gru4rec": 2.2, "mamba4rec": 4.9, "mind": 11, "mamba": 13, "diffurec": 66, "diffusion": 83},
}
"""Seconds per million targets that an H200 took on MovieLens-1M, settings of recipes/providers_ml1m.py:
seconds per epoch in float32 (tools/README.md) over 0.647 million targets, or 0.981 of all windows. Those of
SIGMA-GMVAE are from before its hard interests begin. Of a model that is not here no time is told."""

AS_RELEASED = {"mamba": 208.0, "diffusion": 32.0}
"""The same of models in their released form."""

OF_FLOAT32 = {
    "tf32": {"diffurec": 0.81, "diffusion": 0.63, "mamba": 0.90, "bert4rec": 1.1},
    "bfloat16": {"diffurec": 0.53, "diffusion": 0.55, "mamba": 1.19, "bert4rec": 1.24},
}
"""Their seconds there by `train_collab.precision`, over those in float32 (tools/README.md); models that were
not measured so are taken to need as many."""

SMALL_STEP = 0.0065
"""Seconds of an optimiser step of SASRec there (0.31 s in 48 steps), for small steps in general."""

TEXT_NUMBERS, PICTURE_NUMBERS, PICTURE_TOKENS = 7.0e9, 0.3e9, 577
"""LLM2CLIP: weights of linear layers in Llama-3-8B and in CLIP ViT-L/14-336, and tokens of a picture."""

KNOWN_ENCODERS = ("llm2clip", "tfidf", "classical", "precomputed", "none")
"""Encoders whose time is that of these numbers, or of a CPU."""

CHARACTERS = 4
"""Of a token, about."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage asks of a GPU; its time is the longest of what each part takes."""

    flops: float = 0.0
    """Operations of matrix products"""
    precision: Literal["float32", "tf32", "bfloat16"] = "bfloat16"
    """Of these"""
    steps: int = 0
    """Optimiser steps too small to keep a GPU busy"""
    seconds: float = 0.0
    """What it took where it was measured"""
    most: bool = False
    """Whether it may end earlier"""

    def on(self, gpu: Gpu) -> float:
        """Seconds."""
        peak = {"float32": gpu.peak_fp32, "tf32": gpu.peak_tf32, "bfloat16": gpu.peak}[self.precision]
        return max(self.flops / (peak * UTILISATION), self.steps * SMALL_STEP, self.seconds)

    def shown(self, gpu: Gpu) -> str:
        """Its time as people read it."""
        return f"{'at most ' if self.most else ''}{duration(self.on(gpu))}"


def work_before(recipe: Recipe, data: Interactions, widths: Mapping[str, int]) -> dict[str, Work | str]:
    """What the stages between the data and fine-tuning ask, or why that is not known, by stage.

    Args:
        recipe: settings.
        data: what it prepares.
        widths: of the item vectors by modality.
    """
    return {
        "train_collab": sequence_model(recipe.train_collab, data),
        "encode_items": encoders(recipe.encode_items, data),
        "learn_semantic_ids": quantiser(recipe.learn_semantic_ids, data.num_items, widths),
    }


def sequence_model(config: TrainCollabConfig, data: Interactions) -> Work | str:
    """Training a sequence model for all its epochs, without validations."""
    if config.provider == "precomputed":
        return "read from a file"
    if config.is_own:
        return "not known for a model of one's own"
    if config.provider not in PER_MILLION_TARGETS:
        return f"not known for {config.provider}, which was not measured"
    model: Any = make_provider(config.provider, {"num_items": 1, **config.of_model})
    splits = ("train", "valid") if config.include_valid else ("train",)
    rows = training_rows(model, config, data.sequences(*splits))
    if rows.layout != model.layout:
        return f"not known for {config.provider} with layout={rows.layout}"
    released = config.of_model.get("variant") == "released"
    rates = PER_MILLION_TARGETS | (AS_RELEASED if released else {})
    share = 1.0 if released else OF_FLOAT32.get(config.precision, {}).get(config.provider, 1.0)
    epochs, each = config.epochs, config.batch_size
    steps = -(-(rows.num_users if config.batch_by == "users" else rows.num_targets) // each)
    return Work(
        steps=epochs * steps,
        seconds=epochs * rows.num_targets / 1e6 * rates[config.provider] * share,
        most=config.select == "valid" and config.patience is not None,
    )


def encoders(config: EncodeItemsConfig, data: Interactions) -> Work | str:
    """Encoding all texts and pictures, once they are read."""
    flops, text, image = 0.0, config.text.encoder, config.image.encoder
    unknown = [name for name in (text, image) if name not in KNOWN_ENCODERS]
    if {text, image} <= {"precomputed", "none"}:
        return "read from files"
    if unknown:
        return f"not known for {' and '.join(dict.fromkeys(unknown))}"
    if text == "llm2clip":
        texts, _ = item_texts(config.text, data.items)
        flops += 2 * TEXT_NUMBERS * sum(map(len, texts)) / CHARACTERS
    if image == "llm2clip":
        pictures = sum(map(bool, data.items["image_path"].to_pylist()))
        flops += 2 * PICTURE_NUMBERS * PICTURE_TOKENS * pictures
    return Work(flops=flops) if flops else "on the CPU"


def quantiser(config: LearnSemanticIdsConfig, num_items: int, widths: Mapping[str, int]) -> Work | str:
    """Training MM-RQ-VAE; forward and backward take 6 operations a weight and item."""
    if config.method == "rkmeans":
        return "not known for rkmeans (no training)"
    with torch.device("meta"):
        model = MMRQVAE(**model_settings(config, widths))
    names = ("encoder", "decoder")  # of each modality
    parts = (part for name, part in model.named_parameters() if name.split(".")[2] in names)
    numbers = sum(part.numel() for part in parts)
    return Work(
        flops=6.0 * numbers * num_items * config.epochs,
        precision=config.precision,
        steps=config.epochs * -(-num_items // config.batch_size),
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
