"""The tree of all items' codes, and the search for the most likely items along it, code by code.

A node is a string of first codes that some item has; an item is a leaf. A search that walks the tree names
items only (TIGER's free search also names strings that are none), and keeps the `beams` likeliest nodes of
every level, all of one user in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEVEL = 10_000.0
"""What every code that the search did not come to takes off an item's score: more than codes ever do."""


class CodeTree:
    """All strings of first codes.

    Args:
        codes: int64 (N + 1, P), below num_codes; items with equal codes share a leaf. Row 0 is no item.
        num_codes: K.
    """

    def __init__(self, codes: Tensor, num_codes: int) -> None:
        self.num_codes = num_codes
        self.node_of: list[Tensor] = [torch.zeros_like(codes[:, 0])]
        """By level 0..P, int64 (N + 1,): the node of every item; the root is 0, and row 0 means nothing."""
        self.parent: list[Tensor] = [codes.new_zeros(1)]
        """By level, int64 (nodes,), at the level above"""
        self.code: list[Tensor] = [codes.new_zeros(1)]
        """By level, int64 (nodes,), the last code"""
        for place in range(codes.shape[1]):
            key = self.node_of[-1] * num_codes + codes[:, place]
            found, node = torch.unique(key[1:], return_inverse=True)
            self.node_of.append(torch.cat([node[:1], node]))
            self.parent.append(found // num_codes)
            self.code.append(found % num_codes)

    def to(self, device: torch.device) -> CodeTree:
        """Itself, on a device."""
        for arrays in (self.node_of, self.parent, self.code):
            arrays[:] = [array.to(device) for array in arrays]
        return self

    @property
    def num_levels(self) -> int:
        """P."""
        return len(self.code) - 1

    def children(self, level: int, node: Tensor) -> Tensor:
        """Which codes go on to an item from nodes (...) of a level, bool (..., K)."""
        known = self.parent[level + 1] * self.num_codes + self.code[level + 1]  # in ascending order
        asked = node[..., None] * self.num_codes + torch.arange(self.num_codes, device=node.device)
        place = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
        return known[place] == asked

    def search(self, step: Callable[[int, Tensor, Tensor, Tensor], Tensor], rows: int, beams: int) -> Tensor:
        """Log-probabilities of all items, (B, N + 1), as far as the likeliest nodes lead.

        An item whose codes were all looked at has its exact log-probability. Of the others, those of whose
        codes more were looked at come first, and then those with the likelier of these codes. Column 0 means
        nothing.

        Args:
            step: from a level, its nodes int64 (B, W), the codes they end with and which of the W before they
                come from, likewise, to the log-probabilities of the next code, (B, W, K).
            rows: users B.
            beams: most nodes of a level that are followed.
        """
        device = self.node_of[0].device
        node = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        code, came_from = node, node
        sums = torch.zeros(rows, 1, device=device)
        scores = torch.zeros(rows, len(self.node_of[0]), device=device)
        for level in range(self.num_levels):
            reached = sums[..., None] + step(level, node, code, came_from)
            # Where each node of this level stands among those that are followed.
            slot = torch.full((rows, len(self.code[level])), -1, device=device)
            slot.scatter_(1, node, torch.arange(node.shape[1], device=device).expand_as(node))
            parent = slot[:, self.parent[level + 1]]
            place = parent.clamp(min=0) * self.num_codes + self.code[level + 1]
            found = reached.flatten(1).gather(1, place).masked_fill(parent < 0, -torch.inf)
            of_items = found[:, self.node_of[level + 1]]
            left = self.num_levels - level - 1
            scores = torch.where(of_items > -torch.inf, of_items - LEVEL * left, scores)
            if left:
                sums, node = found.topk(min(beams, found.shape[1]), dim=1)
                code, came_from = self.code[level + 1][node], parent.gather(1, node).clamp(min=0)
        return scores
