"""The pipeline: the stages in order, each remembered on disk.

A stage is a function ``(config, *artefacts) -> artefact``. `RunDir.stage` calls it unless the run
folder already holds its output for the same config and inputs. The output is written to a
temporary folder, its manifest last, then renamed, so a folder with the stage's name is complete.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmrec import __version__, distributed, machine
from llmrec.artifacts import Report
from llmrec.config import as_dict, changed_settings, without_incidental
from llmrec.contents import content_digests
from llmrec.errors import (
    ArtifactMismatchError,
    BusyError,
    MissingArtifactError,
    StaleArtifactError,
    StorageError,
)
from llmrec.manifest import (
    MANIFEST,
    DamagedError,
    check_files,
    describe_files,
    flush,
    flush_all,
    read_manifest,
    reading,
    sha256,
    write_manifest,
)
from llmrec.stages import COMMANDS, STAGES, Stage, in_order

logger = logging.getLogger("llmrec")

SCHEMA_VERSION = 4
LOCK = "lock"
UNWRITABLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room, or use another folder"),
    errno.EFBIG: "Use a folder on a disk that takes larger files",
    errno.EROFS: "Use a folder on a disk that may be written",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "Use a folder that you may write, or change its permissions"
    ),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "Something else is in the way there; use another folder"),
    errno.ENAMETOOLONG: "Use a shorter name",
}
"""What to do, by the number of a system's error that says that a folder cannot be written."""

NO_FOLDER = {**UNWRITABLE, errno.ENOENT: "No folder can be made there; use another"}
"""The same, where a folder is made: what is absent there is not a file that was to be read."""

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn", "safetensors")


def run(recipe: Any, run_dir: RunDir, *, until: str | None = None) -> Report | None:
    """Run, in order, every stage that run_dir does not already hold.

    Args:
        recipe: a `llmrec.recipe.Recipe`.
        run_dir: where stages keep their output.
        until: name of the last stage to run; None runs all.

    Returns:
        The evaluation report, or None if `until` stopped the run before it.

    Raises:
        LlmrecError: a stage cannot be computed, or a later one could not with these data.
    """
    made: dict[str, Any] = {}
    names = [stage.name for stage in in_order(recipe)]
    if until is not None:
        names = names[: names.index(until) + 1]
    for name in names:
        stage = STAGES[name]
        config = getattr(recipe, name)
        made[name] = run_dir.stage(stage, config, *(made[one] for one in stage.made_from(config)))
        if name == "prepare_data":
            # Settings that the number of items rules out are told before anything is trained.
            for later in names:
                check: Callable[[int], None] | None = getattr(getattr(recipe, later), "check_items", None)
                if check is not None:
                    check(made[name].num_items)
    return made.get("evaluate")


class RunDir:
    """A folder with one sub-folder per finished stage."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, stage: Stage | Callable[..., Any], config: Any, *inputs: Any) -> Any:
        """What the stage makes of the config and inputs, from disk if this run has already computed it."""
        name = stage.name if isinstance(stage, Stage) else stage.__name__
        return run_stage(stage, config, inputs, self.root / name)


def run_stage(stage: Stage | Callable[..., Any], config: Any, inputs: tuple[Any, ...], folder: Path) -> Any:
    """Compute one stage into folder unless folder already holds it, and load the result.

    Under several processes, only the main one computes and writes, unless the function is marked
    `distributed.every_process`; all of them load.

    Args:
        stage: one of `stages.COMMANDS`, whose libraries are imported only if there is something to compute;
            or a function, whose return type is the artefact.
        config: its settings.
        inputs: the artefacts it reads.
        folder: where its output lies.

    Raises:
        StaleArtifactError: if the folder was made with another config or other inputs.
        BusyError: if another process is computing it.
        MissingArtifactError: if the folder holds something else, or is damaged.
        KeyboardInterrupt: says what is kept.
    """
    if isinstance(stage, Stage):
        name, artifact = stage.name, stage.artifact_class()
    else:
        name, artifact = stage.__name__, typing.get_type_hints(stage)["return"]
    try:
        check_lineage(inputs)
        wanted = describe_stage(name, config, inputs)
        status = check_folder(folder, wanted, config)
        distributed.wait()
        if status == "done":
            logger.info("%s: already done, %s", name, folder)
        else:
            compute(stage.function() if isinstance(stage, Stage) else stage, config, inputs, folder, wanted)
        distributed.wait()
        return load(artifact, folder)
    except KeyboardInterrupt as error:
        error.args = ("finished stages are kept; the same command goes on from there",)
        raise


def check_lineage(inputs: tuple[Any, ...]) -> None:
    """Refuse inputs of which one was made from another one than is given: a model trained on other data or
    another split would be measured on what it was trained on.

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


