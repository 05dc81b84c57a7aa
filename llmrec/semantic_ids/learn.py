"""learn_semantic_ids: train MM-RQ-VAE on the item vectors, then give every item its nearest codes.

Rows of the padding item and of items without a vector in a modality take no part in training that
modality; the latter still get codes. No interaction is learned from: the train split only serves a
quality figure. The last epoch is kept.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrec import distributed
from llmrec.artifacts import (
    CollabEmbeddings,
    ContentEmbeddings,
    Interactions,
    SemanticIds,
    check_item_rows,
    check_same_catalog,
)
from llmrec.errors import ArtifactMismatchError, ConfigError, DataError, TrainingError
from llmrec.progress import progress
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.diagnostics import behaviour_target_pairs, collisions, modality_quality
from llmrec.semantic_ids.kmeans import init_codebooks
from llmrec.semantic_ids.mm_rqvae import MMRQVAE

logger = logging.getLogger("llmrec")

MODALITY_ORDER = ("collab", "text", "image")
BLOCK_ROWS = 4096
"""Rows encoded at once outside training."""


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
    check_sizes(config, items)
    settings = model_settings(config, {name: rows.vectors.shape[1] for name, rows in items.items()})
    distributed.seed_everything(config.seed)
    device = distributed.device()
    model = MMRQVAE(**settings).to(device)
    vectors = {name: torch.from_numpy(rows.vectors[1:]).to(device) for name, rows in items.items()}
    present = {
        name: torch.from_numpy(rows.present[1:]).to(device)
        for name, rows in items.items()
        if not rows.present[1:].all()
    }
    initialise(model, config, vectors, present)
    log = fit(model, config, vectors, present)
    exported = {name: export(model, name, rows.vectors) for name, rows in items.items()}
    quality = measure(config, data, items, exported)
    refuse_collapse(config, quality)
    for found in exported.values():
        found["codes"][0] = 0
    return SemanticIds(
        catalog=data.catalog,
        codes={name: found["codes"] for name, found in exported.items()},
        codebooks={name: found["codebooks"] for name, found in exported.items()},
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
        present = vectors.any(axis=1)
        if name != "collab":
            present &= ~content.missing[name]
        absent = num_items - int(present.sum())
        if absent:
            logger.info(
                "learn_semantic_ids: %d of %d items have no %s vector; they are not trained on",
                absent,
                num_items,
                name,
            )
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
            raise ConfigError(f"learn_semantic_ids.alignment='mmd' has no effect with {reason}; leave it out")
        config.refuse_changed(["alignment_weight", "alignment_temperature"], reason)
        if config.alignment != "none":
            logger.info("learn_semantic_ids: no alignment loss, as there is %s", reason)
    return names


def check_sizes(config: LearnSemanticIdsConfig, items: Mapping[str, ItemRows]) -> None:
    """Raise unless every modality has at least one item with a vector per code."""
    for name, rows in items.items():
        count = int(rows.present.sum())
        if count < config.num_codes:
            raise ConfigError(
                f"learn_semantic_ids.num_codes must be at most the number of items with a {name} vector "
                f"({count}), got {config.num_codes}; about a tenth of it suits, such as "
                f"learn_semantic_ids.num_codes={max(2, 2 ** round(math.log2(max(count, 20) / 10)))}"
            )
        if (rows.vectors[rows.present] == rows.vectors[rows.present][:1]).all():
            raise DataError(
                f"learn_semantic_ids: all {count} {name} vectors are equal, so there is nothing to tell "
                f"items apart by; leave {name} out of learn_semantic_ids.modalities"
            )


def model_settings(config: LearnSemanticIdsConfig, dims: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of MMRQVAE, as JSON data."""
    return {
        "dims": dict(dims),
        "num_levels": config.num_levels,
        "num_codes": config.num_codes,
        "code_dim": config.code_dim,
        "hidden_dims": list(config.hidden_dims),
        "normalise": config.normalise,
        "reconstruction": config.reconstruction,
        "mmd_estimator": config.mmd_estimator,
        "mmd_weight": config.mmd_weight,
        "mse_weight": config.mse_weight,
        "alignment": config.alignment,
        "alignment_weight": config.alignment_weight,
        "alignment_temperature": config.alignment_temperature,
        "quantization_weight": config.quantization_weight,
        "commitment_weight": config.commitment_weight,
        "rq_reduce": config.rq_reduce,
        "sinkhorn_eps": config.sinkhorn_eps if config.sinkhorn else None,
        "sinkhorn_iterations": config.sinkhorn_iterations,
    }


