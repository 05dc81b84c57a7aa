"""What will keep a recipe from finishing, looked for before anything starts: files, models, templates, and
settings of one stage that cannot work with those of another."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmrec.errors import ConfigError
from llmrec.recipe import Recipe
from llmrec.stages import STAGES


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    status: str
    """ok, note, problem"""
    what: str
    advice: str = ""


def in_the_way(recipe: Recipe, stages: Iterable[str] = tuple(STAGES)) -> Iterator[Finding]:
    """What stages need, and whether it is there; takes no time and loads nothing.

    Args:
        recipe: the settings.
        stages: those that are still to be computed.
    """
    stages = set(stages)
    yield from data_files(recipe, stages)
    yield from models(recipe, stages)
    if "encode_items" in stages:
        yield from contents(recipe)
    constrained = recipe.learn_semantic_ids.init == "kmeans_constrained"
    if constrained and "learn_semantic_ids" in stages and not importlib.util.find_spec("k_means_constrained"):
        yield Finding(
            "problem",
            "learn_semantic_ids.init=kmeans_constrained: its library is not installed",
            "run `pip install 'llmrec[constrained]'`, or set learn_semantic_ids.init=kmeans",
        )
    if "finetune" in stages:
        yield from fine_tuning(recipe)
    yield from modalities(recipe, stages)


def data_files(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Files that the settings name."""
    for stage in ("prepare_data", "train_collab", "encode_items"):
        if stage not in stages:
            continue
        config = getattr(recipe, stage)
        named = {path.name for path in recipe.prepare_data.named_files()}
        for name, path in config.source_files().items():
            if name in named:
                continue
            where = f"{stage}.{name}={path}"
            if path.startswith("hub:") or Path(path).exists():
                yield Finding("ok", where)
            else:
                yield Finding("problem", f"{where}: no such file", f"put it there, or set {stage}.{name}")
    prepare = recipe.prepare_data
    if "prepare_data" in stages:
        for path in prepare.named_files():
            if path.is_file():
                yield Finding("ok", str(path))
            elif prepare.offline:
                advice = "put it there, or set prepare_data.offline=false"
                yield Finding("problem", f"{path} is absent, and prepare_data.offline=true", advice)
            else:
                yield Finding("note", f"{path} is absent", "fetched by the run")


