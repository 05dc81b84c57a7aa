"""Folders of models and of data, and models of the Hub: what tells one from another. Imports no torch.

Large files are sampled, so that weights of any size take a second: training changes nearly all numbers of
what it trains. What was changed between samples alone is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHOLE = 1 << 22
"""Files up to so many bytes are read whole."""

SAMPLES, SAMPLE = 64, 1 << 16
"""How many blocks of larger ones are read, spread evenly from the first byte to the last, and their size."""

TENSOR_SAMPLES, TENSOR_SAMPLE = 8, 1 << 12
"""The same of a tensor."""

ABOUT_SAVING = ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures")
"""Entries of config.json that say how a model was saved, not what it computes."""

BESIDE_WEIGHTS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("*preprocessor_config.json", "processor_config.json", "open_clip_config.json", "adapter_config.json"),
)
"""Files of a model, other than config and weights, that change what comes of a text or a picture."""


def revision_of(model: str, asked: str | None) -> str | None:
    """The commit that a model was loaded from, by the Hub's cache after it was; of a local folder what was
    asked for.

    Args:
        model: Hub id or local folder.
        asked: commit, branch or tag; None: the main branch.
    """
    if Path(model).is_dir():
        return asked
    from huggingface_hub import try_to_load_from_cache

    # By its path, since transformers no longer notes the commit in what it loads.
    found = try_to_load_from_cache(model, "config.json", revision=asked)
    return commit_of(Path(found)) if isinstance(found, str) else asked


def commit_of(file: Path) -> str | None:
    """The commit that a file in the Hub's cache belongs to; None for a local folder."""
    found = re.findall(r"models--[^/]+/snapshots/([^/]+)/", file.as_posix())
    return found[-1] if found else None


def folder_digest(folder: Path) -> str:
    """Hash of all files of a folder, by name; hidden ones aside."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            add_file(digest, inside.as_posix(), file)
    return digest.hexdigest()


def model_digest(folder: Path) -> str:
    """Hash of what a model in a folder computes from texts or pictures: config, weights, tokenizer, sizes of
    pictures; not of papers that lie beside them."""
    digest = hashlib.sha256(weights_digest(folder).encode())
    files = {file for pattern in BESIDE_WEIGHTS for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files):
        add_file(digest, file.name, file)
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """Hash of config and weights, the same for a copy that is cut into files otherwise."""
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        try:
            known = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
        kept = {name: value for name, value in known.items() if name not in ABOUT_SAVING}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    tensors: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= tensors_of(file)
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name])
    for file in sorted(folder.glob("*.bin")):
        add_file(digest, file.name, file)
    return digest.hexdigest()


def tensors_of(file: Path) -> dict[str, bytes]:
    """Hash of the form and samples of every tensor of a safetensors file; of the file, if it is none."""
    found = {}
    with file.open("rb") as handle:
        try:
            (length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(length if length <= 1 << 27 else 0))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            for name, entry in entries:
                start, stop = entry["data_offsets"]
                digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
                for block in samples(handle, 8 + length + start, stop - start, TENSOR_SAMPLES, TENSOR_SAMPLE):
                    digest.update(block)
                found[name] = digest.digest()
        except (ValueError, KeyError, TypeError, struct.error):
            digest = hashlib.sha256()
            add_file(digest, file.name, file)
            return {file.name: digest.digest()}
    return found


def add_file(digest: Any, name: str, file: Path) -> None:
    """Take in a file: name, size, all of a small one, samples of a large one."""
    size = file.stat().st_size
    digest.update(f"{name}\0{size}\0".encode())
    with file.open("rb") as handle:
        if size <= WHOLE:
            digest.update(handle.read())
        else:
            for block in samples(handle, 0, size, SAMPLES, SAMPLE):
                digest.update(block)


def samples(handle: Any, start: int, size: int, number: int, width: int) -> Iterator[bytes]:
    """Blocks of a stretch of a file, spread evenly from its first byte to its last; all of a short one."""
    if size <= number * width:
        handle.seek(start)
        yield handle.read(size)
        return
    for place in range(number):
        handle.seek(start + (size - width) * place // (number - 1))
        yield handle.read(width)
