"""What fine-tuning made of the item tables: distances kept (Kendall's tau), collapse (singular spectra), and
where the fusion weights went.

Source: MME-SID section 3, its analyses of collapse and forgetting. Samples for tau are those of
`semantic_ids.diagnostics`, from the train split, so that nothing depends on held-out items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrec.finetune.item_inputs import CodeSums, Mlp, ProjectedVectors
from llmrec.finetune.model import MMESID
from llmrec.interactions import Interactions
from llmrec.semantic_ids.diagnostics import behaviour_target_pairs, distances, kendall_tau, spectrum

BLOCK = 4096

MOST_NUMBERS = 1 << 28
"""Largest table that is kept whole, in numbers (1 GiB)."""

FREQUENCIES = ((0, 0), (1, 2), (3, 5), (6, 10), (11, 20), (21, 50), (51, None))
"""Train interactions of the groups of items whose weights are averaged."""


def tables_of(model: MMESID) -> dict[str, Callable[[Tensor], Tensor]]:
    """The item tables of a model by name, as functions of item ids (n,) to rows (n, width)."""
    tokens, scores = model.item_tokens, model.item_scores
    tables: dict[str, Callable[[Tensor], Tensor]] = dict(tokens.parts.items())
    if isinstance(tokens.mixer, Mlp):
        layers = tokens.mixer.layers
        tables["token_before_activation"] = lambda item: layers(
            torch.cat([part(item) for part in tokens.parts.values()], dim=-1)
        )
    tables["token"] = lambda item: tokens(item).flatten(1)
    tables["target_table"] = lambda item: scores.target_table[item]
    if scores.modalities:
        tables["item_matrix"] = scores.folded
    return tables


def on_host(model: MMESID, table: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """A table as a function of NumPy item ids to float32 rows; kept whole unless it is very large."""
    device, num_rows = model.instruction.device, model.item_scores.num_rows

    @torch.no_grad()
    def rows(items: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.asarray(items, dtype=np.int64)).to(device)
        return torch.cat([table(block).float().cpu() for block in ids.split(BLOCK)]).numpy()

    if num_rows * rows(np.array([1])).shape[1] > MOST_NUMBERS:
        return rows
    known = rows(np.arange(num_rows))
    return lambda items: known[items]


def taus(model: MMESID, data: Interactions, collab: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Kendall's tau-b of behaviour-target distances under each table against those of the frozen vectors.

    Projections and code sums are held to the vectors of their own modality, everything else to the
    collaborative ones, over samples of items that have such vectors. Tables whose distances are all equal
    are left out.

    Args:
        model: whole, on any device.
        data: who interacted with what; its train split.
        collab: collaborative vectors float32 (N + 1, D).
        seed: of the draw where there are very many pairs.
    """
    pairs = behaviour_target_pairs(data, seed)
    frozen = {
        name: part.vectors.float().cpu().numpy()
        for name, part in model.item_tokens.parts.items()
        if isinstance(part, ProjectedVectors)
    }
    references: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def reference(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items of the samples that count, twice, and their distances."""
        if name not in references:
            vectors = collab if name == "" else frozen[f"vectors_{name}"]
            known = np.asarray(vectors.any(axis=1))
            counted = known[pairs.history] & known[pairs.target]
            history, target = pairs.history[counted], pairs.target[counted]
            references[name] = history, target, distances(lambda items: vectors[items], history, target)
        return references[name]

    found = {}
    for name, table in tables_of(model).items():
        part = dict(model.item_tokens.parts.items()).get(name)
        own = name.partition("_")[2] if isinstance(part, (ProjectedVectors, CodeSums)) else ""
        own = own if f"vectors_{own}" in frozen else ""
        history, target, theirs = reference(own)
        tau, _ = kendall_tau(theirs, distances(on_host(model, table), history, target))
        if tau is not None:
            found[name] = tau
    return found


def spectra(model: MMESID, collab: np.ndarray) -> dict[str, dict[str, Any]]:
    """Singular values of each item table, see `diagnostics.spectrum`, and of the collaborative vectors."""
    items = np.arange(1, len(collab))
    found = {"collab_vectors": spectrum(lambda rows: collab[rows], items)}
    for name, table in tables_of(model).items():
        found[name] = spectrum(on_host(model, table), items)
    return found


def weights_by_frequency(
    weights: Tensor, sources: tuple[str, ...], train_count: np.ndarray
) -> dict[str, dict[str, float]]:
    """Mean fusion weight of every source over items of similar popularity.

    Args:
        weights: (N, S).
        sources: S names.
        train_count: int64 (N + 1,).

    Returns:
        By range of train interactions ('3-5', '51+'), those without items left out: weight by source.
    """
    values, count = weights.double().cpu().numpy(), train_count[1:]
    found = {}
    for low, high in FREQUENCIES:
        chosen = (count >= low) & (count <= (count.max() if high is None else high))
        if chosen.any():
            label = str(low) if low == high else f"{low}+" if high is None else f"{low}-{high}"
            found[label] = dict(zip(sources, values[chosen].mean(axis=0).tolist()))
    return found


def fusion_shares(
    weights: Tensor, sources: tuple[str, ...], train_count: np.ndarray
) -> dict[str, dict[str, Any]] | None:
    """Per score source: mean weight, also by popularity, and share of items whose largest weight it is (of
    equal ones each has its part).

    Args:
        weights: mixing weights (N, S).
        sources: S names.
        train_count: int64 (N + 1,).

    Returns:
        None if there is one source.
    """
    if len(sources) == 1:
        return None
    top = (weights == weights.amax(dim=1, keepdim=True)).double()
    largest = (top / top.sum(dim=1, keepdim=True)).mean(dim=0)
    return {
        "mean_weight": dict(zip(sources, weights.double().mean(dim=0).tolist())),
        "largest_share": dict(zip(sources, largest.tolist())),
        "by_frequency": weights_by_frequency(weights, sources, train_count),
    }
