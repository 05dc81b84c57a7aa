"""Models in local folders: what tells one from another. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

WHOLE = 1 << 22
"""Files up to so many bytes are read whole."""

SAMPLES, SAMPLE = 64, 1 << 16
"""How many blocks of larger ones are read, spread evenly from the first byte to the last, and their size."""

NOT_READ = (".md", ".png", ".jpg", ".gitattributes", ".lock")


def folder_digest(folder: Path) -> str:
    """Hash of what a model's folder holds: names and sizes of its files, all of small ones (settings,
    tokenizers) and samples of large ones, 4 MB each, so that weights of any size take well under a second.

    Training changes nearly all numbers of what it trains; that a file was changed between samples alone is
    not noticed.
    """
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not file.is_file() or hidden or file.suffix.lower() in NOT_READ:
            continue
        found.update(f"{inside.as_posix()}\0{file.stat().st_size}\0".encode())
        for block in blocks(file):
            found.update(block)
    return found.hexdigest()


def blocks(file: Path) -> Iterator[bytes]:
    """All of a small file, samples of a large one."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= WHOLE:
            yield handle.read()
            return
        for number in range(SAMPLES):
            handle.seek((size - SAMPLE) * number // (SAMPLES - 1))
            yield handle.read(SAMPLE)
