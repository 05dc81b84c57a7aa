"""FuXi-alpha: blocks of attention in separate channels of content, place and time, without softmax.

Sources: Ye et al., "FuXi-alpha: Scaling Recommendation Model with Feature Interaction Enhanced Transformer"
(2025), arXiv 2502.03036, and USTC-StarTeam/FuXi-alpha (on meta-recsys/generative-recommenders).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.losses import Loss, Pooled, last_of, next_item_loss, ratio
from llmrec.config import given
from llmrec.data.batches import Batch

NUM_BUCKETS = 129
"""Buckets of time differences: floor(ln(seconds) / 0.301), from 0 to 128."""


@dataclass(kw_only=True)
class Context:
    """What all blocks of one pass share, and what they tell about it."""

    valid: Tensor
    """bool (B, T), positions that hold an item"""
    bucket: Tensor | None
    """int64 (B, T, T), bucket of the time from an item (last axis) to another one, or to the one after that
    if the time of the request is used; None without the channel of time"""
    channel_squares: list[Tensor] = field(default_factory=list)
    """Of every block: mean square of each channel's output at each position, (B, T, C), detached"""
    routing: list = field(default_factory=list)
    """Of every mixture of experts: see `llmrec.collab.moe.Routing`"""

    def report(self, at: Tensor) -> dict[str, Pooled]:
        """Strengths of the channels, block by block: root mean squares, (C,), over the positions where at,
        bool (B, T), is true."""
        return {
            f"channel_rms_{block}": Pooled(((squares * at[..., None]).sum((0, 1)), at.sum()), root_mean)
            for block, squares in enumerate(self.channel_squares, start=1)
        }


