"""Parts that several sequence models are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        query, key, value = heads
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout_rate if self.training else 0.0, is_causal=True
        )
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02) for tables and linear maps, zero biases and padding row; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0


def normal_like(values: Tensor) -> Tensor:
    """Draws from N(0, 1), as many as there are values, in float32 at least.

    In bfloat16 torch draws others, and precision would decide more than how a model is computed.
    """
    return torch.randn_like(values.to(torch.promote_types(values.dtype, torch.float32)))


@contextmanager
def noise_free(model: nn.Module) -> Iterator[None]:
    """Inside, the model drops and draws nothing and records no gradients, so that a figure to log costs no
    random number of the training around it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@torch.no_grad()
def mean_cosine(vectors: Tensor) -> Tensor:
    """Mean cosine between two of a row's vectors, from (B, K, D); 0 with one vector, 1 if they collapsed."""
    number = vectors.shape[1]
    if number < 2:
        return vectors.new_zeros(())
    unit = F.normalize(vectors, dim=-1)
    total = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))).mean()
    return total / (number * (number - 1))
