"""Mamba4Rec: selective state-space layers over item ids.

Sources: Liu et al., "Mamba4Rec: Towards Efficient Sequential Recommendation with Selective State Space
Models" (2024) and chengkai-liu/Mamba4Rec; the Mamba layer is that of state-spaces/mamba (Mamba-1). It is
our own because transformers' `MambaMixer` scans one step at a time outside torch.compile and has changed
its interface between releases; the tests hold ours to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.layers import init_weights
from llmrec.collab.losses import Loss, last_of, next_item_loss
from llmrec.collab.selective_scan import selective_scan
from llmrec.data.batches import Batch

STEP_SIZES = (1e-3, 1e-1)
"""Range of the initial step sizes, drawn uniformly in the logarithm; state-spaces/mamba."""


class Mamba4Rec(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    There are no positions. Causal, so padding on the right needs no mask. Differs from the release: the
    padding row is zero, and the step sizes keep their own initial values unless ``init="released"`` (the
    release overwrites them with N(0, 0.02) and zero biases, like every other weight).
    """

    layout = "positions"
    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_layers: int,
        state_dim: int,
        conv_width: int,
        expand: int,
        dropout_rate: float,
        max_history: int,
        init: str = "reference",
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.layers = nn.ModuleList(
            Layer(
                MambaCore(embed_dim, state_dim, conv_width, expand), embed_dim, dropout_rate, num_layers > 1
            )
            for _ in range(num_layers)
        )
        self.apply(init_weights)
        if init == "reference":
            layer: Any
            for layer in self.layers:
                layer.mixer.reset_step_sizes()

    def encode(self, history: Tensor) -> Tensor:
        """What the model knows after each position, (B, T, D), from int64 (B, T)."""
        hidden = self.norm(self.dropout(self.item(history)))
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item at every position of a batch."""
        query = self.encode(batch.item)
        return next_item_loss(
            self.loss_name, query, self.item.weight, batch, num_negatives=self.num_negatives
        )

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        return last_of(self.encode(history), history) @ self.item.weight.T

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self.item.weight.detach()


class Layer(nn.Module):
    """A mixer over time and a feed-forward part, post-norm; chengkai-liu/Mamba4Rec mamba4rec.py.

    Args:
        mixer: maps (B, T, D) to (B, P, D), the first P places.
        residual: whether the mixer's input is added to its output; the release leaves that out with a
            single layer. The feed-forward part always has its residual.
    """

    def __init__(self, mixer: nn.Module, embed_dim: int, dropout_rate: float, residual: bool) -> None:
        super().__init__()
        self.mixer = mixer
        self.residual = residual
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.inner = nn.Linear(embed_dim, 4 * embed_dim)
        self.inner_out = nn.Linear(4 * embed_dim, embed_dim)
        self.inner_norm = nn.LayerNorm(embed_dim, eps=1e-12)

    def forward(self, hidden: Tensor, *context: Tensor) -> Tensor:
        """(B, T, D) to (B, P, D); context goes to the mixer."""
        mixed = self.dropout(self.mixer(hidden, *context))
        hidden = self.norm(mixed + hidden[:, : mixed.shape[1]] if self.residual else mixed)
        inner = self.dropout(F.gelu(self.inner(hidden)))
        return self.inner_norm(hidden + self.dropout(self.inner_out(inner)))


class MambaCore(nn.Module):
    """One Mamba-1 layer; parameters are named as in state-spaces/mamba, mamba_simple.py.

    Args:
        embed_dim: D.
        state_dim: numbers of state per inner channel.
        conv_width: items seen by the causal depthwise convolution.
        expand: inner channels E = expand x D.
    """

    def __init__(self, embed_dim: int, state_dim: int, conv_width: int, expand: int) -> None:
        super().__init__()
        inner = expand * embed_dim
        self.state_dim = state_dim
        self.edge = conv_width - 1
        self.rank = math.ceil(embed_dim / 16)
        self.in_proj = nn.Linear(embed_dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        rates = torch.arange(1, state_dim + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(inner, 1))
        self.A_log.no_weight_decay = True  # type: ignore[attr-defined]
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, embed_dim, bias=False)
        self.reset_step_sizes()

    @torch.no_grad()
    def reset_step_sizes(self) -> None:
        """Small weights, and biases whose softplus lies in STEP_SIZES."""
        bound = self.rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = (math.log(size) for size in STEP_SIZES)
        size = torch.exp(torch.rand_like(self.dt_proj.bias) * (high - low) + low).clamp(min=1e-4)
        self.dt_proj.bias.copy_(size + torch.log(-torch.expm1(-size)))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        length = hidden.shape[1]
        if not length:
            return hidden
        u, gate = self.in_proj(hidden).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., :length].transpose(1, 2))
        step, b, c = self.x_proj(u).split([self.rank, self.state_dim, self.state_dim], dim=-1)
        delta = F.softplus(self.dt_proj(step))
        y = selective_scan(u, delta, -torch.exp(self.A_log), b, c) + self.D * u
        return self.out_proj(y * F.silu(gate))
