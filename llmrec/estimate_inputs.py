"""What an estimate counts and computes on: the data, widths of the item vectors, and the model.

Data and widths are taken from a run folder where it has them; else the data are prepared, and widths are what
the settings say. The model is built without memory, on torch's meta device.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.provider import make_provider
from llmrec.encoders.config import ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ConfigError, LlmrecError
from llmrec.finetune import base_model, build
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.lora import add_lora
from llmrec.finetune.model import MMESID
from llmrec.finetune.prompt import Prompt
from llmrec.finetune.steps import train_counts
from llmrec.finished import load
from llmrec.interactions import Interactions
from llmrec.manifest import MANIFEST
from llmrec.network import resolves
from llmrec.preflight import to_fetch
from llmrec.recipe import Recipe
from llmrec.stage_changes import TO_DO, UNCERTAIN, statuses

logger = logging.getLogger("llmrec")

A = TypeVar("A", Interactions, CollabEmbeddings, ContentEmbeddings, SemanticIds)

BOUNDED = ("tfidf", "classical")
"""Encoders whose vectors are narrower than the settings say if the items do not span as many directions."""


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


def stage_of(run_dir: Path | None, artifact: type[A]) -> A | None:
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


def encoder_width(encoder: TextEncoderConfig | ImageEncoderConfig, data: Interactions, name: str) -> int:
    """Width of an encoder's vectors.

    Raises:
        ConfigError: it is not known without the encoder's files.
        LlmrecError: a file of vectors cannot be used.
    """
    if encoder.encoder == "llm2clip":
        return 1280
    if encoder.encoder == "precomputed":
        return read_vectors(str(encoder.path), data.raw_ids, f"{name} vectors")[0].shape[1]
    if encoder.encoder in BOUNDED:
        return encoder.dim
    if encoder.encoder == "openclip":
        import open_clip

        found = open_clip.get_model_config(encoder.model)
        if found is not None:
            return int(found["embed_dim"])
    if encoder.encoder == "huggingface":
        try:
            found = AutoConfig.from_pretrained(
                str(encoder.model), revision=encoder.revision, trust_remote_code=False
            )
        except base_model.NOT_LOADABLE:
            found = None
        width = getattr(found, "projection_dim", None) or getattr(found, "hidden_size", None)
        if width is not None:
            return int(width)
    raise ConfigError(
        f"the width of {encoder.encoder} vectors ({encoder.model or encoder.path}) is not known before they "
        "exist; run the recipe with --until encode_items and give its --run-dir"
    )


def meta_base(config: FinetuneConfig, prompt: Prompt) -> nn.Module:
    """The base model with LoRA, without weights."""
    with torch.device("meta"):
        if config.is_mini:
            return base_model.load_base(config, prompt)
        try:
            known = AutoConfig.from_pretrained(
                config.base_model, revision=config.revision, trust_remote_code=False
            )
        except base_model.NOT_LOADABLE as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"finetune.base_model={config.base_model!r} cannot be read ({reason})"
            ) from None
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        return add_lora(AutoModel.from_config(known, dtype=dtype, trust_remote_code=False), config)


def meta_model(recipe: Recipe, prompt: Prompt, widths: dict[str, int], data: Interactions) -> MMESID:
    """The whole module without weights."""
    config = recipe.finetune
    base = meta_base(config, prompt)
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
