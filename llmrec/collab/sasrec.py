"""SASRec: a causal transformer over item ids, trained to name the next item at every position.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation" (ICDM 2018), with the form of
block, width and loss that later work found better (Klenitskiy and Vasilev, RecSys 2023, for the loss):
pre-norm blocks whose residual adds the unnormalised input, an output projection, GELU, and a softmax over
all items. The published loss (one negative, binary cross-entropy) is there by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.content import ContentMaps
from llmrec.collab.layers import Block, init_weights
from llmrec.collab.losses import Loss, last_of, next_item_loss
from llmrec.data.batches import Batch


class SASRec(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Item vectors are the input and the output table at once (tied, no bias), scaled by sqrt(D) at
    the input as published: with N(0, 0.02) tables this learns about twice as fast on Beauty.
    Positions are learned and counted from the first item shown, so a longer history leaves earlier
    positions as they were (counting from the last one was no better on Beauty). Padding on the right
    needs no mask: no position looks to its right.

    With `content`, what items look like is added to their vectors (`ContentMaps`); this is ours.
    """

    layout = "positions"
    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        inner_dim: int,
        dropout_rate: float,
        max_history: int,
        loss: str = "ce",
        num_negatives: int = 0,
        content: Iterable[str] = (),
        content_dim: int = 0,
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.num_items = num_items
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.content = ContentMaps(num_items, embed_dim, content, content_dim)
        self.position = nn.Embedding(max_history, embed_dim)
        self.dropout = nn.Dropout(dropout_rate)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, inner_dim, dropout_rate) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)

    def read_content(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Take what items look like, float (N + 1, D_m) by modality; once, before training."""
        self.content.read(vectors)

    def encode(self, history: Tensor) -> Tensor:
        """What the model knows after each position, (B, T, D), from int64 (B, T)."""
        return self._encode(history, self._table())

    def _table(self) -> Tensor:
        """All item vectors, (N + 1, D)."""
        return self.content(self.item.weight)

    def _encode(self, history: Tensor, table: Tensor) -> Tensor:
        """`encode` with the table, which costs something to make where content is part of it."""
        assert history.shape[1] <= self.max_history, (history.shape, self.max_history)
        hidden = F.embedding(history, table, padding_idx=0) * math.sqrt(table.shape[1])
        hidden = self.dropout(hidden + self.position.weight[: history.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item at every position of a batch."""
        table = self._table()
        query = self._encode(batch.item, table)
        return next_item_loss(self.loss_name, query, table, batch, num_negatives=self.num_negatives)

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        table = self._table()
        return last_of(self._encode(history, table), history) @ table.T

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self._table().detach()
