"""How files are read and written: arrays as safetensors with the catalogue's hash, numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmrec.errors import ArtifactMismatchError, MissingArtifactError

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""There is no file of a name. Other errors of the system, such as those of permissions or of a disk that is
away for a moment, say nothing of what the file holds."""


def save_arrays(path: Path, catalog: str, /, **arrays: np.ndarray) -> None:
    """Write arrays, which may have any names, to a safetensors file with the catalogue hash in its header."""
    save_file(
        # `np.ascontiguousarray` would make vectors of numbers.
        {name: np.asarray(array, order="C") for name, array in arrays.items()},
        path,
        metadata={"catalog": catalog},
    )


def load_arrays(path: Path, catalog: str) -> dict[str, np.ndarray]:
    """Read every array of a safetensors file made for this catalogue."""
    return load_tensors(path, "np", catalog)


def load_tensors(path: Path, framework: Literal["np", "pt"], catalog: str | None = None) -> dict[str, Any]:
    """Read every tensor of a safetensors file, as arrays or torch's.

    Raises:
        MissingArtifactError: it cannot be read.
        ArtifactMismatchError: it was made for another catalogue than is expected.
    """
    try:
        with safe_open(path, framework=framework) as handle:
            found = (handle.metadata() or {}).get("catalog")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise MissingArtifactError(f"{path} cannot be read ({error}); recompute its stage") from None
    if catalog is not None and found != catalog:
        raise ArtifactMismatchError(f"{path} belongs to catalogue {str(found)[:12]}, expected {catalog[:12]}")
    return tensors


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (*ABSENT, json.JSONDecodeError) as error:
        raise MissingArtifactError(f"{path} cannot be read ({error}); recompute its stage") from None


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
