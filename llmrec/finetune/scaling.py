"""Scaling of frozen item vectors, fitted to the items that were trained on and kept with the weights, so that
items added later change no other item's vector."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import ArtifactMismatchError

FITTED = ("standardise", "whiten")
"""Kinds of scaling that depend on the catalogue."""

BLOCK_ROWS = 1 << 16
"""Rows of a table that are worked on at a time."""

SHRINKAGE = 0.01
"""whiten: added to every variance, as a share of the mean variance, so that noise is not blown up."""


def fit_scaling(vectors: dict[str, np.ndarray], how: str) -> dict[str, Tensor]:
    """What `scale` needs to know of a catalogue: ``<modality>.mean`` (D_m,) and ``<modality>.factor``.

    - standardise: one factor () for all columns, so that distances keep their order.
    - whiten: a factor (D_m, D_m), the inverse root of the shrunken covariance C + 0.01 tr(C) / D_m. The one
      root that is symmetric (ZCA), since any other is known up to signs and order only, which differ between
      machines. Sentence encoders put most of their variance into a few directions; without them in the way,
      the learned projection has all of what tells items apart within reach of one learning rate.

    Source: for whitening, Zhang et al., "Are ID Embeddings Necessary? Whitening Pre-trained Text Embeddings
        for Effective Sequential Recommendation" (ICDE 2024); they use several groups of columns.

    Args:
        vectors: float32 (N + 1, D_m) by modality; rows of zeros (padding, no vector) are left out.
        how: see FinetuneConfig.vectors.

    Returns:
        float32 tensors; none for 'raw' and 'l2'.
    """
    found: dict[str, Tensor] = {}
    if how not in FITTED:
        return found
    for name, table in vectors.items():
        width, full = table.shape[1], how == "whiten"
        number = max(1, sum(len(rows) for rows in blocks(table)))
        mean = sum((rows.sum(axis=0) for rows in blocks(table)), np.zeros(width)) / number
        spreads = (spread_of(rows - mean, full) for rows in blocks(table))
        covariance = sum(spreads, np.zeros((width, width) if full else width)) / number
        variance = float(np.trace(covariance) if full else covariance.sum()) / width
        if variance == 0:
            factor = np.ones(())
        elif how == "standardise":
            factor = np.asarray(1 / np.sqrt(variance))
        else:
            spread, directions = np.linalg.eigh(covariance)
            factor = (directions / np.sqrt(np.maximum(spread, 0) + SHRINKAGE * variance)) @ directions.T
        found |= {f"{name}.mean": torch.tensor(mean, dtype=torch.float32)}
        found |= {f"{name}.factor": torch.tensor(factor, dtype=torch.float32)}
    return found


def blocks(table: np.ndarray) -> Iterator[np.ndarray]:
    """The rows that are not all zero as float64, some at a time, so that the whole is never held twice."""
    for begin in range(0, len(table), BLOCK_ROWS):
        rows = table[begin : begin + BLOCK_ROWS]
        yield rows[rows.any(axis=1)].astype(np.float64)


def spread_of(centred: np.ndarray, full: bool) -> np.ndarray:
    """Sums of products of columns (D, D), or of squares alone (D,)."""
    return centred.T @ centred if full else np.einsum("nd,nd->d", centred, centred)


def scale(vectors: dict[str, np.ndarray], how: str, fitted: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Item vectors as the model sees them, float32 (N + 1, D_m) by modality; rows of zeros stay zero.

    Args:
        vectors: as encoded.
        how: see FinetuneConfig.vectors.
        fitted: what `fit_scaling` found at training.

    Raises:
        ArtifactMismatchError: `fitted` is of other vectors.
    """
    return {name: _scale(name, table, how, fitted) for name, table in vectors.items()}


def _scale(name: str, table: np.ndarray, how: str, fitted: dict[str, Tensor]) -> np.ndarray:
    if how == "raw":
        return table
    if how == "l2":
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    mean, factor = (fitted.get(f"{name}.{part}") for part in ("mean", "factor"))
    if mean is None or factor is None or len(mean) != table.shape[1]:
        raise ArtifactMismatchError(
            f"the weights hold no scaling of {name} vectors with {table.shape[1]} numbers; recompute finetune"
        )
    made = np.empty_like(table, dtype=np.float32)
    for begin in range(0, len(table), BLOCK_ROWS):
        rows = table[begin : begin + BLOCK_ROWS]
        centred = rows - mean.numpy()
        scaled = centred @ factor.numpy() if factor.ndim else centred * factor.numpy()
        made[begin : begin + BLOCK_ROWS] = np.where(rows.any(axis=1, keepdims=True), scaled, 0)
    return made
