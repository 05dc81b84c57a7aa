"""learn_semantic_ids: train MM-RQ-VAE on the item vectors, then give every item its nearest codes.

Rows of the padding item and of items without a vector in a modality take no part in training that
modality; the latter still get codes. No interaction is learned from: the train split only serves a
quality figure. The last epoch is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrec import distributed, global_state
from llmrec.artifacts import (
    CollabEmbeddings,
    ContentEmbeddings,
    SemanticIds,
    check_item_rows,
    check_same_catalog,
)
from llmrec.config import as_dict
from llmrec.errors import ConfigError, DataError, TrainingError
from llmrec.interactions import Interactions
from llmrec.semantic_ids.assign import Rebuilt, frozen, nearest_codes, separate
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.diagnostics import Coded, behaviour_target_pairs, collisions, modality_quality
from llmrec.semantic_ids.mm_rqvae import MMRQVAE
from llmrec.semantic_ids.remedies import remedies
from llmrec.semantic_ids.train import TrainingItems, fit, initialise

logger = logging.getLogger("llmrec")

MODALITY_ORDER = ("collab", "text", "image")


def learn_semantic_ids(
    config: LearnSemanticIdsConfig,
    data: Interactions,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
) -> SemanticIds:
    """Codes of every item, the code embeddings behind them, and how good they are.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: the vectors of a modality are all equal.
        TrainingError: the loss became NaN or infinite, or a codebook collapsed.
    """
    check_same_catalog(data, collab, content)
    items = {name: ItemRows.of(name, collab, content, data.num_items) for name in chosen(config, content)}
    for name, rows in items.items():
        if absent := data.num_items - int(rows.present.sum()):
            logger.info(
                "learn_semantic_ids: %d of %d items have no %s vector; they are not trained on",
                absent, data.num_items, name,
            )  # fmt: skip
    check_sizes(config, items)
    taught_by = teacher(config, collab, content, data.num_items, items)
    settings = model_settings(config, {name: rows.vectors.shape[1] for name, rows in items.items()})
    global_state.seed_everything(config.seed)
    model = MMRQVAE(**settings).to(distributed.device())
    table = TrainingItems.of(taught_by | items, model, include_pad=config.include_pad)
    initialise(model, config, table)
    log = fit(model, config, table) if config.method == "mm_rqvae" else []
    coded = {name: encode(config, model, name, rows) for name, rows in items.items()}
    quality = measure(config, data, coded)
    refuse_collapse(config, quality)
    for found in coded.values():
        found.codes[0] = 0
    return SemanticIds(
        catalog=data.catalog,
        codes={name: found.codes for name, found in coded.items()},
        codebooks={name: found.codebooks for name, found in coded.items()},
        quality=quality,
        log=log,
        state={name: tensor.cpu().numpy().copy() for name, tensor in model.state_dict().items()},
        model=settings,
    )


@dataclass(frozen=True)
class ItemRows:
    """Vectors of one modality."""

    vectors: np.ndarray
    """float32 (N + 1, D_m)"""
    present: np.ndarray
    """bool (N + 1,), items that have a vector"""

    @classmethod
    def of(cls, name: str, collab: CollabEmbeddings, content: ContentEmbeddings, num_items: int) -> ItemRows:
        vectors = collab.vectors if name == "collab" else content.vectors[name]
        check_item_rows(vectors, f"{name} embeddings", num_items=num_items)
        present = np.asarray(vectors.any(axis=1))
        if name != "collab":
            present &= ~content.missing[name]
        return cls(vectors, present)


def chosen(config: LearnSemanticIdsConfig, content: ContentEmbeddings) -> list[str]:
    """The modalities to use, in the package's order; says so where alignment has no partner.

    Raises:
        ConfigError: a modality is asked for that does not exist, or alignment settings cannot take effect.
    """
    exist = {"collab", *content.vectors}
    unknown = [name for name in config.modalities or () if name not in exist]
    if unknown:
        raise ConfigError(
            f"learn_semantic_ids.modalities asks for {', '.join(unknown)}, but there are vectors for "
            f"{', '.join(name for name in MODALITY_ORDER if name in exist)} only; set up encode_items for "
            "it, or leave it out"
        )
    names = [name for name in MODALITY_ORDER if name in (config.modalities or exist)]
    if len(names) == 1:
        reason = f"one modality ({names[0]})"
        if config.alignment == "mmd":
            raise ConfigError(
                f"learn_semantic_ids.alignment='mmd' has no effect with {reason}; set "
                "learn_semantic_ids.alignment=none"
            )
        config.refuse_changed(["alignment_weight", "alignment_temperature"], reason)
        if config.alignment != "none":
            logger.info("learn_semantic_ids: no alignment loss, as there is %s", reason)
    return names


def teacher(
    config: LearnSemanticIdsConfig,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    num_items: int,
    items: Mapping[str, ItemRows],
) -> dict[str, ItemRows]:
    """The collaborative vectors, as collab, where codes of texts and images learn from them; else nothing.

    Raises:
        ConfigError: codes are of another width; or there are neither texts nor images.
        DataError: no item has both a collaborative vector and a text or an image.
    """
    if not config.collaborative_weight:
        return {}
    if set(items) == {"collab"}:
        raise ConfigError(
            "learn_semantic_ids.collaborative_weight ties codes of texts and images to collaborative "
            "vectors, and there are neither; set up encode_items, or set it to 0"
        )
    rows = ItemRows.of("collab", collab, content, num_items)
    width = rows.vectors.shape[1]
    if width != config.code_dim:
        raise ConfigError(
            "learn_semantic_ids.collaborative_weight takes inner products of codes and collaborative "
            f"vectors, so learn_semantic_ids.code_dim must be the width of these ({width}), got "
            f"{config.code_dim}"
        )
    if not any((rows.present & found.present).any() for name, found in items.items() if name != "collab"):
        raise DataError(
            "learn_semantic_ids.collaborative_weight: no item has both a collaborative vector (other than "
            "zeros) and a text or an image, so there is nothing to learn from; set it to 0"
        )
    return {"collab": rows}


def check_sizes(config: LearnSemanticIdsConfig, items: Mapping[str, ItemRows]) -> None:
    """Raise unless every modality has at least one item with a vector per code."""
    for name, rows in items.items():
        count = int(rows.present.sum())
        config.check_items(count, f"items with a {name} vector")
        if all_equal(rows.vectors, np.flatnonzero(rows.present)):
            raise DataError(
                f"learn_semantic_ids: all {count} {name} vectors are equal, so there is nothing to tell "
                f"items apart by; leave {name} out of learn_semantic_ids.modalities"
            )


def all_equal(vectors: np.ndarray, items: np.ndarray) -> bool:
    """Whether the rows of these items are all the same, without a copy of all of them."""
    first = vectors[items[0]]
    blocks = np.array_split(items, max(1, -(-len(items) // 4096)))
    return all((vectors[block] == first).all() for block in blocks)


def model_settings(config: LearnSemanticIdsConfig, dims: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of MMRQVAE, as JSON data."""
    trained = config.method == "mm_rqvae"
    return {
        "dims": dict(dims),
        "code_dim": config.code_dim if trained else None,
        "hidden_dims": list(config.hidden_dims) if trained else None,
        "normalise": config.normalise,
        "reconstruction": config.reconstruction,
        "mmd_estimator": config.mmd_estimator,
        "mmd_weight": config.mmd_weight,
        "mse_weight": config.mse_weight,
        "alignment": config.alignment,
        "alignment_weight": config.alignment_weight,
        "alignment_temperature": config.alignment_temperature,
        "quantization_weight": config.quantization_weight,
        "collaborative_weight": config.collaborative_weight,
        "diversity_weight": config.diversity_weight,
        "quantizer": {
            "num_levels": config.num_levels,
            "num_codes": config.num_codes,
            "commitment_weight": config.commitment_weight,
            "commitment": config.commitment,
            "reduce": config.rq_reduce,
            "sinkhorn": config.sinkhorn,
            "sinkhorn_eps": config.sinkhorn_eps,
            "sinkhorn_iterations": config.sinkhorn_iterations,
            "codebook_update": config.codebook_update,
            "ema_decay": config.ema_decay,
            "estimator": config.estimator,
        },
    }


