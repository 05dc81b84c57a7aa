"""The cells of a comparison of methods: one row with one seed each, fine-tuned and ranked.

A cell is a pair of stage folders, skipped once it is there. Processes that are given the same cells share
them: each takes those that no other one is at. `llmrec.jobs` runs several at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrec import arguments, jobs
from llmrec.collab.config import PROVIDER_FIELDS
from llmrec.config import as_dict, changed_settings, from_dict
from llmrec.errors import BusyError, ConfigError, MissingArtifactError, TrainingError
from llmrec.files import read_json, write_json
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.method_table import FREQUENCY_FIELDS, method_of, without_effect
from llmrec.recipe import Recipe, apply_overrides, refuse_what_cannot_finish
from llmrec.refit import refit_stage, refuse_refit_of_another
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.stage_changes import changed_sources, code_hashes, file_hashes, statuses

logger = logging.getLogger("llmrec")

WAIT_SECONDS = 2.0
"""Between looks at what other processes have finished."""

BESIDE = ("popularity", "best_possible")
"""What evaluations rank beside the models."""

SHARED = ("prepare_data", "train_collab", "encode_items")
"""Stages whose output all cells are made from; semantic IDs may be a row's own."""

REQUEST = "cell.json"
"""Its name in the folder of a cell that a process of its own runs."""

IMPOSSIBLE = (ConfigError, MissingArtifactError, TrainingError)
"""What says that a row cannot be run: it stays missing in the table, and the others are worth having."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row of the table sets, whatever the recipe has there; the rest is the recipe's."""

    finetune: dict[str, Any]
    meaning: str
    ids: dict[str, Any] = field(default_factory=dict)
    """Settings of learn_semantic_ids, for semantic IDs of the row's own"""
    typed: tuple[str, ...] = ()
    """Settings of finetune as a user typed them, in place of `finetune`"""


MME_SID = {"method": "mme_sid", "random_codes": False}
SE_SID = {"method": "se_sid", "random_codes": False}
COLLAB_ALONE = {"modalities": ("collab",), "alignment": "none", "codebook_update": "gradient"}

ROWS: dict[str, Row] = {
    "mme_sid": Row(finetune=MME_SID, meaning="MME-SID"),
    "e4srec": Row(finetune={"method": "e4srec"}, meaning="E4SRec"),
    "me": Row(finetune={"method": "me", "me_mode": "concat"}, meaning="ME, concatenated"),
    "me_sum": Row(finetune={"method": "me", "me_mode": "sum"}, meaning="ME, added"),
    "concat": Row(
        finetune={"method": "concat", "concat_mode": "sequence"}, meaning="Concat, a token per modality"
    ),
    "concat_feature": Row(
        finetune={"method": "concat", "concat_mode": "feature"}, meaning="Concat, one shared token"
    ),
    "concat_mlp": Row(finetune={"method": "concat_mlp"}, meaning="Concat&MLP"),
    "ctrl_mm": Row(finetune={"method": "ctrl_mm", "ctrl_stage": "joint"}, meaning="CTRL-MM, joint"),
    "ctrl_mm_two": Row(finetune={"method": "ctrl_mm", "ctrl_stage": "two"}, meaning="CTRL-MM, two stages"),
    "se_sid": Row(finetune=SE_SID, meaning="SE-SID, the recipe's semantic IDs (learned beside the others)"),
    "se_sid_mmd": Row(
        finetune=SE_SID,
        ids={**COLLAB_ALONE, "reconstruction": "mmd"},
        meaning="SE-SID-MMD, codes of its own by gradient",
    ),
    "se_sid_mse": Row(
        finetune=SE_SID,
        ids={**COLLAB_ALONE, "reconstruction": "mse"},
        meaning="SE-SID-MSE, codes of its own by gradient",
    ),
    "mme_sid_random": Row(finetune={**MME_SID, "random_codes": True}, meaning="MME-SID-random"),
    "se_random": Row(finetune={"method": "se_random"}, meaning="SE-random"),
    "mme_random": Row(finetune={"method": "mme_random"}, meaning="MME-random"),
    "no_fusion": Row(finetune={**MME_SID, "fusion": "equal"}, meaning="MME-SID without fusion"),
}
"""Rows by name; the first is what the others are held to."""


