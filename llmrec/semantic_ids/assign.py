"""Codes from a trained quantiser that no longer changes: for export, for new items, for looking back.

Everything here is computed in float64, so that codes depend neither on the other rows of a block nor on the
device, but for exact ties.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from llmrec import distributed
from llmrec.artifacts import SemanticIds
from llmrec.errors import ArtifactMismatchError
from llmrec.progress import progress
from llmrec.semantic_ids.mm_rqvae import MMRQVAE, ModalityAutoencoder
from llmrec.semantic_ids.quantizer import squared_distances

BLOCK_ROWS = 4096
"""Rows encoded at once."""

TABLE_BYTES = 1 << 30
"""Rebuilt vectors up to this size are kept, larger ones made again when asked for."""


def frozen(model: MMRQVAE, name: str) -> ModalityAutoencoder:
    """A copy of one modality's autoencoder in float64 for evaluation."""
    autoencoder = cast(ModalityAutoencoder, copy.deepcopy(model.autoencoders[name]))
    return autoencoder.double().eval().requires_grad_(False)


@torch.no_grad()
def nearest_codes(autoencoder: ModalityAutoencoder, vectors: np.ndarray) -> np.ndarray:
    """Nearest codes, level by level, of every row of vectors (n, D_m); int64 (n, L)."""
    device = autoencoder.quantizer.codebooks.device
    found = []
    blocks = torch.from_numpy(vectors).split(BLOCK_ROWS)
    for block in progress(blocks, "assign codes", unit="block") if len(blocks) > 20 else blocks:
        latent = autoencoder.encode(block.to(device).double())
        found.append(autoencoder.quantizer.assign(latent)[0].cpu())
    return torch.cat(found).numpy()


@torch.no_grad()
def separate(autoencoder: ModalityAutoencoder, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Codes without collisions, as far as there are enough last codes.

    Where items collide, all items that share the codes before the last one get new last codes: each code is
    given once (or evenly, if there are more items than codes), at the least total squared distance. The
    linear assignment is exact; TIGER and LETTER append a number or go through rounds of Sinkhorn instead.

    Args:
        autoencoder: see `frozen`.
        vectors: (n, D_m).
        codes: nearest codes int64 (n, L).
    """
    codes = codes.copy()
    _, group, size = np.unique(codes[:, :-1], axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(group.ravel(), kind="stable")
    last_book = autoencoder.quantizer.codebooks[-1]
    for members in np.split(order, np.cumsum(size)[:-1]):
        last = codes[members, -1]
        if len(np.unique(last)) == len(members):
            continue
        rows = torch.from_numpy(vectors[members]).to(last_book.device).double()
        shared = autoencoder.quantizer.lookup(torch.from_numpy(codes[members]).to(last_book.device))[:, :-1]
        residual = autoencoder.encode(rows) - shared.sum(dim=1)
        cost = squared_distances(residual, last_book).cpu().numpy()
        # Dealt in rounds of one item a code, so that large groups stay affordable.
        for first in range(0, len(members), cost.shape[1]):
            part = slice(first, first + cost.shape[1])
            codes[members[part], -1] = linear_sum_assignment(cost[part])[1]
    return codes


class Rebuilt:
    """What items' codes stand for, by item number; kept as tables while they are small.

    Args:
        autoencoder: see `frozen`.
        codes: int64 (n, L).
    """

    def __init__(self, autoencoder: ModalityAutoencoder, codes: np.ndarray) -> None:
        self.autoencoder, self.codes = autoencoder, codes
        self.tables: dict[str, np.ndarray] = {}
        first = self.make(np.arange(min(1, len(codes))))
        if sum(part.nbytes for part in first.values()) * len(codes) <= TABLE_BYTES:
            self.tables = self.make(np.arange(len(codes)))

    def __call__(self, what: str, items: np.ndarray) -> np.ndarray:
        """Rows of items, float32 (m, D): `latent`, the sum of the codes, or `decoded`."""
        if self.tables:
            return self.tables[what][items]
        return self.make(items)[what]

    @torch.no_grad()
    def make(self, items: np.ndarray) -> dict[str, np.ndarray]:
        device = self.autoencoder.quantizer.codebooks.device
        parts: dict[str, list[Tensor]] = {"latent": [], "decoded": []}
        for block in np.array_split(items, max(1, -(-len(items) // BLOCK_ROWS))):
            latent, decoded = self.autoencoder.rebuild(torch.from_numpy(self.codes[block]).to(device))
            parts["latent"].append(latent.float().cpu())
            parts["decoded"].append(decoded.float().cpu())
        return {what: torch.cat(found).numpy() for what, found in parts.items()}

    @torch.no_grad()
    def scaled(self, vectors: np.ndarray) -> np.ndarray:
        """Item vectors (m, D_m) as the encoder sees them, float32."""
        device = self.autoencoder.quantizer.codebooks.device
        return self.autoencoder.scaling(torch.from_numpy(vectors).to(device).double()).float().cpu().numpy()


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

    Given the vectors that `ids` were learned from, the codes are those of `ids`, but for collisions that
    were repaired.

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
        codes[name] = nearest_codes(frozen(model, name), table)
    return codes