def initialise(
    model: MMRQVAE,
    config: LearnSemanticIdsConfig,
    vectors: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
) -> None:
    """Fit the scaling to all items, and the first codes to their latent vectors."""
    generator = torch.Generator().manual_seed(config.seed)
    for name, autoencoder in model.autoencoders.items():
        rows = vectors[name][present[name]] if name in present else vectors[name]
        autoencoder.scaling.fit(rows)
        if config.init == "kmeans":
            with torch.no_grad():
                latent = torch.cat([autoencoder.encode(block) for block in rows.split(BLOCK_ROWS)])
            init_codebooks(autoencoder.quantizer, latent, config.kmeans_iterations, generator)


def fit(
    model: MMRQVAE,
    config: LearnSemanticIdsConfig,
    vectors: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Train for the configured epochs; returns the log rows."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    rng = np.random.default_rng(config.seed)
    restarts = torch.Generator().manual_seed(config.seed)
    log: list[dict[str, Any]] = []
    epochs = progress(range(1, config.epochs + 1), "learn_semantic_ids", unit="epoch")
    for epoch in epochs:
        loss, parts, used = train_epoch(model, optimizer, config, vectors, present, rng, restarts)
        if not math.isfinite(loss):
            raise TrainingError(
                f"learn_semantic_ids: the loss became {loss} in epoch {epoch}; lower "
                f"learn_semantic_ids.learning_rate (now {config.learning_rate}), or scale the vectors with "
                f"learn_semantic_ids.normalise=standardise (now {config.normalise})"
            )
        epochs.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if epoch % config.log_every_epochs == 0 or epoch == config.epochs:
            log.append({"epoch": epoch, "loss": loss, "parts": parts, "utilisation": used})
            logger.info(
                "learn_semantic_ids: epoch %d, loss %.5g, %s", epoch, loss, describe_usage(used, config)
            )
    return log


def train_epoch(
    model: MMRQVAE,
    optimizer: torch.optim.Optimizer,
    config: LearnSemanticIdsConfig,
    vectors: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    rng: np.random.Generator,
    restarts: torch.Generator,
) -> tuple[float, dict[str, dict[str, float]], dict[str, list[float]]]:
    """One pass over all items in a new order.

    Returns:
        Mean loss per batch; its parts by modality; share of codes used per level, by modality.
    """
    model.train()
    num_items, device = len(next(iter(vectors.values()))), next(model.parameters()).device
    order = torch.from_numpy(rng.permutation(num_items)).to(device)
    totals: list[Tensor] = []
    parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in vectors}
    codes: dict[str, list[Tensor]] = {name: [] for name in vectors}
    residuals: dict[str, Tensor] = {}
    for batch in order.tensor_split(num_batches(num_items, config.batch_size)):
        rows = {name: table[batch] for name, table in vectors.items()}
        here = {name: mask[batch] for name, mask in present.items()}
        encoded, losses = model(rows, here)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.detach())
        for name, found in encoded.items():
            codes[name].append(found.quantized.codes)
            residuals[name] = found.quantized.residuals
            for part, value in losses.parts[name].items():
                parts[name].setdefault(part, []).append(value.detach())
    used = {name: code_usage(torch.cat(found), config.num_codes) for name, found in codes.items()}
    if config.restart_dead_codes:
        for name, found in residuals.items():
            model.autoencoders[name].quantizer.restart(used[name], found, restarts)
    mean_parts = {
        name: {part: float(torch.stack(values).mean()) for part, values in found.items()}
        for name, found in parts.items()
    }
    shares = {name: found.double().mean(dim=1).tolist() for name, found in used.items()}
    return float(torch.stack(totals).mean()), mean_parts, shares


