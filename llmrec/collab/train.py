"""train_collab: learn one collaborative vector per item from the train split.

One trainer (`llmrec.collab.trainer`) for every `CollabProvider`. It sees the train split alone, and the
validation items if told so; else these are only ranked, to choose the epoch, and not even looked at with
``select="last"``.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from llmrec import distributed, global_state
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds, check_same_catalog
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.own_checks import check_provider
from llmrec.collab.provider import make_provider
from llmrec.collab.rows import TrainingRows
from llmrec.collab.trainer import fit, valid_metrics
from llmrec.config import given
from llmrec.data.batches import Batch
from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ArtifactMismatchError, ConfigError, MissingArtifactError, StaleArtifactError
from llmrec.evaluation.rank import popularity
from llmrec.finished import check_lineage, load
from llmrec.interactions import Interactions, Sequences, Split, Targets

logger = logging.getLogger("llmrec")

SHOWN_ITEMS = 8
"""Most typical items of a group that metrics name."""

FEW_ROWS = 4
"""Rows that a model of the user's own is tried on before it is trained."""


def train_collab(
    config: TrainCollabConfig, data: Interactions, content: ContentEmbeddings | None = None
) -> CollabEmbeddings:
    """Collaborative item vectors from a sequential model, or from a file.

    Args:
        config: settings.
        data: who interacted with what.
        content: text and image vectors, for models whose settings ask for them.

    Raises:
        ConfigError: a setting does not fit the data; or content is missing, or nobody asked for it; or a
            model of the user's own does not do what it must.
        DataError: there is nothing to train on, or the file of vectors is unusable.
        TrainingError: the loss became NaN or infinite.
    """
    if content is not None and not config.content:
        raise ConfigError(
            f"encoded items were given, and provider={config.provider!r} as it is set asks for none; leave "
            "them out"
        )
    if config.provider == "precomputed":
        return use_precomputed(config, data)
    global_state.seed_everything(config.seed)
    settings = {"num_items": data.num_items, **config.of_model}
    model = new_model(config, settings, data, content)
    splits: tuple[Split, ...] = ("train", "valid") if config.include_valid else ("train",)
    sequences = data.sequences(*splits)
    rows = training_rows(model, config, sequences)
    valid = validation_targets(config, data)
    if config.is_own:

        def again() -> Any:
            return make_provider(config.provider, settings).to(distributed.device())

        check_provider(config.provider, model, first_batch(rows), data.num_items, again)
    metrics, log = fit(model, config, data, rows, valid)
    if valid is not None:
        warn_if_popularity_is_as_good(config, metrics, data, valid)
    if hasattr(model, "never_began") and (missed := model.never_began(metrics["epochs"])):
        logger.warning("train_collab: %s ended with epoch %d, %s", config.provider, metrics["epochs"], missed)
    state = {name: tensor.cpu().numpy().copy() for name, tensor in model.state_dict().items()}
    vectors = model.item_embeddings().detach().float().cpu().numpy().copy()
    return CollabEmbeddings(
        catalog=data.catalog,
        provider=config.provider,
        vectors=vectors,
        model=settings,
        state=state,
        metrics={
            **metrics,
            "num_parameters": sum(weight.numel() for weight in model.parameters()),
            "num_targets": rows.num_targets,
            "items_never_trained": data.num_items - rows.num_items,
            "mean_vector_norm": mean_norm(vectors),
            "trained_on": list(splits),
            **item_groups(model),
        },
        log=log,
    )


def new_model(
    config: TrainCollabConfig,
    settings: dict[str, Any],
    data: Interactions,
    content: ContentEmbeddings | None,
) -> Any:
    """The model to train, on this process's device, with the content that it reads.

    Args:
        settings: its constructor's arguments.
    """
    vectors = content_vectors(config, data, content)
    model: Any = make_provider(config.provider, settings)
    if model.uses_time and not data.knows_times:
        logger.warning(
            "train_collab: %s reads times, and these data have places in histories in their stead%s",
            config.provider,
            "" if config.is_own else f"; leave that out with train_collab.{config.provider}.temporal=false",
        )  # fmt: skip
    codes = codes_of_folder(config, data)
    try:
        if vectors:
            model.read_content(vectors)
        if codes:
            model.read_codes(codes)
    except ConfigError as error:
        raise ConfigError(f"train_collab.{config.provider}: {error}") from None
    return model.to(distributed.device())


def training_rows(model: Any, config: TrainCollabConfig, sequences: Sequences) -> TrainingRows:
    """Sequences as the rows that the settings ask for, on this process's device."""
    layout = model.layout if config.layout == "auto" else config.layout
    windows = config.windows
    if windows == "auto":
        windows = "all" if model.layout == "prefixes" else "last"
    places = getattr(model, "places_per_item", 1)
    return TrainingRows.of(sequences, model.max_history, layout, distributed.device(), windows, places)


def first_batch(rows: TrainingRows) -> Batch:
    """Of a few rows."""
    return next(rows.batches(np.arange(min(FEW_ROWS, rows.num_rows))))


