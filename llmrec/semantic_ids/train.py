"""Training of MM-RQ-VAE: vectors stay on the device, batches are index arithmetic."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from llmrec import tracking
from llmrec.checkpoint import EpochCheckpoints
from llmrec.errors import TrainingError
from llmrec.precision import matrix_precision
from llmrec.progress import progress
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.kmeans import code_clusters, init_codebooks
from llmrec.semantic_ids.mm_rqvae import MMRQVAE, Encoded, Losses
from llmrec.semantic_ids.quantizer import Neighbours
from llmrec.stopping import END_OF_EPOCH, stop_requests

logger = logging.getLogger("llmrec")

BLOCK_ROWS = 4096
"""Rows encoded at once outside training."""

CLUSTER_ITERATIONS = 10
"""Most rounds of k-means among a level's codes, for the loss of diversity."""

DEVICE_SHARE = 0.5
"""Item vectors stay in host memory if they would fill more of a GPU's free memory than this."""


class ItemRows(Protocol):
    """Vectors of one modality: (N + 1, D_m), and which items have one."""

    @property
    def vectors(self) -> np.ndarray: ...
    @property
    def present(self) -> np.ndarray: ...


@dataclass(frozen=True)
class TrainingItems:
    """What is trained on: the vectors of all modalities, row i of each about the same item."""

    vectors: dict[str, Tensor]
    """By modality: float32 (n, D_m), on the device, or in host memory where they do not fit"""
    present: dict[str, Tensor]
    """bool (n,), on the device, for modalities that some items lack"""
    device: torch.device

    @classmethod
    def of(cls, items: Mapping[str, ItemRows], model: MMRQVAE, *, include_pad: bool) -> TrainingItems:
        """All items, with the padding row in front if include_pad is set.

        Args:
            items: by modality; collab may be among them without having codes (`MMRQVAE.forward`).
            model: says where to.
            include_pad: see above.
        """
        device = next(model.parameters()).device
        first = 0 if include_pad else 1
        vectors = {name: torch.from_numpy(rows.vectors[first:]) for name, rows in items.items()}
        if device.type == "cuda":
            wanted = sum(table.nbytes for table in vectors.values())
            if wanted <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
                vectors = {name: table.to(device) for name, table in vectors.items()}
        present = {}
        for name, rows in items.items():
            there = rows.present[first:].copy()
            there[: 1 - first] = True
            if not there.all():
                present[name] = torch.from_numpy(there).to(device)
        return cls(vectors, present, device)

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Vectors of one modality on the device, (B, D_m)."""
        table = self.vectors[name]
        return table[index.to(table.device)].to(self.device)

    def with_vector(self, name: str) -> Tensor:
        """Rows that have a vector in a modality, int64 (n_m,), on the CPU."""
        if name in self.present:
            return self.present[name].nonzero()[:, 0].cpu()
        return torch.arange(len(self))


def initialise(model: MMRQVAE, config: LearnSemanticIdsConfig, items: TrainingItems) -> None:
    """Fit the scaling to all items, and the first codes to latent vectors of at most kmeans_rows of them."""
    generator = torch.Generator().manual_seed(config.seed)
    autoencoder: Any
    for name, autoencoder in model.autoencoders.items():
        index = items.with_vector(name)
        autoencoder.scaling.fit(
            items.rows(name, index[block]) for block in torch.arange(len(index)).split(BLOCK_ROWS)
        )
        if config.init == "random":
            continue
        if len(index) > config.kmeans_rows:
            index = index[torch.randperm(len(index), generator=generator)[: config.kmeans_rows]]
            logger.info("learn_semantic_ids: %s: k-means on %d of %d items", name, len(index), len(items))
        with torch.no_grad():
            latent = torch.cat(
                [autoencoder.encode(items.rows(name, block)) for block in index.split(BLOCK_ROWS)]
            )
        init_codebooks(
            autoencoder.quantizer,
            latent,
            config.kmeans_iterations,
            generator,
            method=config.init,
            restarts=config.kmeans_restarts,
            relocate_idle=config.method == "rkmeans",
        )


def fit(model: MMRQVAE, config: LearnSemanticIdsConfig, items: TrainingItems) -> list[dict[str, Any]]:
    """Train for the configured epochs; returns the log rows."""
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    rng = np.random.default_rng(config.seed)
    restarts = torch.Generator().manual_seed(config.seed)
    checkpoints = EpochCheckpoints(
        model,
        optimizer,
        {"order": rng, "restarts": restarts},
        minutes=config.save_every_minutes,
        what="learn_semantic_ids",
    )
    done, loop, _ = checkpoints.resume()
    log: list[dict[str, Any]] = loop.get("log", [])
    tracking.begin(log)
    with (
        stop_requests(END_OF_EPOCH) as stop,
        progress(None, "learn_semantic_ids", total=config.epochs, unit="epoch", initial=done) as bar,
    ):
        for epoch in range(done + 1, config.epochs + 1):
            cluster_codes(model, config, epoch)
            with matrix_precision(config.precision, items.device):
                # What is restarted after the last epoch nothing would train.
                dead = restarts if config.restart_dead_codes and epoch < config.epochs else None
                loss, parts, used = train_epoch(model, optimizer, config, items, rng, dead)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"learn_semantic_ids: the loss became {loss} in epoch {epoch}; lower "
                    f"learn_semantic_ids.learning_rate (now {config.learning_rate}), or scale the vectors by "
                    f"learn_semantic_ids.normalise=standardise (now {config.normalise})"
                )
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if epoch % config.log_every_epochs == 0 or epoch == config.epochs:
                log.append({"epoch": epoch, "loss": loss, "parts": parts, "utilisation": used})
                tracking.log(log[-1], epoch)
                logger.info(
                    "learn_semantic_ids: epoch %d, loss %.5g, %s", epoch, loss, describe_usage(used, config)
                )
            checkpoints.after_epoch(epoch, {"log": log}, None, stop)
    for autoencoder in model.autoencoders.values():
        cast(Any, autoencoder).quantizer.neighbours = None
    return log


def cluster_codes(model: MMRQVAE, config: LearnSemanticIdsConfig, epoch: int) -> None:
    """Tell every quantiser which of its codes belong together, for an epoch's loss of diversity. Whatever is
    drawn depends on the seed and the epoch alone, so a run that was stopped goes on as if it had not been."""
    if not config.diversity_weight:
        return
    autoencoder: Any
    for place, autoencoder in enumerate(model.autoencoders.values()):
        quantizer = autoencoder.quantizer
        seed = int(np.random.SeedSequence([config.seed, epoch, place]).generate_state(1)[0])
        books = quantizer.codebooks.detach()
        if not books.isfinite().all():
            raise TrainingError(
                f"learn_semantic_ids: codes became NaN or infinite in epoch {epoch - 1}; lower "
                f"learn_semantic_ids.learning_rate (now {config.learning_rate})"
            )
        cluster = code_clusters(
            books, config.diversity_clusters, CLUSTER_ITERATIONS, torch.Generator().manual_seed(seed)
        )
        quantizer.neighbours = Neighbours(cluster, torch.Generator().manual_seed(seed), books.device)


def train_epoch(
    model: MMRQVAE,
    optimizer: torch.optim.Optimizer,
    config: LearnSemanticIdsConfig,
    items: TrainingItems,
    rng: np.random.Generator,
    restarts: torch.Generator | None,
) -> tuple[float, dict[str, dict[str, float]], dict[str, list[float]]]:
    """One pass over all items in a new order.

    Args:
        restarts: chooses where dead codes are put after it; None: they stay.

    Returns:
        Mean loss per batch; its parts by modality; share of codes used per level, by modality.
    """
    model.train()
    order = torch.from_numpy(rng.permutation(len(items))).to(items.device)
    tally = Tally(model.autoencoders)
    residuals: dict[str, Tensor] = {}  # of the last batch
    for batch in order.tensor_split(num_batches(len(items), config.batch_size)):
        rows = {name: items.rows(name, batch) for name in items.vectors}
        here = {name: mask[batch] for name, mask in items.present.items()}
        encoded, losses = model(rows, here)
        if not encoded:  # no modality has two vectors in this batch
            continue
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        tally.add(encoded, losses)
        residuals |= {name: found.quantized.residuals for name, found in encoded.items()}
    none = torch.zeros(0, config.num_levels, dtype=torch.int64, device=items.device)
    used = {
        name: code_usage(torch.cat([none, *found]), config.num_codes) for name, found in tally.codes.items()
    }
    if restarts is not None:
        for name, found in residuals.items():
            autoencoder: Any = model.autoencoders[name]
            autoencoder.quantizer.restart(used[name], found, restarts)
    shares = {name: found.double().mean(dim=1).tolist() for name, found in used.items()}
    return tally.mean_loss(), tally.mean_parts(), shares


class Tally:
    """What the batches of an epoch gave. It stays on their device until the epoch has ended.

    Args:
        names: the modalities; a batch need not have all of them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.losses: list[Tensor] = []
        self.parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
        self.codes: dict[str, list[Tensor]] = {name: [] for name in names}

    def add(self, encoded: Mapping[str, Encoded], losses: Losses) -> None:
        """One batch."""
        self.losses.append(losses.total.detach())
        for name, found in encoded.items():
            self.codes[name].append(found.quantized.codes)
            for part, value in losses.parts[name].items():
                self.parts[name].setdefault(part, []).append(value.detach())

    def mean_loss(self) -> float:
        """Per batch."""
        return float(torch.stack(self.losses).mean()) if self.losses else 0.0

    def mean_parts(self) -> dict[str, dict[str, float]]:
        """Of the loss, by modality, per batch that has it."""
        return {
            name: {part: float(torch.stack(values).mean()) for part, values in found.items()}
            for name, found in self.parts.items()
        }


def num_batches(num_items: int, batch_size: int) -> int:
    """Fewest batches of equal size, none above batch_size, none below two items."""
    return max(1, min(-(-num_items // batch_size), num_items // 2))


def code_usage(codes: Tensor, num_codes: int) -> Tensor:
    """Which codes occur in codes (n, L): bool (L, K), on the CPU."""
    used = torch.zeros(codes.shape[1], num_codes, dtype=torch.bool, device=codes.device)
    return used.scatter_(1, codes.T, True).cpu()


def describe_usage(used: Mapping[str, list[float]], config: LearnSemanticIdsConfig) -> str:
    """Dead codes per level while training, as people read it."""
    return "dead codes " + ", ".join(
        f"{name} {' '.join(str(round((1 - share) * config.num_codes)) for share in found)}"
        for name, found in used.items()
    )