def own_rows(recipe: Recipe, given: list[list[str]]) -> dict[str, Row]:
    """Rows that a user made up: a name, and settings of finetune that differ from the recipe's.

    Raises:
        ConfigError: as `arguments.own_rows`, or settings that cannot be.
    """
    taken = (*ROWS, *PROVIDER_FIELDS, *BESIDE, recipe.train_collab.provider)
    found = {
        name: Row(finetune={}, typed=typed, meaning=" ".join(typed))
        for name, typed in arguments.own_rows(given, "finetune", taken).items()
    }
    for row in found.values():
        settings_for(recipe, row)
    return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and where it lies."""

    recipe: Recipe
    """What all rows share"""
    rows: dict[str, Row]
    seeds: list[int]
    """Of fine-tuning"""
    root: Path
    """Where the stages lie that all cells share"""
    out: Path
    """Where cells go"""
    refit: Path | None = None
    """Run directory of a comparison whose cells chose their epochs; see `llmrec.recipe.refit`"""


def prepare(comparison: Comparison) -> Comparison:
    """Run the stages that all cells share; the comparison with the settings that they were run with."""
    from llmrec.pipeline import RunDir, run

    recipe, root, refit = comparison.recipe, comparison.root, comparison.refit
    if refit is not None:
        refuse_refit_of_another(recipe, refit)
        collab = refit_stage("train_collab", recipe.train_collab, refit / "train_collab")
        recipe = replace(recipe, train_collab=collab)
    # Fine-tuning itself differs from row to row, and a row that cannot be run leaves the others be.
    refuse_what_cannot_finish(recipe, statuses(recipe, root, "learn_semantic_ids"))
    run(recipe, RunDir(root), until="learn_semantic_ids")
    return replace(comparison, recipe=recipe)


def run_cells(comparison: Comparison) -> None:
    """Fine-tune and rank what is not finished, seed by seed, so that all rows have results early.

    What another process is at is left to it and looked at again at the end.

    Args:
        comparison: as `prepare` gave it.
    """
    from llmrec import machine

    inputs = inputs_of(comparison.root)
    waiting = deque((name, seed) for seed in comparison.seeds for name in comparison.rows)
    impossible: set[str] = set()
    busy: set[tuple[str, int]] = set()
    while waiting:
        name, seed = cell = waiting.popleft()
        if name in impossible:
            continue
        try:
            run_cell(comparison, name, seed, inputs)
        except BusyError:
            waiting.append(cell)
            busy.add(cell)
            if busy.issuperset(waiting):
                time.sleep(WAIT_SECONDS)
        except IMPOSSIBLE as error:
            logger.warning("%s cannot be run with these settings: %s", name, error)
            impossible.add(name)
        if name in impossible:
            machine.make_room()


def inputs_of(root: Path) -> tuple[Any, ...]:
    """What all cells are made from, loaded."""
    from llmrec.finished import load
    from llmrec.stages import STAGES

    return tuple(load(STAGES[name].artifact_class(), root / name) for name in STAGES["finetune"].inputs)


def run_cell(comparison: Comparison, name: str, seed: int, inputs: tuple[Any, ...]) -> None:
    """One cell in its folder; why its row cannot be run is left in the row's folder.

    Args:
        comparison: as `prepare` gave it.
        name: of the row.
        seed: of fine-tuning.
        inputs: see `inputs_of`.

    Raises:
        BusyError: another process is at it, or at its semantic IDs.
    """
    from llmrec.pipeline import run_stage
    from llmrec.stages import STAGES

    recipe, row, out = comparison.recipe, comparison.rows[name], comparison.out
    folder = folder_of(out, name, seed)
    with keeping_why(out, name):
        if row.ids:
            ids_config = ids_settings(recipe.learn_semantic_ids, row)
            ids = run_stage(STAGES["learn_semantic_ids"], ids_config, inputs[:3], ids_folder(out, name))
            inputs = (*inputs[:3], ids)
        config = cell_settings(comparison, name, seed)
        adapter = run_stage(STAGES["finetune"], config, inputs, folder / "finetune")
        run_stage(STAGES["evaluate"], recipe.evaluate, (*inputs, adapter), folder / "evaluate")


@contextlib.contextmanager
def keeping_why(out: Path, name: str) -> Iterator[None]:
    """Write down in the row's folder why the row cannot be run; a note of an earlier try is deleted."""
    why = why_missing(out, name)
    why.unlink(missing_ok=True)
    try:
        yield
    except IMPOSSIBLE as error:
        why.parent.mkdir(parents=True, exist_ok=True)
        why.write_text(f"{error}\n", encoding="utf-8")
        raise