def item_groups(model: Any) -> dict[str, Any]:
    """What a model that sorts items into groups made of them, as ``item_groups``: the groups' name, and of
    each the share of items that belong to it most and the items that belong to it most of all."""
    if not hasattr(model, "item_groups"):
        return {}
    name, weights = model.eval().item_groups()
    if not weights.shape[1]:
        return {}
    share = weights[1:].argmax(1).bincount(minlength=weights.shape[1]) / (len(weights) - 1)
    best = weights[1:].topk(min(SHOWN_ITEMS, len(weights) - 1), dim=0)
    groups = [
        {"share": round(float(share[k]), 4), "items": (best.indices[:, k] + 1).tolist(),
         "weights": [round(value, 4) for value in best.values[:, k].tolist()]}
        for k in range(weights.shape[1])
    ]  # fmt: skip
    return {"item_groups": {"name": name, "groups": groups}}


def content_vectors(
    config: TrainCollabConfig, data: Interactions, content: ContentEmbeddings | None
) -> dict[str, np.ndarray]:
    """What the model's settings ask for, (N + 1, D_m) by modality.

    Raises:
        ConfigError: it is not there.
        DataError: the file of another model's vectors is unusable.
    """
    setting = f"train_collab.{config.provider}.content"
    found = {}
    if "collab" in config.reads_vectors_of:
        found["collab"], _ = vectors_of_file(config, data)
    if not config.content:
        return found
    if content is None:
        raise ConfigError(f"{setting}={','.join(config.content)} needs the output of encode_items")
    check_same_catalog(data, content)
    for name in config.content:
        if name not in content.vectors:
            raise ConfigError(f"{setting} names {name} vectors, which encode_items did not make")
        found[name] = content.vectors[name]
    return found


def codes_of_folder(config: TrainCollabConfig, data: Interactions) -> dict[str, np.ndarray]:
    """Codes that learn_semantic_ids made, int64 (N + 1, L) by modality, where settings name its folder.

    Raises:
        ConfigError: it has no codes of a modality, or of another number than the model's settings.
        MissingArtifactError: the folder is not what that stage makes.
        ArtifactMismatchError: they are other items' codes, or were made from another split.
    """
    if config.semantic_ids is None:
        return {}
    model, where = getattr(config, config.provider), f"train_collab.semantic_ids={config.semantic_ids}"
    try:
        ids = load(SemanticIds, config.semantic_ids)
        check_same_catalog(data, ids)
        check_lineage((data, ids))
    except (ArtifactMismatchError, MissingArtifactError, StaleArtifactError) as error:
        raise type(error)(f"{where}: {error}") from None
    for name in config.names_content:
        if name not in ids.codes:
            raise ConfigError(
                f"train_collab.{config.provider}.content names {name}, of which {where} has no codes, but of "
                f"{', '.join(ids.codes)}"
            )
        levels, size, _ = ids.codebooks[name].shape
        for setting, wanted in (("num_levels", levels), ("num_codes", size)):
            if (got := getattr(model, setting)) != wanted:
                raise ConfigError(
                    f"train_collab.{config.provider}.{setting} must be {wanted}, as it is in {where}, "
                    f"got {got}"
                )
    return {name: ids.codes[name] for name in config.names_content}


def vectors_of_file(config: TrainCollabConfig, data: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """Vectors made elsewhere, (N + 1, D), and which items have none; these are zero, and counted."""
    vectors, missing = read_vectors(given(config.vectors), data.raw_ids, "train_collab.vectors")
    if missing.any():
        logger.warning("train_collab: %d of %d items have no vector", missing.sum(), data.num_items)
    return vectors, missing


def use_precomputed(config: TrainCollabConfig, data: Interactions) -> CollabEmbeddings:
    """Vectors made elsewhere; items without one get zeros and are counted."""
    vectors, missing = vectors_of_file(config, data)
    return CollabEmbeddings(
        catalog=data.catalog,
        provider="precomputed",
        vectors=vectors,
        metrics={"items_without_vector": int(missing.sum()), "mean_vector_norm": mean_norm(vectors)},
    )


def mean_norm(vectors: np.ndarray) -> float:
    """Mean length of the items' vectors (N + 1, D) without row 0; models differ by orders of magnitude."""
    return float(np.linalg.norm(vectors[1:], axis=1).mean())


def validation_targets(config: TrainCollabConfig, data: Interactions) -> Targets | None:
    """What chooses the epoch; None with select='last'."""
    if config.select == "last":
        return None
    targets = data.targets("valid")
    if len(targets) == 0:
        raise ConfigError(
            "train_collab.select='valid' needs validation targets to choose the epoch by, and the data set "
            "has none; set train_collab.select=last and train_collab.epochs, or change the split"
        )
    if len(targets) < 100:
        logger.warning("train_collab: only %d validation targets choose the epoch", len(targets))
    return targets


def warn_if_popularity_is_as_good(
    config: TrainCollabConfig, metrics: dict[str, Any], data: Interactions, valid: Targets
) -> None:
    """Say so if a model has learned nothing of its users: its vectors would look like any others."""
    popular = valid_metrics(popularity(data), data, valid, config.mask_seen)["valid_ndcg@10"]
    if metrics["valid_ndcg@10"] <= popular:
        logger.warning(
            "train_collab: validation ndcg@10 of %s is %.4f (epoch %d of %d), and of popularity alone %.4f: "
            "it has learned nothing of its users; try another train_collab.learning_rate, smaller steps "
            "(train_collab.batch_size) or more train_collab.patience",
            *(config.provider, metrics["valid_ndcg@10"], metrics["best_epoch"], metrics["epochs"], popular),
        )
