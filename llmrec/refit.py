"""Learning from validation items too, for as many epochs as a finished run chose by them (`--refit`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmrec.collab.config import TrainCollabConfig
from llmrec.config import changed_settings
from llmrec.errors import ConfigError
from llmrec.files import read_json
from llmrec.finetune.config import FinetuneConfig
from llmrec.finished import checked_file, require_run, stage_manifest
from llmrec.stage_changes import MADE_WITH, statuses

if TYPE_CHECKING:
    from llmrec.recipe import Recipe

Refitted = TypeVar("Refitted", TrainCollabConfig, FinetuneConfig)

REFIT: dict[str, tuple[str, dict[str, Any]]] = {
    "train_collab": (
        "best_epoch",
        {name: getattr(TrainCollabConfig, name) for name in ("eval_every_epochs", "patience", "mask_seen")},
    ),
    "finetune": ("epoch_kept", {"eval_every_epochs": 0, "patience": None, "mask_seen": True}),
}
"""Stages that choose an epoch by validation: its name in their metrics, and settings without validation."""


def refit(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe, to learn from validation items too, for the epochs that a finished run chose by them.

    What is learned from the validation items cannot be measured on them, so the last weights are kept and
    nothing is validated. Vectors from a file stay what they are.

    Raises:
        ConfigError: the run was made with other settings, or chose no epochs by validation.
    """
    precomputed = recipe.train_collab.provider == "precomputed"
    require_run(run_dir, [stage for stage in REFIT if stage != "train_collab" or not precomputed])
    refuse_refit_of_another(recipe, run_dir, "finetune")
    changed = {stage: refit_stage(stage, getattr(recipe, stage), run_dir / stage) for stage in REFIT}
    return replace(recipe, **changed)


def refuse_refit_of_another(recipe: Recipe, run_dir: Path, until: str = "learn_semantic_ids") -> None:
    """Raise ConfigError if the epochs of a run, up to that stage, were chosen with other settings, code or
    files, or on other data, content or semantic IDs."""
    for name, status in statuses(recipe, run_dir, until).items():
        if status.startswith(MADE_WITH):
            what = status.partition(";")[0]
            raise ConfigError(f"--refit: {run_dir / name} {what}; run with the same settings first")


def refit_stage(stage: str, config: Refitted, folder: Path) -> Refitted:
    """The settings of one stage of `REFIT`, to learn from validation items too.

    Args:
        stage: its name.
        config: settings that it was run with.
        folder: its output.

    Raises:
        ConfigError: it was run with other settings, or chose no epoch by validation.
    """
    if isinstance(config, TrainCollabConfig) and config.provider == "precomputed":
        return config
    if changes := changed_settings(stage_manifest(folder)["config"], config):
        raise ConfigError(
            f"--refit: {folder} was made with {', '.join(changes)}; run with the same settings first"
        )
    if config.include_valid or config.select != "valid":
        raise ConfigError(f"--refit: {folder} chose no epoch by validation; set {stage}.select=valid")
    epochs, others = REFIT[stage]
    chosen = read_json(checked_file(folder, "metrics.json"))[epochs]
    if isinstance(config, FinetuneConfig):  # the same learning rates again
        others = {**others, "schedule_epochs": config.schedule_epochs or config.epochs}
    return replace(config, include_valid=True, select="last", epochs=chosen, **others)
