"""Is this machine ready? One line per thing that a run needs, and what to do where it is not."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from llmrec import machine
from llmrec.findings import Finding
from llmrec.network import resolves
from llmrec.preflight import in_the_way, to_fetch
from llmrec.recipe import Recipe

LEAST_DISK = 20e9
"""Free bytes below which a run with an 8B model may fill the disk."""


def findings(recipe: Recipe | None = None) -> Iterator[Finding]:
    """Everything that is looked at, as it is found.

    Args:
        recipe: also look for its data files and models, and for hosts that it fetches data from.
    """
    yield from libraries()
    yield from accelerator()
    yield disk(Path.cwd())
    if recipe is not None:
        yield from in_the_way(recipe)
        yield from network(recipe)


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
        yield Finding("note", f"no CUDA device, {machine.cores()} CPU cores for this process", advice)
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        what = f"GPU {index}: {found.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        if free < 0.5 * total:
            yield Finding("note", what, "another process holds much of it; `nvidia-smi` names it")
        elif found.major < 8:
            yield Finding(
                "note", what, "it has no bfloat16; use finetune.precision=fp32, and float32 elsewhere"
            )
        else:
            yield Finding("ok", what)


def network(recipe: Recipe) -> Iterator[Finding]:
    """Where absent data would be fetched from, and whether a host's name can be resolved; takes seconds at
    most, for nothing is fetched."""
    files, hosts = to_fetch(recipe)
    if not files:
        return
    what = f"{' and '.join(files)} must be fetched from {' or '.join(hosts)}"
    if any(map(resolves, hosts)):
        yield Finding("note", f"{what}, whose name can be resolved", "the run fetches them")
    else:
        advice = f"check the network, or put them into {recipe.prepare_data.folder} yourself"
        yield Finding("problem", f"{what}, whose name cannot be resolved from here", advice)


def disk(folder: Path) -> Finding:
    """Free space where runs are written."""
    free = shutil.disk_usage(folder).free
    what = f"{free / 1e9:.0f} GB free on the disk of {folder.name or 'the root folder'}"
    if free < LEAST_DISK:
        return Finding("note", what, "an 8B model and its adapter take 20 GB; free some, or use another disk")
    return Finding("ok", what)
