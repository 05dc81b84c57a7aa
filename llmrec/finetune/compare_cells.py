"""The cells of a comparison of methods: one row with one seed each, fine-tuned and ranked.

A cell is a pair of stage folders, skipped once it is there. Processes that are given the same cells share
them: each takes those that no other one is at.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrec import jobs as side_by_side
from llmrec.config import as_dict, from_dict
from llmrec.errors import (
    BusyError,
    ConfigError,
    LlmrecError,
    MissingArtifactError,
    StoppedError,
    TrainingError,
)
from llmrec.files import read_json, write_json
from llmrec.finetune.config import FREQUENCY_FIELDS, METHOD_FIELDS, FinetuneConfig
from llmrec.recipe import Recipe, refit_stage, refuse_what_cannot_finish, statuses

logger = logging.getLogger("llmrec")

WAIT_SECONDS = 2.0
"""Between looks at what other processes have finished."""

REQUEST = "cells.json"
IMPOSSIBLE = "cannot be run with these settings"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row of the table changes."""

    finetune: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=dict)
    """Settings of learn_semantic_ids; such rows share semantic IDs of their own"""
    meaning: str = ""


MMD = {"reconstruction": "mmd", "codebook_update": "gradient"}
MSE = {"reconstruction": "mse", "codebook_update": "gradient"}

ROWS: dict[str, Row] = {
    "mme_sid": Row(meaning="MME-SID"),
    "e4srec": Row(finetune={"method": "e4srec"}, meaning="E4SRec"),
    "me": Row(finetune={"method": "me"}, meaning="ME, concatenated"),
    "me_sum": Row(finetune={"method": "me", "me_mode": "sum"}, meaning="ME, added"),
    "concat": Row(finetune={"method": "concat"}, meaning="Concat, a token per modality"),
    "concat_feature": Row(
        finetune={"method": "concat", "concat_mode": "feature"}, meaning="Concat, one shared token"
    ),
    "concat_mlp": Row(finetune={"method": "concat_mlp"}, meaning="Concat&MLP"),
    "ctrl_mm": Row(finetune={"method": "ctrl_mm"}, meaning="CTRL-MM, joint"),
    "ctrl_mm_two": Row(finetune={"method": "ctrl_mm", "ctrl_stage": "two"}, meaning="CTRL-MM, two stages"),
    "se_sid": Row(finetune={"method": "se_sid"}, meaning="SE-SID, the recipe's semantic IDs"),
    "se_sid_mmd": Row(finetune={"method": "se_sid"}, ids=MMD, meaning="SE-SID-MMD"),
    "se_sid_mse": Row(finetune={"method": "se_sid"}, ids=MSE, meaning="SE-SID-MSE"),
    "mme_sid_random": Row(finetune={"random_codes": True}, meaning="MME-SID-random"),
    "se_random": Row(finetune={"method": "se_random"}, meaning="SE-random"),
    "mme_random": Row(finetune={"method": "mme_random"}, meaning="MME-random"),
    "no_fusion": Row(finetune={"fusion": "equal"}, meaning="MME-SID without fusion"),
}
"""Rows by name; the first is what the others are held to."""


def prepare(recipe: Recipe, root: Path, refit: Path | None = None) -> Recipe:
    """Run the stages that all cells share; the recipe they were run with.

    Args:
        recipe: settings.
        root: where these stages lie.
        refit: run directory of a comparison whose cells chose their epochs; see `llmrec.recipe.refit`.
    """
    from llmrec.pipeline import RunDir, run

    if refit is not None:
        collab = refit_stage("train_collab", recipe.train_collab, refit / "train_collab")
        recipe = replace(recipe, train_collab=collab)
    # Fine-tuning itself differs from row to row, and a row that cannot be run leaves the others be.
    refuse_what_cannot_finish(recipe, statuses(recipe, root, "learn_semantic_ids"))
    run(recipe, RunDir(root), until="learn_semantic_ids")
    return recipe


def run_cells(
    recipe: Recipe, rows: list[str], seeds: list[int], root: Path, out: Path, refit: Path | None = None
) -> None:
    """Fine-tune and rank what is not finished, seed by seed, so that all rows have results early.

    What another process is at is left to it and looked at again at the end.

    Args:
        recipe: settings, as `prepare` gave them.
        rows: names in `ROWS`.
        seeds: of fine-tuning.
        root: the stages before.
        out: where cells go.
        refit: see `prepare`.
    """
    from llmrec import machine
    from llmrec.finished import load
    from llmrec.stages import STAGES

    inputs = tuple(load(STAGES[name].artifact_class(), root / name) for name in STAGES["finetune"].inputs)
    waiting = deque((name, seed) for seed in seeds for name in rows)
    impossible: set[str] = set()
    busy: set[tuple[str, int]] = set()
    while waiting:
        name, seed = cell = waiting.popleft()
        if name in impossible:
            continue
        try:
            run_cell(recipe, ROWS[name], seed, inputs, out, out / name / f"seed{seed}", refit)
        except BusyError:
            waiting.append(cell)
            busy.add(cell)
            if busy.issuperset(waiting):
                time.sleep(WAIT_SECONDS)
        except (ConfigError, MissingArtifactError, TrainingError) as error:
            # It stays missing in the table; the other rows are worth having.
            logger.warning("%s %s: %s", name, IMPOSSIBLE, error)
            impossible.add(name)
        if name in impossible:
            machine.make_room()


