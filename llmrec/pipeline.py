"""The pipeline: the stages in order, each remembered on disk.

A stage is a function ``(config, *artefacts) -> artefact``. `RunDir.stage` calls it unless the run
folder already holds its output for the same config and inputs. The output is written to a
temporary folder, its manifest last, then renamed, so a folder with the stage's name is complete.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec import __version__, distributed, global_state, launched, machine, tracking
from llmrec.artifacts import Report
from llmrec.config import StageSettings, without_incidental
from llmrec.contents import content_digests
from llmrec.errors import ConfigError
from llmrec.finished import check_lineage, load
from llmrec.manifest import MANIFEST, describe_files, flush, flush_all, write_manifest
from llmrec.recipe import Recipe
from llmrec.running import Running, Spent, running
from llmrec.stage_changes import check_folder, describe_stage, source_hashes
from llmrec.stages import COMMANDS, STAGES, Stage, in_order
from llmrec.storage import locked, open_like_folder, unfinished, writing

logger = logging.getLogger("llmrec")

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn", "safetensors")


def run(recipe: Recipe, run_dir: RunDir | str | Path, *, until: str | None = None) -> Report | None:
    """Run, in order, every stage that run_dir does not already hold.

    Args:
        recipe: settings of every stage.
        run_dir: where stages keep their output, a sub-folder each.
        until: name of the last stage to run; None runs all.

    Returns:
        The evaluation report, or None if `until` stopped the run before it.

    Raises:
        ConfigError: there is no stage named `until`; or the recipe is none.
        LlmrecError: a stage cannot be computed, or a later one could not with these data.
    """
    if not isinstance(recipe, Recipe):
        advice = "; call it for the one that it returns" if callable(recipe) else ""
        raise ConfigError(f"run takes a Recipe, got {recipe!r:.60}{advice}")
    if not isinstance(run_dir, RunDir):
        run_dir = RunDir(run_dir)
    made: dict[str, Any] = {}
    names = [stage.name for stage in in_order(recipe)]
    if until is not None:
        if until not in names:
            raise ConfigError(f"until must be one of {', '.join(names)}, got {until!r}")
        names = names[: names.index(until) + 1]
    for name in names:
        stage = STAGES[name]
        config = getattr(recipe, name)
        made[name] = run_dir.stage(stage, config, *(made[one] for one in stage.made_from(config)))
        if name == "prepare_data":
            from llmrec.data.items import with_pictures_found

            made[name] = with_pictures_found(config, made[name])
            # Settings that these data rule out are told before anything is trained.
            for later in names:
                getattr(recipe, later).check_data(made[name])
    return made.get("evaluate")


class RunDir:
    """A folder with one sub-folder per finished stage."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def stage(self, stage: Stage | Callable[..., Any], config: StageSettings, *inputs: Any) -> Any:
        """What the stage makes of the config and inputs, from disk if this run has already computed it."""
        name = stage.name if isinstance(stage, Stage) else stage.__name__
        return run_stage(stage, config, inputs, self.root / name)


def run_stage(
    stage: Stage | str | Callable[..., Any],
    config: StageSettings,
    inputs: tuple[Any, ...],
    folder: str | Path,
) -> Any:
    """Compute one stage into folder unless folder already holds it, and load the result.

    Under several processes, only the main one computes and writes, unless the function is marked
    `distributed.every_process`; all of them load. Of several threads one computes at a time. The caller's
    random numbers, of Python, NumPy and torch, go on afterwards as if none had been drawn.

    Args:
        stage: one of `stages.COMMANDS` or its name, whose libraries are imported only if there is something
            to compute; or a function, whose return type is the artefact.
        config: its settings.
        inputs: the artefacts it reads, in the order of `Stage.inputs`.
        folder: where its output lies.

    Raises:
        ConfigError: there is no stage of this name; or its settings or inputs are of another one, or an input
            is not what a finished stage wrote.
        StaleArtifactError: if the folder was made with another config or other inputs.
        BusyError: if another process is computing it.
        MissingArtifactError: if the folder holds something else, or is damaged.
        KeyboardInterrupt: says what is kept.
    """
    folder = Path(folder)
    if isinstance(stage, str):
        if stage not in COMMANDS:
            raise ConfigError(f"there is no stage {stage!r}, but {', '.join(COMMANDS)}")
        stage = COMMANDS[stage]
    if isinstance(stage, Stage):
        check_given(stage, config, inputs)
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


