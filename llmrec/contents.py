"""What equal runs have in common: the content of a stage's files, but for what measures the machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmrec.files import read_json
from llmrec.manifest import MANIFEST

MEASURED = (
    *("seconds", "train_seconds", "tokens_per_second", "targets_per_second"),
    *("share_of_peak", "memory_bytes"),
)
"""Fields of JSON files that measure the machine; all else is equal for equal runs on a CPU."""

WITH_MEASURED = {".json", ".jsonl", ".html"}
"""Kinds of files that may hold what measures the machine."""


def content_of(folder: Path) -> dict[str, Any]:
    """The files of a finished stage by name, so that those of equal runs are equal: JSON as values, pages as
    text, others as bytes. Left out are the manifest and what measures the machine: fields in `MEASURED`, and
    what pages mark as measured."""
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return {
        name: measured_left_out(path) if path.suffix in WITH_MEASURED else path.read_bytes()
        for name, path in files.items()
        if name != MANIFEST
    }


def measured_left_out(path: Path) -> Any:
    """The content of a file of `WITH_MEASURED`, without what measures the machine."""
    if path.suffix == ".jsonl":
        return [without_measured(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return without_measured(read_json(path))
    return re.sub(r'<span class="measured">.*?</span>', "", path.read_text(encoding="utf-8"))


def content_digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and hashes of the files whose bytes differ between equal runs, of what does not differ."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in WITH_MEASURED:
            text = json.dumps(measured_left_out(path), sort_keys=True)
            yield path.relative_to(folder).as_posix(), hashlib.sha256(text.encode()).hexdigest()


def without_measured(value: Any) -> Any:
    """A JSON value without the fields in `MEASURED`."""
    if isinstance(value, dict):
        return {key: without_measured(inner) for key, inner in value.items() if key not in MEASURED}
    return [without_measured(inner) for inner in value] if isinstance(value, list) else value
