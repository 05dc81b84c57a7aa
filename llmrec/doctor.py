"""Is this machine ready? One line per thing that a run needs, and what to do where it is not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from llmrec.config import given
from llmrec.recipe import Recipe

LEAST_DISK = 20e9
"""Free bytes below which a run with an 8B model may fill the disk."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    status: str
    """ok, note, problem"""
    what: str
    advice: str = ""


def findings(recipe: Recipe | None = None) -> Iterator[Finding]:
    """Everything that is looked at, as it is found.

    Args:
        recipe: also look for its data files and models.
    """
    yield from libraries()
    yield from accelerator()
    yield disk(Path.cwd())
    if recipe is not None:
        yield from data_files(recipe)
        yield from models(recipe)


def libraries() -> Iterator[Finding]:
    """Python and every dependency against the range that the package asks for."""
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()}")
    for text in importlib.metadata.requires("llmrec") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("problem", f"{wanted.name} is not installed", f'run `pip install "{wanted}"`')
            continue
        if Version(version) not in wanted.specifier:
            fix = f'run `pip install "{wanted.name}{wanted.specifier}"`'
            yield Finding("problem", f"{wanted.name} {version} is outside {wanted.specifier}", fix)
        else:
            yield Finding("ok", f"{wanted.name} {version}")


def accelerator() -> Iterator[Finding]:
    """GPUs, their memory and whether they compute in bfloat16."""
    import torch

    if not torch.cuda.is_available():
        advice = "small recipes run on the CPU; for Llama-3-8B take a machine with a GPU of 24 GB or more"
        yield Finding("note", f"no CUDA device, {os.cpu_count()} CPU cores", advice)
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        what = f"GPU {index}: {found.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        if free < 0.5 * total:
            yield Finding("note", what, "another process holds much of it; `nvidia-smi` names it")
        elif found.major < 8:
            yield Finding("note", what, "it has no bfloat16; use finetune.precision=fp32")
        else:
            yield Finding("ok", what)


def disk(folder: Path) -> Finding:
    """Free space where runs are written."""
    free = shutil.disk_usage(folder).free
    what = f"{free / 1e9:.0f} GB free on the disk of {folder.name or 'the root folder'}"
    if free < LEAST_DISK:
        return Finding("note", what, "an 8B model and its adapter take 20 GB; free some, or use another disk")
    return Finding("ok", what)


def data_files(recipe: Recipe) -> Iterator[Finding]:
    """Files that the settings name."""
    for stage in ("prepare_data", "train_collab", "encode_items"):
        config = getattr(recipe, stage)
        for name, path in getattr(config, "source_files", dict)().items():
            where = f"{stage}.{name}={path}"
            if path.startswith("hub:") or Path(path).exists():
                yield Finding("ok", where)
            else:
                yield Finding("problem", f"{where}: no such file", f"put it there, or set {stage}.{name}")
    prepare = recipe.prepare_data
    if prepare.source == "amazon_2014":
        from llmrec.data.named import file_names

        for name in file_names(given(prepare.category)):
            there = (Path(given(prepare.folder)) / name).is_file()
            advice = "" if there else "fetched by the run, unless it is offline"
            yield Finding(
                "ok" if there else "note",
                f"{Path(given(prepare.folder)) / name}{'' if there else ' is absent'}",
                advice,
            )


def models(recipe: Recipe) -> Iterator[Finding]:
    """Models that the settings name: a folder, or in the cache of the Hub."""
    wanted = []
    if not recipe.finetune.is_mini:
        wanted.append(("finetune.base_model", recipe.finetune.base_model, recipe.finetune.revision))
    for name in ("text", "image"):
        encoder = getattr(recipe.encode_items, name)
        if encoder.encoder == "huggingface":
            wanted.append((f"encode_items.{name}.model", encoder.model, encoder.revision))
        elif encoder.encoder == "llm2clip":
            from llmrec.encoders.llm2clip import CLIP_MODEL, TEXT_MODEL

            default = TEXT_MODEL if name == "text" else CLIP_MODEL
            wanted.append((f"encode_items.{name}.model", encoder.model or default, encoder.revision))
    for where, model, revision in wanted:
        yield model_finding(where, model, revision)


def model_finding(where: str, model: str, revision: str | None) -> Finding:
    """One model."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_dir():
        if any(Path(model).glob("*.safetensors")):
            return Finding("ok", f"{where}={model}")
        return Finding("problem", f"{where}={model} holds no .safetensors weights", "give a complete model")
    if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
        return Finding("ok", f"{where}={model}, in the Hub's cache")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding(
            "problem", f"{where}={model} is not in the Hub's cache", f"run `hf download {model}` online"
        )
    return Finding(
        "note", f"{where}={model} is not here yet", f"fetched by the run; or run `hf download {model}`"
    )
