"""T5's decoder along a tree: the strings that a search follows for one user stand side by side.

They share the keys and values of the user's history, which generation by rows of their own copies for each of
them, and every string brings its last code alone, behind the keys and values of its own codes before.
Computes what transformers' `T5Stack` does for whole strings in evaluation mode, from its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TreeDecoder:
    """The decoder for one batch of histories.

    Args:
        stack: a `transformers.models.t5.modeling_t5.T5Stack` that decodes; nothing is dropped.
        encoded: what it looks at, (B, S, D).
        visible: bool (B, S), which of that.
        length: most codes of a string.
    """

    def __init__(self, stack: Any, encoded: Tensor, visible: Tensor, length: int) -> None:
        self.stack = stack
        self.hidden_keys = ~visible[:, None, None]
        self.history = [keys_and_values(block.layer[1].EncDecAttention, encoded) for block in stack.block]
        self.before: list[tuple[Tensor, Tensor]] | None = None
        # The first block's, which all share: (heads, last code, codes before and itself).
        self.bias = stack.block[0].layer[0].SelfAttention.compute_bias(length, length)[0]

    def step(self, code: Tensor, came_from: Tensor) -> Tensor:
        """What the decoder says after one more code of every string, (B, W, D).

        Args:
            code: vectors of the codes, (B, W, D).
            came_from: int64 (B, W), which string of the step before each goes on.
        """
        hidden, now = code, []
        for number, block in enumerate(self.stack.block):
            own, crossed, inner = block.layer
            normed = own.layer_norm(hidden)
            keys, values = (new[:, :, :, None] for new in keys_and_values(own.SelfAttention, normed))
            if self.before is not None:
                keys, values = (
                    torch.cat([taken(old, came_from), new], dim=3)
                    for old, new in zip(self.before[number], (keys, values))
                )
            now.append((keys, values))
            query = heads(own.SelfAttention, own.SelfAttention.q(normed))[:, :, :, None]
            length = keys.shape[3]
            weights = query @ keys.mT + self.bias[:, None, length - 1 : length, :length]
            hidden = hidden + joined(own.SelfAttention, (softmax(weights) @ values)[:, :, :, 0])

            attention = crossed.EncDecAttention
            query = heads(attention, attention.q(crossed.layer_norm(hidden)))
            keys, values = self.history[number]
            weights = (query @ keys.mT).masked_fill(self.hidden_keys, -torch.inf)
            hidden = hidden + joined(attention, softmax(weights) @ values)

            hidden = hidden + inner.DenseReluDense(inner.layer_norm(hidden))
        self.before = now
        return self.stack.final_layer_norm(hidden)


def softmax(weights: Tensor) -> Tensor:
    return weights.float().softmax(-1).to(weights.dtype)


def heads(attention: Any, hidden: Tensor) -> Tensor:
    """(B, S, heads * width) to (B, heads, S, width)."""
    return hidden.unflatten(2, (attention.n_heads, -1)).transpose(1, 2)


def joined(attention: Any, found: Tensor) -> Tensor:
    """What all heads found, (B, heads, S, width), as (B, S, D)."""
    return attention.o(found.transpose(1, 2).flatten(2))


def keys_and_values(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of vectors (B, S, D), each (B, heads, S, width)."""
    return heads(attention, attention.k(hidden)), heads(attention, attention.v(hidden))


def taken(old: Tensor, came_from: Tensor) -> Tensor:
    """Rows (B, heads, W, L, width) of the strings (B, W') that go on."""
    index = came_from[:, None, :, None, None].expand(-1, old.shape[1], -1, *old.shape[3:])
    return old.gather(2, index)