def encode(config: LearnSemanticIdsConfig, model: MMRQVAE, name: str, rows: ItemRows) -> Coded:
    """Codes of every item in one modality, by the trained model."""
    autoencoder = frozen(model, name)
    codes = nearest_codes(autoencoder, rows.vectors)
    if config.repair_collisions:
        items = np.flatnonzero(rows.present)
        codes[items] = separate(autoencoder, rows.vectors[items], codes[items])
    codebooks = autoencoder.quantizer.codebooks.float().detach().cpu().numpy().copy()
    return Coded(
        source=rows.vectors,
        present=rows.present,
        codes=codes,
        codebooks=codebooks,
        rebuilt=Rebuilt(autoencoder, codes),
    )


def measure(config: LearnSemanticIdsConfig, data: Interactions, coded: Mapping[str, Coded]) -> dict[str, Any]:
    """The quality figures of all modalities and of their codes taken together."""
    pairs = behaviour_target_pairs(data, config.seed)
    modalities = {name: modality_quality(found, pairs, config.seed) for name, found in coded.items()}
    joined = np.concatenate([found.codes[1:] for found in coded.values()], axis=1)
    for name, found in modalities.items():
        logger.info(
            "learn_semantic_ids: %s: utilisation %s, collisions %.4f, reconstruction error %.4f, tau %s",
            name,
            " ".join(f"{level['utilisation']:.3f}" for level in found["levels"]),
            found["collision_rate"],
            found["reconstruction_error"],
            "none" if (tau := found["tau"]["latent"]) is None else f"{tau:.4f}",
        )
    return {"modalities": modalities, "joined": collisions(joined)}


def refuse_collapse(config: LearnSemanticIdsConfig, quality: Mapping[str, Any]) -> None:
    """Raise if a level of a modality uses too few of its codes."""
    for name, found in quality["modalities"].items():
        shares = [level["utilisation"] for level in found["levels"]]
        if min(shares) < config.min_utilisation:
            raise TrainingError(
                f"learn_semantic_ids: the {name} codebooks collapsed: share of codes used per level "
                f"{', '.join(f'{share:.3f}' for share in shares)}, at least {config.min_utilisation} wanted "
                f"(learn_semantic_ids.min_utilisation) of num_codes={config.num_codes}"
                f"{remedies(as_dict(config))['unused']}"
            )