def to_fetch(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Files of data that are absent and would be fetched, and the hosts that may have them."""
    prepare = recipe.prepare_data
    if prepare.source != "amazon_2014" or prepare.offline:
        return [], []
    from llmrec.data.named import AMAZON_2014

    addresses = [*prepare.mirrors, f"https://{AMAZON_2014}"]
    hosts = [urllib.parse.urlsplit(address).hostname or address for address in addresses]
    absent = [path.name for path in prepare.named_files() if not path.is_file()]
    return absent, list(dict.fromkeys(hosts))


def resolves(host: str, seconds: float = 3.0) -> bool:
    """Whether a name leads to an address, as far as a few seconds tell; proxies resolve names themselves."""
    if urllib.request.getproxies():
        return True
    found: list[bool] = []

    def look() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.append(bool(socket.getaddrinfo(host, None)))

    asking = threading.Thread(target=look, daemon=True)
    asking.start()
    asking.join(seconds)
    return any(found)


def models(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Models that the settings name: a folder, or in the cache of the Hub."""
    wanted = []
    if not recipe.finetune.is_mini and "finetune" in stages:
        wanted.append(("finetune.base_model", recipe.finetune.base_model, recipe.finetune.revision))
    for name in ("text", "image") if "encode_items" in stages else ():
        encoder = getattr(recipe.encode_items, name)
        if encoder.encoder == "huggingface":
            wanted.append((f"encode_items.{name}.model", encoder.model, encoder.revision))
        elif encoder.encoder == "llm2clip":
            from llmrec.encoders.llm2clip import CLIP_MODEL, TEXT_MODEL

            default = TEXT_MODEL if name == "text" else CLIP_MODEL
            wanted.append((f"encode_items.{name}.model", encoder.model or default, encoder.revision))
            if name == "text":
                adapter = encoder.adapter or CLIP_MODEL
                wanted.append(("encode_items.text.adapter", adapter, encoder.adapter_revision))
    for where, model, revision in wanted:
        yield model_finding(where, model, revision)


def model_finding(where: str, model: str, revision: str | None) -> Finding:
    """One model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        if any(Path(model).glob("*.safetensors")):
            return Finding("ok", f"{where}={model}")
        return Finding("problem", f"{where}={model} holds no .safetensors weights", "give a complete model")
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        what = f"{where}={model}: no such folder, and not a Hub id (owner/name)"
        return Finding("problem", what, f"put the model there, or set {where}")
    if isinstance(cached, str):
        return Finding("ok", f"{where}={model}, in the Hub's cache")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding(
            "problem", f"{where}={model} is not in the Hub's cache", f"run `hf download {model}` online"
        )
    return Finding(
        "note", f"{where}={model} is not here yet", f"fetched by the run; or run `hf download {model}`"
    )


def contents(recipe: Recipe) -> Iterator[Finding]:
    """Whether the items will have the texts and pictures that encoders are told to read."""
    data, encode = recipe.prepare_data, recipe.encode_items
    if data.source == "sample_market":
        return
    named = "image_folder" if data.source == "amazon_2014" else "image_column"
    reads_pictures = encode.image.encoder not in ("none", "precomputed")
    if reads_pictures and getattr(data, named) is None and data.image_url_column is None:
        yield Finding(
            "problem",
            f"encode_items.image.encoder={encode.image.encoder} finds no pictures",
            f"set prepare_data.{named}, or encode_items.image.encoder=none",
        )
    if encode.text.encoder in ("none", "precomputed") or data.source == "amazon_2014":
        return
    there: list[str] = []
    if data.items is not None:
        there = [*(["title"] if data.title_column else []), *data.text_columns]
    if not there:
        yield Finding(
            "problem",
            f"encode_items.text.encoder={encode.text.encoder} finds no texts",
            "name an items file with prepare_data.title_column or prepare_data.text_columns, or set "
            "encode_items.text.encoder=none",
        )
    asked = encode.text.columns or re.findall(r"\{([^{}]+)\}", encode.text.template or "")
    if there and (unknown := [name for name in asked if name not in there]):
        yield Finding(
            "problem",
            f"encode_items.text asks for the columns {', '.join(asked)}: {', '.join(unknown)} will not be "
            f"there, but {', '.join(there)}",
            f"add prepare_data.text_columns={','.join((*data.text_columns, *unknown))}",
        )


def fine_tuning(recipe: Recipe) -> Iterator[Finding]:
    """The template, what needs a GPU, and widths that must agree."""
    from llmrec.finetune.prompt import read_template

    config = recipe.finetune
    try:
        read_template(config.prompt)
        yield Finding("ok", f"finetune.prompt={config.prompt}")
    except ConfigError as error:
        yield Finding("problem", str(error), "set finetune.prompt")
    needs_gpu = [
        f"finetune.{name}={value}"
        for name, value in (("attention", "flex"), ("kernels", "liger"))
        if getattr(config, name) == value
    ]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            yield Finding("problem", f"{', '.join(needs_gpu)}: there is no CUDA device", "leave it out")
    if config.kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
        yield Finding("problem", "finetune.kernels=liger: not installed", "run `pip install 'llmrec[gpu]'`")
    ids = recipe.learn_semantic_ids
    reads_codes = config.method in ("mme_sid", "se_sid") and not config.project_codes
    # Residual k-means makes codes of the vectors' own width.
    if config.is_mini and reads_codes and ids.method != "rkmeans" and ids.code_dim != config.mini.hidden_size:
        yield Finding(
            "problem",
            f"learn_semantic_ids.code_dim={ids.code_dim} differs from finetune.mini.hidden_size="
            f"{config.mini.hidden_size}",
            "make them equal, or set finetune.project_codes=true",
        )
    if recipe.train_collab.include_valid and config.eval_every_epochs:
        yield Finding(
            "problem",
            "train_collab.include_valid=true makes the collaborative vectors from validation items, so these "
            "can measure nothing in finetune",
            "set finetune.eval_every_epochs=0 and finetune.select=last, or leave it out",
        )


def modalities(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Whether there will be the vectors that stages ask for."""
    from llmrec.finetune.modalities import modalities_of

    encode, ids = recipe.encode_items, recipe.learn_semantic_ids
    made = [name for name in ("text", "image") if getattr(encode, name).encoder != "none"]
    model = recipe.train_collab.provider
    asked = {
        f"train_collab.{model}.content": ("train_collab", recipe.train_collab.content, made),
        "learn_semantic_ids.modalities": ("learn_semantic_ids", ids.modalities or (), ["collab", *made]),
    }
    for setting, (stage, names, there) in asked.items():
        absent = [name for name in names if name not in there]
        if stage in stages and absent:
            advice = " and ".join(f"set encode_items.{name}.encoder" for name in absent)
            what = f"{setting}={','.join(names)}: there will be no {' and no '.join(absent)} vectors"
            yield Finding("problem", what, f"{advice}, or leave it out")
    if "finetune" in stages:
        try:
            modalities_of(recipe.finetune, ids.modalities or ("collab", *made))
        except ConfigError as error:
            yield Finding("problem", str(error), "set finetune.method, or what encode_items encodes")