def run_cell(
    recipe: Recipe,
    row: Row,
    seed: int,
    inputs: tuple[Any, ...],
    out: Path,
    folder: Path,
    refit: Path | None,
) -> None:
    """One cell, in its folder.

    Raises:
        BusyError: another process is at it, or at its semantic IDs.
    """
    from llmrec.pipeline import run_stage
    from llmrec.stages import STAGES

    if row.ids:
        ids_config = replace(recipe.learn_semantic_ids, **row.ids)
        ids_folder = out / "learn_semantic_ids" / "_".join(row.ids.values())
        ids = run_stage(STAGES["learn_semantic_ids"], ids_config, inputs[:3], ids_folder)
        inputs = (*inputs[:3], ids)
    config = replace(settings_of(recipe.finetune, row), seed=seed)
    if refit is not None:
        before = refit / "methods" / folder.parent.name / folder.name / "finetune"
        config = refit_stage("finetune", config, before)
    adapter = run_stage(STAGES["finetune"], config, inputs, folder / "finetune")
    run_stage(STAGES["evaluate"], recipe.evaluate, (*inputs, adapter), folder / "evaluate")


def run_side_by_side(
    recipe: Recipe,
    rows: list[str],
    seeds: list[int],
    root: Path,
    out: Path,
    refit: Path | None,
    jobs: int,
) -> list[str]:
    """`run_cells` by several processes, each with its share of the machine; what they say goes to files.

    Returns:
        A line for each of them that failed; the others went on with its cells.

    Raises:
        StoppedError: this process was asked to stop, and has stopped them.
    """
    from llmrec.checkpoint import stop_requests
    from llmrec.progress import progress

    cells = [(name, seed) for seed in seeds for name in rows]
    out.mkdir(parents=True, exist_ok=True)
    request: dict[str, Any] = {"recipe": as_dict(recipe), "rows": rows, "seeds": seeds}
    request |= {"root": str(root), "out": str(out), "refit": None if refit is None else str(refit)}
    write_json(out / REQUEST, request)
    seen = {cell for cell in cells if finished(out, *cell)}
    logger.info("compare: %d cells, %d to run, %d at a time", len(cells), len(cells) - len(seen), jobs)
    command = [sys.executable, "-m", "llmrec.finetune.compare_cells", str(out / REQUEST)]
    logs = [out / f"job{job}.log" for job in range(jobs)]
    processes = []
    try:
        for job, log in enumerate(logs):
            with log.open("w") as file:
                environment = os.environ | side_by_side.share(job, jobs)
                process = subprocess.Popen(  # noqa: S603 (our own module, with a path)
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            processes.append(process)
        with (
            stop_requests() as stop,
            progress(None, "compare", total=len(cells), unit="cell", initial=len(seen)) as bar,
        ):
            running = True
            while running and not stop.asked:
                running = any(process.poll() is None for process in processes)
                for cell in [cell for cell in cells if cell not in seen and finished(out, *cell)]:
                    seen.add(cell)
                    bar.update()
                    logger.info("compare: %s; %d of %d done", outcome(out, *cell), len(seen), len(cells))
                if running:
                    time.sleep(WAIT_SECONDS)
    finally:
        # They keep their work when asked to stop, as this process does.
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    if stop.asked:
        raise StoppedError(
            f"stopped with {len(seen)} of {len(cells)} cells done; the same command goes on from there"
        )
    said = [log.read_text(errors="replace").strip().splitlines() or ["nothing said"] for log in logs]
    # Lines begin with the time of day.
    for line in sorted({line.partition(" ")[2] for lines in said for line in lines if IMPOSSIBLE in line}):
        logger.warning("%s", line)
    return [
        f"{log}: {lines[-1][-300:]}"
        for process, log, lines in zip(processes, logs, said)
        if process.returncode
    ]


def finished(out: Path, name: str, seed: int) -> bool:
    """Whether a cell is done."""
    return (out / name / f"seed{seed}" / "evaluate").is_dir()


def outcome(out: Path, name: str, seed: int) -> str:
    """One phrase about a finished cell."""
    found = read_json(out / name / f"seed{seed}" / "evaluate" / "metrics.json")["rows"]["mme_sid"]
    return f"{name}, seed {seed}: recall@10 {found['recall@10']:.4f}, ndcg@10 {found['ndcg@10']:.4f}"


def settings_of(base: FinetuneConfig, row: Row) -> FinetuneConfig:
    """A recipe's settings for one row, without those that its method does not have."""
    defaults = {name: spec.default for name, spec in FinetuneConfig.__dataclass_fields__.items()}
    method = row.finetune.get("method", base.method)
    changes: dict[str, Any] = {
        name: defaults[name] for name, methods in METHOD_FIELDS.items() if method not in methods
    }
    if method != base.method:
        changes["fusion"] = defaults["fusion"]
    changes |= row.finetune
    changes["method"] = method
    probe = FinetuneConfig(method=method, fusion=changes.get("fusion", base.fusion))
    if probe.fusion_used != "frequency":
        changes |= {name: defaults[name] for name in FREQUENCY_FIELDS}
    return replace(base, **changes)


def main(arguments: list[str]) -> None:
    """The share of one process; started by `run_side_by_side`."""
    from llmrec.console import set_up_logging

    set_up_logging()
    request = read_json(Path(arguments[0]))
    refit = request["refit"]
    run_cells(
        from_dict(Recipe, request["recipe"]),
        request["rows"],
        request["seeds"],
        Path(request["root"]),
        Path(request["out"]),
        None if refit is None else Path(refit),
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LlmrecError as error:
        raise SystemExit(f"error: {error}") from None
