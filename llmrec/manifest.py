"""Manifests: what a folder holds, file by file, with sizes and hashes; written last, and sealed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmrec.errors import LlmrecError, MissingArtifactError, StaleArtifactError
from llmrec.files import ABSENT, write_json

MANIFEST = "manifest.json"
"""Its name in the folder of a stage."""

UNREADABLE = (
    *(
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
    ),
    *(ValueError, SafetensorError),
)
"""What parsers and our own checks raise on content that nobody should write."""


def unreadable() -> tuple[type[Exception], ...]:
    """`UNREADABLE`, and what transformers' configs raise, whose library takes time to import."""
    from huggingface_hub.errors import StrictDataclassError

    return (*UNREADABLE, StrictDataclassError)


class DamagedError(MissingArtifactError):
    """A file is not what its manifest says."""


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest with a hash of itself.

    Args:
        path: the file.
        content: at least "schema" (int), "versions" (with "llmrec") and "files" (see `describe_files`).
    """
    write_json(path, {**content, "digest": digest_of(content)})


def read_manifest(path: Path, schema: int) -> dict[str, Any]:
    """A manifest that is whole and that this version understands.

    Raises:
        DamagedError: it is absent, damaged, or was edited.
        StaleArtifactError: another version wrote it in another form.
    """
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        found, digest = manifest["schema"], manifest.get("digest")
    except (*ABSENT, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if isinstance(found, int) and found != schema:
        versions = manifest.get("versions")
        version = versions.get("llmrec") if isinstance(versions, dict) else None
        raise StaleArtifactError(
            f"{path.parent} was written in form {found} by llmrec {version}, and this version reads form "
            f"{schema}; make it again, or use the version that made it"
        )
    # Compared as text, so that no byte of it can change unnoticed.
    if digest != digest_of(manifest) or text != json.dumps(manifest, indent=2) + "\n":
        raise DamagedError(f"{path} is damaged or was edited")
    return manifest


def digest_of(content: dict[str, Any]) -> str:
    """Hash of a manifest without its own "digest"."""
    plain = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def describe_files(folder: Path, skip: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a folder, by path inside it, but for the file names in `skip`."""
    left_out = set(skip)
    return {
        path.relative_to(folder).as_posix(): describe(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file of a folder with a manifest.

    Raises:
        DamagedError: names the first that is missing, different, or outside of the folder.
    """
    for name, expected in manifest["files"].items():
        path = folder / name
        inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        if not inside or not path.is_file() or describe(path) != expected:
            raise DamagedError(f"{path} is missing or damaged")


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Refuse a folder that cannot be read although its hashes are right: llmrec writes no such files.

    Raises:
        DamagedError: something in the folder is not what we write.
    """
    try:
        yield
    except LlmrecError:
        raise
    except unreadable() as error:
        if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # torch's; nothing is damaged
            raise
        raise DamagedError(
            f"{folder} holds what llmrec does not write ({type(error).__name__}: {str(error) or 'no reason'})"
        ) from error


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_all(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on disk."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk. Some disks that are shared over a network
    cannot do this for folders (EINVAL); that is no reason to lose the finished work."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)