def cells_to_run(comparison: Comparison) -> list[jobs.Cell]:
    """What `run_cells` does, as cells for `llmrec.jobs.run`.

    Raises:
        StaleArtifactError: a finished cell was made with other settings or data.
    """
    inputs = inputs_of(comparison.root)
    for name, seed in itertools.product(comparison.rows, comparison.seeds):
        if finished(folder_of(comparison.out, name, seed)):
            run_cell(comparison, name, seed, inputs)  # looks at them, and finds nothing to do
    return [cell_to_run(comparison, name, seed) for seed in comparison.seeds for name in comparison.rows]


def cell_to_run(comparison: Comparison, name: str, seed: int) -> jobs.Cell:
    """One cell, and a file with all that its process has to know, which `main` reads."""
    row, out, refit = comparison.rows[name], comparison.out, comparison.refit
    folder = folder_of(out, name, seed)
    stages = [folder / "finetune", folder / "evaluate"]
    if row.ids:
        stages.append(ids_folder(out, name))
    request: dict[str, Any] = {
        "recipe": as_dict(comparison.recipe),
        "name": name,
        "row": asdict(row),
        "seed": seed,
        "root": str(comparison.root),
        "out": str(out),
        "refit": None if refit is None else str(refit),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, request)
    return jobs.Cell(
        row=name,
        seed=seed,
        folder=folder,
        command=["llmrec.finetune.compare_cells", str(folder / REQUEST)],
        stages=tuple(stages),
        done=lambda: finished(folder),
        outcome=lambda: outcome(folder),
    )


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a cell goes."""
    return out / name / f"seed{seed}"


def why_missing(out: Path, name: str) -> Path:
    """Where it stands why a row cannot be run."""
    return out / name / "why_missing.txt"


def check_settings(comparison: Comparison) -> None:
    """Refuse finished cells that were made with other settings, by other code or with another template of the
    user's, or from other data than the first of them.

    Raises:
        ConfigError: one was.
    """
    from llmrec.finished import stage_manifest

    first: tuple[Path, dict[str, str]] | None = None
    for name, seed in itertools.product(comparison.rows, comparison.seeds):
        folder = folder_of(comparison.out, name, seed)
        if not finished(folder):
            continue
        config = cell_settings(comparison, name, seed)
        tuned, ranked = (stage_manifest(folder / stage) for stage in ("finetune", "evaluate"))
        changes = changed_settings(tuned["config"], config)
        changes += changed_sources(tuned, code_hashes(config) | file_hashes(config))
        changes += changed_settings(ranked["config"], comparison.recipe.evaluate)
        first = first or (folder, tuned["inputs"])
        others = [stage for stage in SHARED if tuned["inputs"].get(stage) != first[1].get(stage)]
        changes += [f"another {stage} than {first[0]}" for stage in others]
        if changes:
            raise ConfigError(
                f"{folder} was made with {', '.join(changes)}; use another folder, or delete it"
            )


def cell_settings(comparison: Comparison, name: str, seed: int) -> FinetuneConfig:
    """Settings of fine-tuning of one cell, with the epochs that a refitted comparison chose for it."""
    config = replace(settings_for(comparison.recipe, comparison.rows[name]), seed=seed)
    if comparison.refit is None:
        return config
    return refit_stage("finetune", config, folder_of(comparison.refit / "methods", name, seed) / "finetune")


def ids_folder(out: Path, name: str) -> Path:
    """Where a row's own semantic IDs go, which all its seeds share."""
    return out / "learn_semantic_ids" / name