def check_given(stage: Stage, config: StageSettings, inputs: tuple[Any, ...]) -> None:
    """Refuse settings and inputs of another stage, by what they are."""
    if not isinstance(config, stage.config):
        raise ConfigError(f"{stage.name} takes a {stage.config.__name__}, got {type(config).__name__}")
    if not isinstance(inputs, tuple | list):
        raise ConfigError(
            f"{stage.name} reads a tuple of artefacts, got {type(inputs).__name__}; one alone is (artefact,)"
        )
    wanted = [COMMANDS[name].artifact_class() for name in (*stage.inputs, *stage.optional)]
    given = [type(one) for one in inputs]
    # Whether its settings ask for the optional ones the stage says better.
    if given not in (wanted, wanted[: len(stage.inputs)]):
        needed, got = (", ".join(kind.__name__ for kind in kinds) for kinds in (wanted, given))
        raise ConfigError(f"{stage.name} reads ({needed}), in this order, got ({got})")


def compute(
    function: Callable[..., Any],
    config: StageSettings,
    inputs: tuple[Any, ...],
    folder: Path,
    wanted: dict[str, Any],
) -> None:
    """Run the function and write its artefact: all of it or nothing.

    Raises:
        BusyError: another process is at it.
    """
    main = launched.is_main()
    if not main and not distributed.runs_everywhere(function):
        return
    left = unfinished(folder)
    lock = locked(folder) if main else contextlib.nullcontext()
    with lock, global_state.drawing_alone(), global_state.usual_torch():
        if main:
            clear_scratch(folder)
        if launched.world_size() == 1 and check_folder(folder, wanted, config) == "done":
            return  # another process finished it just now
        logger.info("%s: started", function.__name__)
        machine.reset_peak_memory()
        with running(left, wanted | {"config": without_incidental(wanted["config"], config)}) as run:
            result = call(function, config, inputs, folder)
            if not main:
                return
            seconds = store(result, config, folder, wanted, run)
        shutil.rmtree(left, ignore_errors=True)
    before = f", {run.earlier.seconds:.1f} s of them before a stop" if run.earlier.seconds else ""
    logger.info("%s: finished in %.1f s%s, %s", function.__name__, seconds, before, folder)


def call(function: Callable[..., Any], config: StageSettings, inputs: tuple[Any, ...], folder: Path) -> Any:
    """What the function makes; meanwhile trackers know which stage runs."""
    left = unfinished(folder)
    track = tracking.Track(stage=function.__name__, folder=folder, unfinished=left, config=config)
    with (
        writing(folder),
        tracking.tracking(track) if launched.is_main() else contextlib.nullcontext(),
    ):
        return function(config, *inputs)


def store(result: Any, config: StageSettings, folder: Path, wanted: dict[str, Any], run: Running) -> float:
    """Write an artefact beside its folder, its manifest last, and give it the folder's name once it is whole.

    Returns:
        Seconds that the stage has taken, as its manifest has them.
    """
    scratch = scratch_of(folder, os.getpid())
    try:
        with writing(folder):
            scratch.mkdir(parents=True)
            result.save(scratch)
            spent = run.spent()
            # Files that the stage has fetched belong to it too.
            sources = source_hashes(config, wanted["sources"])
            open_like_folder(scratch)
            seal(scratch, wanted | {"sources": sources}, spent)
            flush_all(scratch)
            os.replace(scratch, folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return spent.seconds


def scratch_of(folder: Path, process: int | str) -> Path:
    """Where a process writes what will be the folder."""
    return folder.with_name(f".{folder.name}.writing.{process}")


def clear_scratch(folder: Path) -> None:
    """Delete what processes left that were killed while they wrote; to be called with the lock held."""
    prefix = scratch_of(folder, "").name
    for path in folder.parent.iterdir():
        if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdecimal():
            shutil.rmtree(path, ignore_errors=True)


def seal(folder: Path, wanted: dict[str, Any], spent: Spent) -> None:
    """Write the list of files with their hashes, and what made them; the last file of a stage."""
    versions = {"llmrec": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    content = {
        **wanted,
        "files": describe_files(folder),
        "contents": dict(content_digests(folder)),
        "versions": versions,
        "seconds": round(spent.seconds, 3),
        "peak_memory_bytes": spent.peak_memory_bytes,
        "peak_gpu_memory_bytes": spent.peak_gpu_memory_bytes,
        "processes": launched.world_size(),
    }
    write_manifest(folder / MANIFEST, content)
