"""Models as users have them in packages of their own: one that keeps to the protocol, others that do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrec.collab.losses import Loss, last_of, next_item_loss
from llmrec.data.batches import Batch


class Bag(nn.Module):
    """What was seen lately, older things the less."""

    layout = "positions"
    uses_time = False

    def __init__(self, *, num_items: int, embed_dim: int, decay: float = 0.5, max_history: int = 50) -> None:
        super().__init__()
        self.max_history = max_history
        self.decay = decay
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.next = nn.Linear(embed_dim, embed_dim)

    def encode(self, history: Tensor) -> Tensor:
        """(B, T, D) from int64 (B, T)."""
        state, states = 0.0, []
        for vectors in self.item(history).unbind(dim=1):
            state = self.decay * state + vectors
            states.append(state)
        return self.next(torch.stack(states, dim=1))

    def loss(self, batch: Batch) -> Loss:
        return next_item_loss("ce", self.encode(batch.item), self.item.weight, batch)

    def score(self, history: Tensor) -> Tensor:
        return last_of(self.encode(history), history) @ self.item.weight.T

    def item_embeddings(self) -> Tensor:
        return self.item.weight.detach()


class Counts(Bag):
    """Nothing to learn."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items, embed_dim=4)
        self.requires_grad_(False)


class Half(nn.Module):
    """No scores."""

    def loss(self, batch: Batch) -> Loss:
        raise NotImplementedError