def finished(folder: Path) -> bool:
    """Whether a cell is done."""
    return (folder / "evaluate").is_dir()


def outcome(folder: Path) -> str:
    """One phrase about a finished cell."""
    from llmrec.evaluation.tables import fine_tuned_in

    metrics = read_json(folder / "evaluate" / "metrics.json")
    found = metrics["rows"][fine_tuned_in(metrics)]
    return f"recall@10 {found['recall@10']:.4f}, ndcg@10 {found['ndcg@10']:.4f}"


def settings_for(recipe: Recipe, row: Row) -> FinetuneConfig:
    """The settings of fine-tuning of one row."""
    if row.typed:
        return apply_overrides(recipe, [f"finetune.{setting}" for setting in row.typed]).finetune
    return settings_of(recipe.finetune, row)


def settings_of(base: FinetuneConfig, row: Row) -> FinetuneConfig:
    """A recipe's settings for one row, without those that its method does not have."""
    defaults = vars(FinetuneConfig())
    method = row.finetune["method"]
    changes: dict[str, Any] = {name: defaults[name] for name in without_effect(method)}
    if method_of(method).fusion != method_of(base.method).fusion:
        changes["fusion"] = defaults["fusion"]
    changes |= row.finetune
    if changes.get("ctrl_stage") == "two":
        changes["ctrl_weight"] = defaults["ctrl_weight"]
    elif method == "ctrl_mm":
        changes["ctrl_epochs"] = defaults["ctrl_epochs"]
    probe = FinetuneConfig(method=method, fusion=changes.get("fusion", base.fusion))
    if probe.fusion_used != "frequency":
        changes |= {name: defaults[name] for name in FREQUENCY_FIELDS}
    return replace(base, **changes)


def ids_settings(base: LearnSemanticIdsConfig, row: Row) -> LearnSemanticIdsConfig:
    """A recipe's settings for the semantic IDs of one row, without those that have no effect there."""
    idle = ["alignment_weight", "alignment_temperature", "ema_decay", "collaborative_weight"]
    idle += ["mse_weight"] if row.ids["reconstruction"] == "mmd" else ["mmd_weight", "mmd_estimator"]
    fields = LearnSemanticIdsConfig.__dataclass_fields__
    changes: dict[str, Any] = {name: fields[name].default for name in idle}
    return replace(base, **changes, **row.ids)


def main(arguments: list[str]) -> None:
    """One cell, in a process of its own; see `cell_to_run`."""
    from llmrec.console import set_up_logging

    set_up_logging()
    request = read_json(Path(arguments[0]))
    name, seed = request["name"], request["seed"]
    comparison = Comparison(
        recipe=from_dict(Recipe, request["recipe"]),
        rows={name: Row(**request["row"])},
        seeds=[seed],
        root=Path(request["root"]),
        out=Path(request["out"]),
        refit=Path(request["refit"]) if request["refit"] else None,
    )
    run_cell(comparison, name, seed, inputs_of(comparison.root))


if __name__ == "__main__":
    sys.exit(jobs.end_cell(lambda: main(sys.argv[1:]), IMPOSSIBLE))
