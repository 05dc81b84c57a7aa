"""The stages by name, with their settings and inputs: what command lines need. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, Report, SemanticIds
from llmrec.collab.config import TrainCollabConfig
from llmrec.config import StageSettings
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig
from llmrec.evaluation.config import EvaluateConfig
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.presets import PRESETS as FINETUNE_PRESETS
from llmrec.interactions import Interactions
from llmrec.semantic_ids.config import PRESETS as ID_PRESETS
from llmrec.semantic_ids.config import LearnSemanticIdsConfig, ReportSemanticIdsConfig

if TYPE_CHECKING:
    from llmrec.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline, as command lines see it."""

    name: str
    summary: str
    config: type[StageSettings]
    module: str
    """Where the function called `name` lives."""
    inputs: tuple[str, ...]
    """Names of the stages whose artefacts it takes, in order."""
    optional: tuple[str, ...] = ()
    """Names of those that it takes after them if its settings ask for that."""
    artifact: str
    """Class of what it makes, as module:name."""
    presets: dict[str, Any] = field(default_factory=dict)
    """Settings that have a name."""

    def made_from(self, config: StageSettings) -> tuple[str, ...]:
        """Names of the stages whose artefacts it takes with these settings, in order."""
        return self.inputs + (self.optional if config.optional_inputs() else ())

    def function(self) -> Callable[..., Any]:
        """The stage function; imports what it needs."""
        return getattr(importlib.import_module(self.module), self.name)

    def artifact_class(self) -> type:
        module, _, name = self.artifact.partition(":")
        return getattr(importlib.import_module(module), name)


def _stage(
    name: str,
    summary: str,
    config: type[StageSettings],
    module: str,
    inputs: str,
    artifact: type | str,
    presets: dict[str, Any] | None = None,
    *,
    optional: tuple[str, ...] = (),
) -> Stage:
    place = artifact if isinstance(artifact, str) else f"{artifact.__module__}:{artifact.__name__}"
    return Stage(
        name=name,
        summary=summary,
        config=config,
        module=module,
        inputs=tuple(inputs.split()),
        artifact=place,
        presets=presets or {},
        optional=optional,
    )


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage(
            "prepare_data",
            "read interactions and items, filter, order, split",
            PrepareDataConfig,
            "llmrec.data.prepare",
            "",
            Interactions,
        ),
        _stage(
            "train_collab",
            "train a sequence model on item ids; its item vectors are the collaborative modality",
            TrainCollabConfig,
            "llmrec.collab.train",
            "prepare_data",
            CollabEmbeddings,
            optional=("encode_items",),
        ),
        _stage(
            "encode_items",
            "encode titles and pictures into vectors",
            EncodeItemsConfig,
            "llmrec.encoders.encode",
            "prepare_data",
            ContentEmbeddings,
        ),
        _stage(
            "learn_semantic_ids",
            "learn MM-RQ-VAE: codes for every item and the code embeddings behind them",
            LearnSemanticIdsConfig,
            "llmrec.semantic_ids.learn",
            "prepare_data train_collab encode_items",
            SemanticIds,
            ID_PRESETS,
        ),
        _stage(
            "finetune",
            "fine-tune the language model on item tokens, with frequency-aware fusion",
            FinetuneConfig,
            "llmrec.finetune.train",
            "prepare_data train_collab encode_items learn_semantic_ids",
            "llmrec.finetune.adapter:Adapter",
            FINETUNE_PRESETS,
        ),
        _stage(
            "evaluate",
            "rank the whole catalogue for every user and write the report",
            EvaluateConfig,
            "llmrec.evaluation.evaluate",
            "prepare_data train_collab encode_items learn_semantic_ids finetune",
            Report,
        ),
    )
}


def in_order(recipe: Recipe) -> list[Stage]:
    """The stages of a `llmrec.recipe.Recipe`, each behind those it reads, else as they are listed."""
    left = list(STAGES.values())
    ordered: list[Stage] = []
    while left:
        known = {stage.name for stage in ordered}
        ready = next(one for one in left if known.issuperset(one.made_from(getattr(recipe, one.name))))
        left.remove(ready)
        ordered.append(ready)
    return ordered


COMMANDS: dict[str, Stage] = STAGES | {
    stage.name: stage
    for stage in (
        _stage(
            "report_semantic_ids",
            "judge semantic IDs before a language model is trained: one page, and the figures as JSON",
            ReportSemanticIdsConfig,
            "llmrec.semantic_ids.report",
            "prepare_data train_collab encode_items learn_semantic_ids",
            "llmrec.semantic_ids.report:SemanticIdsReport",
        ),
    )
}
"""The stages, and commands that look at what stages made; all have the same form."""
