"""Finished stages, read: taken if the manifest and every hash agree, and refused by name otherwise."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmrec.errors import ArtifactMismatchError, ConfigError, MissingArtifactError
from llmrec.manifest import MANIFEST, DamagedError, check_files, read_manifest, reading
from llmrec.stages import COMMANDS

SCHEMA_VERSION = 5
"""Form of a stage's folder; others are refused."""


def stage_manifest(folder: Path, wanted: str = "") -> dict[str, Any]:
    """The manifest of a finished stage.

    Args:
        folder: its output.
        wanted: name of the stage that is looked for, if it is known.

    Raises:
        MissingArtifactError: if there is none, so that the folder is not a finished stage; or it is damaged.
        StaleArtifactError: if another version wrote it in another form.
    """
    if not (folder / MANIFEST).is_file():
        raise MissingArtifactError(
            f"{folder} is not the output of a finished stage{what_instead(folder, wanted)}"
        )
    with advising(folder):
        return read_manifest(folder / MANIFEST, SCHEMA_VERSION)


def what_instead(folder: Path, wanted: str) -> str:
    """What a folder that is not the output of a stage is, and what to give in its place."""
    stages = [name for name in COMMANDS if (folder / name / MANIFEST).is_file()]
    if wanted in stages:
        return f", but holds some. Give {folder / wanted}"
    if stages and wanted:
        return f", but holds {', '.join(stages)} without {wanted}. Finish that run, or give another one"
    if stages:
        return f", but holds some. Give one of {', '.join(str(folder / name) for name in stages)}"
    if folder.is_dir():
        return f" (no {MANIFEST}). Give the folder of a finished stage"
    return f" ({'a file' if folder.exists() else 'no such folder'}). Give the folder of a finished stage"


def require_run(folder: Path, stages: Iterable[str]) -> None:
    """Refuse a folder that is no run with these stages.

    Raises:
        MissingArtifactError: says what it is, and what to give or to do.
    """
    absent = [name for name in stages if not (folder / name / MANIFEST).is_file()]
    if not absent:
        return
    there = [name for name in COMMANDS if (folder / name / MANIFEST).is_file()]
    if there:
        raise MissingArtifactError(
            f"{folder} has no finished {', '.join(absent)}; run its recipe to the end first"
        )
    if (folder / "package.json").is_file():
        raise MissingArtifactError(f"{folder} is a package; give the run folder that it was made from")
    if (folder / MANIFEST).is_file():
        raise MissingArtifactError(
            f"{folder} is the output of a single stage; give the run folder, {folder.parent}"
        )
    what = "holds no finished stages" if folder.is_dir() else "is no folder"
    raise MissingArtifactError(f"{folder} {what}; give a recipe's run folder, such as runs/mme_sid_sample")


@contextlib.contextmanager
def advising(folder: Path) -> Iterator[None]:
    """Say of damaged files what to do about them."""
    try:
        yield
    except DamagedError as error:
        raise MissingArtifactError(f"{error}; delete {folder} to recompute it") from None


def checked_file(folder: Path, name: str) -> Path:
    """One file of a finished stage, after checking it against the manifest.

    Raises:
        MissingArtifactError: if the folder is not a finished stage, or the file was changed.
    """
    files = stage_manifest(folder)["files"]
    with advising(folder), reading(folder):
        check_files(folder, {"files": {name: files[name]}})
    return folder / name


def load(artifact: Any, folder: str | Path) -> Any:
    """Load a stage's artefact after checking every file against the manifest.

    Raises:
        MissingArtifactError: if the folder is not a finished stage, or a file was changed.
        StaleArtifactError: if another version wrote it in another form.
    """
    folder = Path(folder)
    manifest = stage_manifest(folder, artifact.stage)
    if manifest["stage"] != artifact.stage:
        raise MissingArtifactError(
            f"{folder} holds the output of {manifest['stage']}, expected {artifact.stage}"
        )
    with advising(folder):
        check_files(folder, manifest)
        with reading(folder):
            loaded = artifact.load(folder)
    object.__setattr__(loaded, "_manifest", manifest)
    return loaded


def manifest_of(artifact: Any) -> dict[str, Any]:
    """The manifest of a loaded artefact: stage, config, inputs, files, versions, seconds.

    Raises:
        ConfigError: it does not come from a finished stage.
    """
    if not hasattr(artifact, "_manifest"):
        kind = type(artifact).__name__
        raise ConfigError(
            f"this {kind} was made or changed in Python, or read by {kind}.load, which does not tell what it "
            "is made from; give what run_stage returned, or what Run(FOLDER) holds. Vectors of your own are "
            "read from a file (train_collab.provider=precomputed, encode_items.text.encoder=precomputed)"
        )
    return artifact._manifest


def fingerprint(artifact: Any) -> str:
    """Hash of the files that an artefact was loaded from. Equal runs have equal hashes, so a stage that is
    computed again with the same result leaves the stages made from it valid."""
    return fingerprint_of(manifest_of(artifact))


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """`fingerprint`, from an artefact's manifest."""
    contents = manifest.get("contents", {})
    hashes = {name: contents.get(name, entry["sha256"]) for name, entry in manifest["files"].items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def peak_memory_of(manifest: dict[str, Any]) -> int:
    """Most bytes that a stage took where memory is dear: on the GPU if it had one."""
    return manifest.get("peak_gpu_memory_bytes") or manifest["peak_memory_bytes"]


def check_lineage(inputs: tuple[Any, ...]) -> None:
    """Refuse inputs that do not belong together: one was made from a stage of which another output is given.
    Else a model that was trained on other data, or another split, might be measured on its own training data.

    Raises:
        ArtifactMismatchError: names both.
    """
    stored = [artifact for artifact in inputs if hasattr(artifact, "_manifest")]
    given = {artifact.stage: fingerprint(artifact) for artifact in stored}
    for artifact in stored:
        for name, made_with in manifest_of(artifact).get("inputs", {}).items():
            if given.get(name, made_with) != made_with:
                raise ArtifactMismatchError(
                    f"{artifact.stage} was made from another {name} than the one that is given; give the one "
                    f"it was made from, or recompute {artifact.stage}"
                )
