"""Models that a recipe names: whether they are here, or can be fetched when a stage asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmrec.findings import Finding
from llmrec.finetune.config import FinetuneConfig
from llmrec.network import resolves
from llmrec.recipe import Recipe

INDEX = "model.safetensors.index.json"
"""Which part of a large model's weights holds what."""

TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
"""Files of which a tokenizer has one at least."""

SECONDS = 5.0
"""How long the Hub is waited for."""


def models(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Models that the settings name: a folder, in the cache of the Hub, or on the Hub.

    Args:
        recipe: the settings.
        stages: those that are still to be computed.
    """
    for where, model, revision in named(recipe, stages):
        yield model_finding(where, model, revision)


def named(recipe: Recipe, stages: set[str]) -> Iterator[tuple[str, str, str | None]]:
    """Setting, model and revision of every model that transformers loads."""
    if not recipe.finetune.is_mini and "finetune" in stages:
        yield "finetune.base_model", recipe.finetune.base_model, recipe.finetune.revision
    for name in ("text", "image") if "encode_items" in stages else ():
        encoder = getattr(recipe.encode_items, name)
        if encoder.encoder == "huggingface":
            yield f"encode_items.{name}.model", encoder.model, encoder.revision
        elif encoder.encoder == "llm2clip":
            from llmrec.encoders.llm2clip import CLIP_MODEL, TEXT_MODEL

            default = TEXT_MODEL if name == "text" else CLIP_MODEL
            yield f"encode_items.{name}.model", encoder.model or default, encoder.revision
            if name == "text":
                yield "encode_items.text.adapter", encoder.adapter or CLIP_MODEL, encoder.adapter_revision


def model_finding(where: str, model: str, revision: str | None) -> Finding:
    """One model."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        if lacks := lacking(where, Path(model)):
            return Finding("problem", f"{where}={model} holds no {lacks}", "give a complete model")
        return Finding("ok", f"{where}={model}")
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        what = f"{where}={model}: no such folder, and not a Hub id (owner/name)"
        return Finding("problem", what, f"put the model there, or set {where}")
    if isinstance(cached, str) and is_whole(where, model, revision):
        return Finding("ok", f"{where}={model}, in the Hub's cache")
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "problem",
            f"{where}={model} is not in the Hub's cache, or not all of it",
            f"run `hf download {model}` online",
        )
    return on_the_hub(where, model, revision)


def lacking(where: str, folder: Path) -> str | None:
    """The first file, or kind of file, that a model's folder lacks; None if weights, settings and, for a base
    model, a tokenizer are there."""
    if not any(folder.glob("*.safetensors")):
        return ".safetensors weights"
    if where.endswith(".adapter"):
        return None  # whose files have other names
    wanted = ["config.json"]
    if not (folder / "model.safetensors").is_file():
        shards = shards_of(folder / INDEX)
        if not shards:
            return f"model.safetensors, nor an {INDEX} that can be read"
        wanted += sorted(shards)
    if where == "finetune.base_model" and not any((folder / name).is_file() for name in TOKENIZERS):
        return "tokenizer"
    return next((name for name in wanted if not (folder / name).is_file()), None)


def shards_of(index: Path) -> set[str]:
    """The files that weights lie in by their index; empty: it is not there, or cannot be read."""
    try:
        return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def hidden_size(config: FinetuneConfig) -> int | None:
    """Width of the base model, where its settings are on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if config.is_mini:
        return config.mini.hidden_size
    path: Any = Path(config.base_model) / "config.json"
    if not path.is_file():
        try:
            path = try_to_load_from_cache(config.base_model, "config.json", revision=config.revision)
        except HFValidationError:
            return None
    if not isinstance(path, str | Path):
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        width = found.get("hidden_size", (found.get("text_config") or {}).get("hidden_size"))
    except (OSError, ValueError, AttributeError):
        return None  # whoever loads the model says what is wrong with it
    return width if isinstance(width, int) else None


def tokenizer_folder(config: FinetuneConfig) -> Path | None:
    """Where the base model's tokenizer is on this machine: its folder, or that of the Hub's cache; None where
    it is not here, or the base model has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(config.base_model)
    if config.is_mini:
        return None
    if folder.is_dir():
        return folder if any((folder / name).is_file() for name in TOKENIZERS) else None
    try:
        found = try_to_load_from_cache(config.base_model, "tokenizer_config.json", revision=config.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def is_whole(where: str, model: str, revision: str | None) -> bool:
    """Whether the cache of the Hub holds the weights too, and a base model's tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(model, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if where.endswith(".adapter"):
        return True  # it is part of a repository whose files have other names
    if where == "finetune.base_model" and cached("tokenizer_config.json") is None:
        return False
    if cached("model.safetensors") is not None:
        return True
    index = cached(INDEX)
    shards = set() if index is None else shards_of(index)
    return bool(shards) and all(cached(shard) is not None for shard in shards)


def on_the_hub(where: str, model: str, revision: str | None) -> Finding:
    """Whether the Hub has a model, and for this user; one question, which fetches nothing."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from llmrec.hub import unanswered

    what = f"{where}={model}"
    host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    elsewhere = f"run `hf download {model}` where there is a network, or set {where} to a folder"
    if not resolves(host):
        lost = f"{what} must be fetched from {host}, whose name cannot be resolved from here"
        return Finding("problem", lost, f"check the network; {elsewhere}")
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision), timeout=SECONDS)
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/{model}"
        advice = f"ask for access at {page}, and log in with `hf auth login`"
        return Finding("problem", f"{what} is not for everybody", advice)
    except RevisionNotFoundError:
        return Finding("problem", f"{what} has no revision {revision}", "give one that it has, or none")
    except EntryNotFoundError:
        return Finding("problem", f"{what} has no config.json", "give a model of the transformers library")
    except (HfHubHTTPError, OSError, unanswered()) as error:
        said = getattr(getattr(error, "response", None), "status_code", None) or type(error).__name__
        if isinstance(error, RepositoryNotFoundError) or said in (401, 403):
            hidden = f"{what} is neither a folder here nor on the Hub for you to see"
            advice = (
                f"check its name, log in with `hf auth login` if it is private, or set {where} to a folder"
            )
            return Finding("problem", hidden, advice)
        unsure = f"{what} is not here yet, and {host} does not say whether it has it ({said})"
        return Finding("note", unsure, f"the run will try to fetch it; {elsewhere}")
    return Finding("note", f"{what} is not here yet", f"fetched by the run; or run `hf download {model}`")
