"""The best items of a catalogue for read-out vectors, of all items, or of those that a search comes up with.

Scores are products with the item matrix, (N + 1, H), whose row 0 is padding. ``seen`` are the items that may
not be found, int64 for every vector.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import ConfigError

BLOCK_SCORES = 1 << 24
"""Scores held at once (64 MiB)."""

Found = list[tuple[np.ndarray, np.ndarray]]
"""For every vector the items found, best first, and their scores."""


@torch.no_grad()
def best_of_all(
    matrix: Tensor, hidden: Tensor, seen: list[np.ndarray], k: int, allowed: np.ndarray | None
) -> Found:
    """The best of all items, a block of them at a time.

    Args:
        matrix: of the items, float32 (N + 1, H).
        hidden: read-out vectors, float32 (n, H).
        seen: see above.
        k: items for each; fewer are found if fewer are left.
        allowed: rank only these items, in ascending order; None: all.
    """
    device = matrix.device
    items = torch.arange(1, len(matrix), device=device)
    table = matrix[1:]
    if allowed is not None:
        items = torch.from_numpy(allowed).to(device)
        table = matrix[items]
    size = max(1, BLOCK_SCORES // max(1, len(hidden)))
    values = hidden.new_empty(len(hidden), 0)
    chosen = items.new_empty(len(hidden), 0)
    seen_row = torch.from_numpy(np.repeat(np.arange(len(seen)), [len(row) for row in seen])).to(device)
    seen_item = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *seen])).to(device)
    for block, rows_of_block in zip(items.split(size), table.split(size)):
        scores = hidden @ rows_of_block.T
        if len(seen_item):
            place = torch.searchsorted(block, seen_item).clamp(max=len(block) - 1)
            hit = block[place] == seen_item
            scores[seen_row[hit], place[hit]] = -torch.inf
        values = torch.cat([values, scores], dim=1)
        chosen = torch.cat([chosen, block.expand(len(hidden), -1)], dim=1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        chosen = chosen.gather(1, order)
    found = []
    for own_values, own_items in zip(values.cpu().numpy(), chosen.cpu().numpy()):
        real = own_values > -np.inf
        found.append((own_items[real], own_values[real]))
    return found


class Graph:
    """faiss's HNSW graph over the items, by inner product.

    Args:
        matrix: of the items, float32 (N + 1, H).

    Raises:
        ConfigError: faiss is not installed.
    """

    def __init__(self, matrix: Tensor) -> None:
        rows = matrix[1:].cpu().numpy()
        try:
            import faiss
        except ImportError:
            raise ConfigError(
                "index='faiss' needs the package faiss-cpu: pip install 'llmrec[faiss]'"
            ) from None
        self.graph = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        self.graph.hnsw.efConstruction = 200
        self.graph.add(np.ascontiguousarray(rows, dtype=np.float32))

    @torch.no_grad()
    def best(self, matrix: Tensor, hidden: Tensor, seen: list[np.ndarray], k: int) -> Found:
        """The best of the items that a search of the graph comes up with; their scores are exact.

        Arguments as of `best_of_all`.
        """
        import faiss

        wanted = min(k + max(map(len, seen)), len(matrix) - 1)
        # With the search, not kept in the graph: other threads may ask for fewer or more at the same time.
        how = faiss.SearchParametersHNSW(efSearch=max(128, 2 * wanted))  # type: ignore[attr-defined]
        _, places = self.graph.search(hidden.cpu().numpy(), wanted, params=how)
        found = []
        for state, own, row in zip(hidden, places, seen):
            items = np.sort(own[own >= 0]) + 1
            items = items[~np.isin(items, row)]
            values = (matrix[torch.from_numpy(items).to(matrix.device)] @ state).cpu().numpy()
            order = np.argsort(-values, kind="stable")[:k]
            found.append((items[order], values[order]))
        return found
