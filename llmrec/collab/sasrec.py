"""SASRec: a causal transformer over item ids, trained to name the next item at every position.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation" (ICDM 2018), with the form of
block, width and loss that later work found better (specs/baselines.md 2): pre-norm blocks whose
residual adds the unnormalised input, an output projection, GELU, and a softmax over all items.
The published loss (one negative, binary cross-entropy) is there by name.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.item_softmax import item_cross_entropy


class SASRec(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Item vectors are the input and the output table at once (tied, no bias), scaled by sqrt(D) at
    the input as published: with N(0, 0.02) tables this learns about twice as fast on Beauty.
    Positions are learned and counted from the first item shown, so a longer history leaves earlier
    positions as they were (counting from the last one was no better on Beauty). Padding on the right
    needs no mask: no position looks to its right.
    """

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
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.num_items = num_items
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.position = nn.Embedding(max_history, embed_dim)
        self.dropout = nn.Dropout(dropout_rate)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, inner_dim, dropout_rate) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)

    def encode(self, history: Tensor) -> Tensor:
        """What the model knows after each position, (B, T, D), from int64 (B, T)."""
        assert history.shape[1] <= self.max_history, (history.shape, self.max_history)
        hidden = self.item(history) * math.sqrt(self.item.embedding_dim)
        hidden = self.dropout(hidden + self.position.weight[: history.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    def loss(self, sequence: Tensor) -> tuple[Tensor, int]:
        """Sum of losses over predicted items and their number, from int64 (B, T)."""
        if sequence.shape[1] < 2:
            sequence = F.pad(sequence, (0, 1))
        row, position = sequence[:, 1:].nonzero(as_tuple=True)
        target = sequence[row, position + 1]
        hidden = self.encode(sequence[:, :-1])
        if self.loss_name == "ce":
            total = item_cross_entropy(hidden[row, position], self.item.weight, target)
        elif self.loss_name == "bce":
            total = self.binary_loss(hidden[row, position], target, sequence, row, position)
        else:
            total = self.sampled_loss(hidden, target, sequence, row, position)
        return total, len(target)

    def binary_loss(
        self, query: Tensor, target: Tensor, sequence: Tensor, row: Tensor, position: Tensor
    ) -> Tensor:
        """-log sigmoid(s+) - log(1 - sigmoid(s-)), one negative per position, as published."""
        negative = draw_unseen(sequence, sequence.shape[1] - 1, self.num_items)[row, position]
        wanted = (query * self.item(target)).sum(-1)
        unwanted = (query * self.item(negative)).sum(-1)
        return F.softplus(-wanted).sum() + F.softplus(unwanted).sum()

    def sampled_loss(
        self, hidden: Tensor, target: Tensor, sequence: Tensor, row: Tensor, position: Tensor
    ) -> Tensor:
        """Softmax over the target and negatives, which all positions of a user share.

        Source: Klenitskiy and Vasilev, "Turning Dross Into Gold Loss" (RecSys 2023).
        """
        negative = draw_unseen(sequence, self.num_negatives, self.num_items)
        unwanted = (hidden @ self.item(negative).transpose(1, 2))[row, position]
        wanted = (hidden[row, position] * self.item(target)).sum(-1)
        logits = torch.cat([wanted[:, None], unwanted], dim=1)
        return (logits.logsumexp(1) - wanted).sum()

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        last = (history != 0).sum(1).clamp(min=1) - 1
        query = self.encode(history)[torch.arange(len(history), device=history.device), last]
        return query @ self.item.weight.T

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self.item.weight.detach()


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each added to its input (pre-norm)."""

    def __init__(self, embed_dim: int, num_heads: int, inner_dim: int, dropout_rate: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.query_key_value = nn.Linear(embed_dim, 3 * embed_dim)
        self.attention_out = nn.Linear(embed_dim, embed_dim)
        self.inner_norm = nn.LayerNorm(embed_dim)
        self.inner = nn.Linear(embed_dim, inner_dim)
        self.inner_out = nn.Linear(inner_dim, embed_dim)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        hidden = hidden + self.dropout(self.attend(self.attention_norm(hidden)))
        inner = F.gelu(self.inner(self.inner_norm(hidden)))
        return hidden + self.dropout(self.inner_out(inner))

    def attend(self, hidden: Tensor) -> Tensor:
        """Causal multi-head attention, (B, T, D) to (B, T, D)."""
        heads = self.query_key_value(hidden).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            *heads, dropout_p=self.dropout_rate if self.training else 0.0, is_causal=True
        )
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


def draw_unseen(sequence: Tensor, count: int, num_items: int) -> Tensor:
    """Items drawn uniformly from those not in each row, int64 (B, count), from int64 (B, T).

    Exact and without rejection: the r-th unseen item is r plus the number of seen items before it.
    Of a row with all items, which has no unseen one, item N is drawn.
    """
    seen = sequence.sort(1).values
    repeated = F.pad(seen[:, 1:] == seen[:, :-1], (1, 0))
    outside = torch.iinfo(torch.int64).max
    seen = seen.masked_fill(repeated | (seen == 0), outside).sort(1).values
    known = seen != outside
    # unseen items smaller than seen[j] number seen[j] - 1 - j
    before = (seen - torch.arange(seen.shape[1], device=seen.device) - 1).masked_fill(~known, outside)
    unseen = (num_items - known.sum(1, keepdim=True)).clamp(min=1)
    shape = (len(sequence), count)
    drawn = (torch.rand(shape, dtype=torch.float64, device=sequence.device) * unseen).long()
    passed = torch.searchsorted(before, drawn, right=True)
    return (drawn + passed + 1).clamp(max=num_items)


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02) for tables and linear maps, zero biases and padding row."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0