class Fuxi(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Scores are cosines of the state and the item vectors, divided by the temperature; the lengths of item
    vectors mean nothing. Differs from the release: dense instead of ragged; the constant that divides the
    content channel is max_history, so that padding changes nothing; the time channel counts from the last
    item that the model has seen, unless it is to use the time of the request (the target's, as released),
    which says much about the target where times are days; a softmax over all items by default.
    """

    layout = "positions"

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        head_dim: int | None,
        inner_multiplier: int,
        semantic: bool,
        positional: bool,
        temporal: bool,
        single_stage: bool,
        dropout_rate: float,
        temperature: float,
        max_history: int,
        use_request_time: bool = False,
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        self.uses_time = temporal
        self.uses_request_time = use_request_time
        self.max_history = max_history
        self.temperature = temperature
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.item = item_table(num_items, embed_dim)
        self.position = position_table(max_history, embed_dim)
        self.dropout = nn.Dropout(dropout_rate)
        channels = Channels(
            semantic=semantic, positional=positional, temporal=temporal, max_history=max_history
        )
        self.blocks = nn.ModuleList(
            fuxi_block(
                embed_dim,
                num_heads,
                head_dim or embed_dim // num_heads,
                channels,
                dropout_rate,
                None if single_stage else inner_multiplier * embed_dim,
            )
            for _ in range(num_layers)
        )

    def encode(
        self, history: Tensor, time: Tensor | None, next_time: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """What the model knows after each position, (B, T, D), from int64 (B, T) two or three times."""
        context = context_of(history, *times_read(self, time, next_time))
        hidden = self.item(history) * math.sqrt(self.item.embedding_dim)
        hidden = self.dropout(hidden + self.position.weight[: history.shape[1]])
        return run_blocks(self.blocks, hidden, context), context

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item at every position of a batch."""
        hidden, context = self.encode(batch.item, batch.time, batch.next_time)
        found = next_item_loss(
            self.loss_name,
            unit(hidden),
            unit(self.item.weight),
            batch,
            num_negatives=self.num_negatives,
            temperature=self.temperature,
        )
        parts = context.report(batch.target != 0)
        return Loss(total=found.total, num_targets=found.num_targets, parts=parts)

    def score(self, history: Tensor, time: Tensor | None = None, next_time: Tensor | None = None) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T) two or three times."""
        query = last_of(self.encode(history, time, next_time)[0], history)
        return unit(query) @ unit(self.item.weight).T / self.temperature

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self.item.weight.detach()


def item_table(num_items: int, embed_dim: int) -> nn.Embedding:
    """N(0, 0.02) cut at two standard deviations, padding zero."""
    table = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
    nn.init.trunc_normal_(table.weight, std=0.02, a=-0.04, b=0.04)
    table.weight.data[0] = 0
    return table


def position_table(max_history: int, width: int) -> nn.Embedding:
    table = nn.Embedding(max_history, width)
    std = width**-0.5
    nn.init.trunc_normal_(table.weight, std=std, a=-2 * std, b=2 * std)
    return table


def times_read(
    model: Any, time: Tensor | None, next_time: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the times that a model reads, for `context_of`."""
    assert not model.uses_time or time is not None, "the channel of time needs times"
    assert not model.uses_request_time or next_time is not None, "it needs the time of the request"
    return time if model.uses_time else None, next_time if model.uses_request_time else None


def context_of(history: Tensor, time: Tensor | None, next_time: Tensor | None = None) -> Context:
    """What blocks share. Of int64 (B, T) item ids; for the channel of time, timestamps; and where it is to
    count from the request, those of the items that follow."""
    bucket = None
    if time is not None:
        now = time if next_time is None else next_time
        apart = (now[:, :, None] - time[:, None, :]).abs().clamp(min=1)
        bucket = (apart.float().log() / 0.301).long().clamp(0, NUM_BUCKETS - 1)
    return Context(valid=history != 0, bucket=bucket)


def looked_up(numbers: Tensor, index: Tensor) -> Tensor:
    """numbers[index] of a few numbers and very many indices: the gradients of plain indexing would be sorted
    first, and on a GPU then added up one by one."""
    return numbers.index_select(0, index.flatten()).view_as(index)


def run_blocks(blocks: nn.ModuleList, hidden: Tensor, context: Context) -> Tensor:
    """(B, T, D) to (B, T, D); padding is zero before and after every block."""
    kept = context.valid[..., None]
    hidden = hidden * kept
    for block in blocks:
        hidden = block(hidden, context) * kept
    return hidden


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero."""
    return F.normalize(vectors, dim=-1, eps=1e-6)


def root_mean(squares: Tensor, count: Tensor) -> Tensor:
    """Root mean square, from a sum of squares."""
    return ratio(squares, count).sqrt()


def rms_norm(hidden: Tensor) -> Tensor:
    """x / root mean square of x over the last axis, without a gain."""
    return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Which channels a block has, in the order of its features: positional, temporal, semantic."""

    semantic: bool
    positional: bool
    temporal: bool
    max_history: int

    @property
    def number(self) -> int:
        return self.semantic + self.positional + self.temporal


class FuxiBlock(nn.Module):
    """Adaptive multi-channel attention (AMS) and a feed-forward part (MFFN); paper 3.3 and 3.4.

    With x normalised by its root mean square, [u, v, q, k] = SiLU(project(x)). Each channel has a map over
    earlier positions, never a softmax: semantic SiLU(q k') / n per head, positional and temporal one trained
    number per distance, the same for all heads. Their outputs, side by side, are normalised and gated by u;
    then out, dropout and the residual; then the feed-forward part with its own residual.

    Args:
        project: maps (..., D) to the widths of u, v, q and k; a function of (tensor, context).
        out: maps channels x H x dv back to D; likewise.
        feed_forward: likewise, D to D; None leaves the second stage out.
    """

    def __init__(
        self,
        project: nn.Module,
        out: nn.Module,
        feed_forward: nn.Module | None,
        *,
        num_heads: int,
        head_dim: int,
        channels: Channels,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.channels = num_heads, head_dim, channels
        self.project, self.out, self.feed_forward = project, out, feed_forward
        self.dropout = nn.Dropout(dropout_rate)
        # Both directions of distance, as released; a causal model reads one.
        if channels.positional:
            self.by_place = nn.Parameter(torch.randn(2 * channels.max_history - 1) * 0.02)
        if channels.temporal:
            self.by_time = nn.Parameter(torch.randn(NUM_BUCKETS) * 0.02)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        mixed = self.dropout(self.attend(rms_norm(hidden), context))
        hidden = self.out(mixed, context) + hidden
        if self.feed_forward is None:
            return hidden
        return self.feed_forward(self.dropout(rms_norm(hidden)), context) + hidden

    def attend(self, hidden: Tensor, context: Context) -> Tensor:
        """(B, T, D) to (B, T, channels x H x dv)."""
        width = self.num_heads * self.head_dim
        number, length = self.channels.number, hidden.shape[1]
        sizes = [number * width, width] + [width, width] * self.channels.semantic
        gate, value, *pair = F.silu(self.project(hidden, context)).split(sizes, dim=-1)
        value = value.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        found = []
        if self.channels.positional:
            place = torch.arange(length, device=hidden.device)
            apart = place[None, :] - place[:, None] + self.channels.max_history - 1
            found.append(looked_up(self.by_place, apart).tril() @ value)
        if self.channels.temporal:
            found.append(looked_up(self.by_time, given(context.bucket)).tril()[:, None] @ value)
        if self.channels.semantic:
            query, key = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in pair)
            similar = F.silu(query @ key.transpose(2, 3)) / self.channels.max_history
            found.append(similar.tril() @ value)
        mixed = torch.cat([part.transpose(1, 2).flatten(2) for part in found], dim=-1)
        with torch.no_grad():
            context.channel_squares.append(mixed.square().unflatten(-1, (number, width)).mean(-1))
        return gate * rms_norm(mixed)


def fuxi_block(
    width: int,
    num_heads: int,
    head_dim: int,
    channels: Channels,
    dropout_rate: float,
    inner_dim: int | None,
    replace: dict | None = None,
) -> FuxiBlock:
    """A block; `replace` may hold functions that make other parts of the plain ones, by name.

    Initial weights as released: N(0, 0.02) for the input map, Xavier-uniform for the others.
    """
    replace = replace or {}
    inner = num_heads * head_dim

    def made(name: str, make: Callable[[], nn.Module]) -> nn.Module:
        return replace[name](make) if name in replace else make()

    def project() -> Projection:
        wide = (channels.number + 1 + 2 * channels.semantic) * inner
        linear = nn.Linear(width, wide, bias=False)
        nn.init.normal_(linear.weight, std=0.02)
        return Projection(linear)

    def out() -> Projection:
        linear = nn.Linear(channels.number * inner, width)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        return Projection(linear)

    return FuxiBlock(
        made("uvqk", project),
        made("out", out),
        None if inner_dim is None else made("ffn", lambda: GatedFeedForward(width, inner_dim)),
        num_heads=num_heads,
        head_dim=head_dim,
        channels=channels,
        dropout_rate=dropout_rate,
    )


class Projection(nn.Module):
    """A linear map as a part of a block."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.in_dim = linear.in_features

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        return self.linear(hidden)


class GatedFeedForward(nn.Module):
    """W_2 (SiLU(W_1 x) * W_3 x), no biases."""

    def __init__(self, width: int, inner_dim: int) -> None:
        super().__init__()
        self.in_dim = width
        self.gate = nn.Linear(width, inner_dim, bias=False)
        self.inner = nn.Linear(width, inner_dim, bias=False)
        self.inner_out = nn.Linear(inner_dim, width, bias=False)
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        return self.inner_out(F.silu(self.gate(hidden)) * self.inner(hidden))