def compute(
    function: Callable[..., Any],
    config: Any,
    inputs: tuple[Any, ...],
    folder: Path,
    wanted: dict[str, Any],
) -> None:
    """Run the function and write its artefact: all of it or nothing.

    Raises:
        BusyError: another process is at it.
    """
    main = distributed.is_main()
    if not main and not distributed.runs_everywhere(function):
        return
    logger.info("%s: started", function.__name__)
    machine.reset_peak_memory()
    started = time.perf_counter()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with locked(unfinished) if main else contextlib.nullcontext():
        if folder.exists() and distributed.world_size() == 1:
            return  # another process finished it just now
        fixed = wanted | {"config": without_incidental(wanted["config"], config)}
        token = _unfinished.set((unfinished, fixed))
        try:
            with writing(folder):
                result = function(config, *inputs)
        finally:
            _unfinished.reset(token)
        if not main:
            return
        scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            with writing(folder):
                scratch.mkdir(parents=True)
                result.save(scratch)
                seconds = time.perf_counter() - started
                seal(scratch, wanted, seconds)
                flush_all(scratch)
                os.replace(scratch, folder)
                flush(folder.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("%s: finished in %.1f s, %s", function.__name__, seconds, folder)


@contextlib.contextmanager
def writing(folder: Path, advice: Mapping[int, str] = UNWRITABLE) -> Iterator[None]:
    """Say plainly that a folder could not be written.

    Args:
        folder: the one that was asked for.
        advice: what to do by the number of the system's error; other errors are raised as they are.

    Raises:
        StorageError: the disk is full, or may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors hands the number of the system's error on as text.
        number = getattr(error, "errno", None) or next(map(int, re.findall(r"os error (\d+)", str(error))), 0)
        if number not in advice:
            raise
        raise StorageError(
            f"{folder} cannot be written ({error}); nothing of it is kept. {advice[number]}, and start "
            "again: finished stages are kept"
        ) from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from computing the same stage; the lock goes with this process, however it ends.

    Raises:
        BusyError: another process holds it.
        StorageError: the folder may not be written.
    """
    stage = folder.name.removeprefix(".").removesuffix(".unfinished")
    with writing(folder.with_name(stage), NO_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process is computing {stage} in {folder.parent}; wait for it, or use another"
            ) from None
        yield
    finally:
        os.close(handle)
        if [path.name for path in folder.glob("*")] == [LOCK]:
            shutil.rmtree(folder, ignore_errors=True)


def resume_folder() -> Path | None:
    """Where the stage that is running may leave work for the run after a stop; None outside of a stage.

    It is deleted once the stage is done. What lies in it must say what it was made from.
    """
    found = _unfinished.get()
    return None if found is None else found[0]


def made_from() -> dict[str, Any] | None:
    """What the stage that is running is made from (see `describe_stage`), without settings that change no
    result; None outside of a stage."""
    found = _unfinished.get()
    return None if found is None else found[1]


_unfinished: contextvars.ContextVar[tuple[Path, dict[str, Any]] | None] = contextvars.ContextVar(
    "unfinished", default=None
)


def describe_stage(name: str, config: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """What makes a stage's output what it is: name, config and the files it was made from."""
    return {
        "schema": SCHEMA_VERSION,
        "stage": name,
        "config": as_dict(config),
        "sources": source_hashes(config),
        "inputs": {artifact.stage: fingerprint(artifact) for artifact in inputs},
    }


def source_hashes(config: Any) -> dict[str, str]:
    """Hashes of the users' own files that a config names in ``source_files``, by setting.

    Files that are gone are left out: what was made from them may still be used.
    """
    files: dict[str, str] = getattr(config, "source_files", dict)()
    return {name: sha256(Path(path)) for name, path in files.items() if Path(path).is_file()}


def changed_sources(manifest: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """Phrases naming the users' files whose content is no longer what a stage was made from."""
    before = manifest.get("sources") or {}
    return [
        f"other content of the {name} file"
        for name, digest in sources.items()
        if before.get(name, digest) != digest
    ]


def check_folder(folder: Path, wanted: dict[str, Any], config: Any) -> str:
    """'done' or 'absent'; raises if the folder holds anything else.

    Settings that change no result may be others than the folder was made with.
    """
    if not folder.exists():
        return "absent"
    if not (folder / MANIFEST).is_file():
        raise MissingArtifactError(
            f"{folder} is not the output of a finished stage, and what is there is never overwritten. Use "
            "another folder, or move it away"
        )
    manifest = stage_manifest(folder)
    changes = changed_sources(manifest, wanted["sources"])
    if manifest["stage"] != wanted["stage"]:
        changes.append(f"stage={manifest['stage']} (now {wanted['stage']})")
    changes += changed_settings(manifest["config"], config)
    old, new = manifest["inputs"], wanted["inputs"]
    changes += [f"another {name}" for name in new if old.get(name) != new[name]]
    changes += [f"{name}, which is not given now" for name in old if name not in new]
    if not changes:
        return "done"
    raise StaleArtifactError(
        f"{folder} was made with {', '.join(changes)}. Use another folder, or delete {folder} to recompute it"
    )


def seal(folder: Path, wanted: dict[str, Any], seconds: float) -> None:
    """Write the list of files with their hashes, and what made them; the last file of a stage."""
    versions = {"llmrec": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    content = {
        **wanted,
        "files": describe_files(folder),
        "contents": dict(content_digests(folder)),
        "versions": versions,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": machine.peak_resident_memory(),
        "peak_gpu_memory_bytes": machine.peak_gpu_memory(),
        "processes": distributed.world_size(),
    }
    write_manifest(folder / MANIFEST, content)


def peak_memory_of(manifest: dict[str, Any]) -> int:
    """Most bytes that a stage took where memory is dear: on the GPU if it had one."""
    return manifest.get("peak_gpu_memory_bytes") or manifest["peak_memory_bytes"]


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


def load(artifact: Any, folder: Path) -> Any:
    """Load a stage's artefact after checking every file against the manifest.

    Raises:
        MissingArtifactError: if the folder is not a finished stage, or a file was changed.
        StaleArtifactError: if another version wrote it in another form.
    """
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
    """The manifest of a loaded artefact: stage, config, inputs, files, versions, seconds."""
    return artifact._manifest


def fingerprint(artifact: Any) -> str:
    """Hash of the files an artefact was loaded from, the same for equal runs: a stage that is computed again
    and comes out as before leaves what was made from it valid."""
    manifest = manifest_of(artifact)
    contents = manifest.get("contents", {})
    hashes = {name: contents.get(name, entry["sha256"]) for name, entry in manifest["files"].items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
