"""ComiRec: a user is several interests; an item is scored by the one that likes it best.

Sources: Cen et al., "Controllable Multi-Interest Framework for Recommendation" (KDD 2020) and THUDM/ComiRec.
Differs: a softmax over all items in place of a sampled one with log-uniform candidates, every position of a
train sequence as a target, and no re-ranking for diversity (their lambda = 0).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.layers import mean_cosine
from llmrec.collab.losses import Loss, last_of, next_item_loss
from llmrec.data.batches import Batch


class ComiRec(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    With ``routing="attention"`` the interests at a position are weighted means of the items up to it, so
    one causal pass gives those of every prefix. Dynamic routing needs a row per prefix.
    """

    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_interests: int,
        routing: str,
        num_routings: int,
        dropout_rate: float,
        max_history: int,
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        self.layout = "positions" if routing == "attention" else "prefixes"
        self.max_history = max_history
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.num_routings = num_routings
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout_rate)
        nn.init.xavier_uniform_(self.item.weight)
        self.item.weight.data[0] = 0
        if routing == "attention":
            self.position = nn.Embedding(max_history, embed_dim)
            self.inner = nn.Linear(embed_dim, 4 * embed_dim)
            self.weigh = nn.Linear(4 * embed_dim, num_interests)
            # As TensorFlow begins: Glorot-uniform, biases zero.
            for layer in (self.position, self.inner, self.weigh):
                nn.init.xavier_uniform_(layer.weight)
            for layer in (self.inner, self.weigh):
                nn.init.zeros_(layer.bias)
        else:
            # N(0, 1) as released would make vectors of length D of those of length 1.
            shape = max_history, num_interests, embed_dim, embed_dim
            self.maps = nn.Parameter(torch.randn(shape) * embed_dim**-0.5)

    def interests(self, history: Tensor) -> Tensor:
        """The interests after each position, (B, T, K, D), or with routing after the last, (B, 1, K, D)."""
        items = self.dropout(self.item(history))
        if self.layout == "positions":
            return self.attend(items)
        votes = torch.einsum("btd,tkde->btke", items, self.maps[: items.shape[1]])
        start = votes.new_zeros(votes.shape[:3])
        return dynamic_routing(votes, history != 0, start, self.num_routings)[:, None]

    def attend(self, items: Tensor) -> Tensor:
        """ComiRec-SA, Eq. 6: softmax over places of W_2 tanh(W_1 (x + p)), applied to x alone."""
        length = items.shape[1]
        weight = self.weigh(torch.tanh(self.inner(items + self.position.weight[:length])))
        later = torch.ones(length, length, dtype=torch.bool, device=items.device).triu(1)
        weight = weight.transpose(1, 2)[:, :, None].masked_fill(later, -torch.inf)
        return (weight.softmax(-1) @ items[:, None]).transpose(1, 2)

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item by the interest that suits it best."""
        return best_interest_loss(self, batch)

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        return best_interest_scores(self, history)

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self.item.weight.detach()


def dynamic_routing(votes: Tensor, valid: Tensor, start: Tensor, num_routings: int) -> Tensor:
    """Interests (B, K, D) that places agree on (Sabour et al. 2017; THUDM/ComiRec model.py).

    Args:
        votes: what each place proposes for each interest, (B, T, K, D).
        valid: bool (B, T), places that hold an item.
        start: routing logits to begin with, (B, T, K).
        num_routings: iterations; gradients flow through the last one alone.
    """
    logits, fixed = start, votes.detach()
    for iteration in range(num_routings):
        last = iteration == num_routings - 1
        share = logits.softmax(-1) * valid[..., None]
        interests = squash(torch.einsum("btk,btkd->bkd", share, votes if last else fixed))
        if not last:
            logits = logits + torch.einsum("bkd,btkd->btk", interests, fixed)
    return interests


def squash(vectors: Tensor) -> Tensor:
    """Lengths pressed below 1: |s|^2 / (1 + |s|^2) in the direction of s; zero stays zero."""
    square = vectors.square().sum(-1, keepdim=True)
    return vectors * square / (1 + square) / (square + 1e-9).sqrt()


class ManyInterests(Protocol):
    """What `best_interest_loss` and `best_interest_scores` need of a model."""

    layout: str
    loss_name: str
    num_negatives: int
    item: nn.Embedding

    def interests(self, history: Tensor) -> Tensor:
        """The interests at each position, or at the end alone, (B, T or 1, K, D), from int64 (B, T)."""


def best_interest_loss(model: ManyInterests, batch: Batch) -> Loss:
    """Next-item loss where each target is asked for by its best interest (hard readout).

    Reported: how often each interest is the best one, and the mean cosine between interests of a user.
    """
    interests = model.interests(batch.item)
    target = batch.target if model.layout == "positions" else batch.target.amax(1, keepdim=True)
    fit = torch.einsum("btkd,btd->btk", interests, model.item(target))
    best = fit.argmax(-1)
    query = interests.gather(2, best[..., None, None].expand(-1, -1, -1, interests.shape[-1]))[:, :, 0]
    found = next_item_loss(
        model.loss_name,
        query,
        model.item.weight,
        replace(batch, target=target),
        num_negatives=model.num_negatives,
    )
    at = target != 0
    use = F.one_hot(best[at], interests.shape[2]).sum(0).to(query.dtype)
    parts = {"interest_use": use}
    if found.num_targets:
        parts["interest_overlap"] = mean_cosine(interests[at]) * found.num_targets
    return Loss(total=found.total, num_targets=found.num_targets, parts=parts)


def best_interest_scores(model: ManyInterests, history: Tensor) -> Tensor:
    """The best interest's inner product with every item, (B, N + 1)."""
    interests = model.interests(history)
    last = last_of(interests, history) if model.layout == "positions" else interests[:, 0]
    return (last @ model.item.weight.T).amax(1)