def num_batches(num_items: int, batch_size: int) -> int:
    """Fewest batches of equal size, none above batch_size, none below two items."""
    return max(1, min(-(-num_items // batch_size), num_items // 2))


def code_usage(codes: Tensor, num_codes: int) -> Tensor:
    """Which codes occur in codes (n, L): bool (L, K), on the CPU."""
    used = torch.zeros(codes.shape[1], num_codes, dtype=torch.bool, device=codes.device)
    return used.scatter_(1, codes.T, True).cpu()


@torch.no_grad()
def export(model: MMRQVAE, name: str, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Nearest codes of every row of one modality, and what they stand for.

    In float64, so that codes depend neither on the other rows of a block nor on the device, but for
    exact ties.

    Returns:
        codes int64 (n, L); codebooks float32 (L, K, D); quantized (n, D), scaled and decoded (n, D_m)
        float32.
    """
    autoencoder: nn.Module = copy.deepcopy(model.autoencoders[name]).double().eval()
    found: dict[str, list[Tensor]] = {"codes": [], "quantized": [], "scaled": [], "decoded": []}
    for block in torch.from_numpy(vectors).split(BLOCK_ROWS):
        encoded = autoencoder(block.to(autoencoder.quantizer.codebooks.device).double())
        found["codes"].append(encoded.quantized.codes.cpu())
        found["quantized"].append(encoded.quantized.vectors.float().cpu())
        found["scaled"].append(encoded.source.float().cpu())
        found["decoded"].append(encoded.decoded.float().cpu())
    arrays = {key: torch.cat(blocks).numpy() for key, blocks in found.items()}
    codebooks = model.autoencoders[name].quantizer.codebooks
    return arrays | {"codebooks": codebooks.detach().cpu().numpy().copy()}


def measure(
    config: LearnSemanticIdsConfig,
    data: Interactions,
    items: Mapping[str, ItemRows],
    exported: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    """The quality figures of all modalities and of their codes taken together."""
    pairs = behaviour_target_pairs(data, config.seed)
    modalities = {
        name: modality_quality(
            source=rows.vectors, present=rows.present, pairs=pairs, seed=config.seed, **exported[name]
        )
        for name, rows in items.items()
    }
    joined = np.concatenate([found["codes"][1:] for found in exported.values()], axis=1)
    for name, found in modalities.items():
        logger.info(
            "learn_semantic_ids: %s: utilisation %s, collisions %.4f, reconstruction error %.4f, tau %s",
            name,
            " ".join(f"{level['utilisation']:.3f}" for level in found["levels"]),
            found["collision_rate"],
            found["reconstruction_error"],
            found["tau"]["latent"],
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
                "(learn_semantic_ids.min_utilisation); use fewer codes (num_codes, now "
                f"{config.num_codes}), init=kmeans, restart_dead_codes=true or a lower learning_rate"
            )


def describe_usage(used: Mapping[str, list[float]], config: LearnSemanticIdsConfig) -> str:
    """Dead codes per level while training, as people read it."""
    return "dead codes " + ", ".join(
        f"{name} {' '.join(str(round((1 - share) * config.num_codes)) for share in found)}"
        for name, found in used.items()
    )


def load_quantizer(ids: SemanticIds) -> MMRQVAE:
    """The trained model, frozen, on this process's device."""
    if not ids.model:
        raise ArtifactMismatchError(
            "these semantic IDs were saved without the quantiser that made them, so no codes can be given to "
            "new vectors; recompute learn_semantic_ids"
        )
    model = MMRQVAE(**ids.model)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in ids.state.items()})
    return model.requires_grad_(False).to(distributed.device()).eval()


def assign(ids: SemanticIds, vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of new items: the nearest ones of the frozen quantiser.

    Given the vectors that `ids` were learned from, the codes are those of `ids`.

    Args:
        ids: learned semantic IDs.
        vectors: by modality, float32 (n, D_m), from the same encoders and not scaled.

    Returns:
        By modality: int64 (n, L).
    """
    model = load_quantizer(ids)
    codes = {}
    for name, table in vectors.items():
        if name not in ids.modalities or table.ndim != 2 or table.shape[1] != ids.model["dims"][name]:
            raise ArtifactMismatchError(
                f"{name} vectors of shape {tuple(table.shape)} do not fit these semantic IDs, which expect "
                + ", ".join(f"{known} (n, {width})" for known, width in ids.model["dims"].items())
            )
        codes[name] = export(model, name, table)["codes"]
    return codes
