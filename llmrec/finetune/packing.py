"""Many prompts in few tokens: a user's history once, one copy of the response header per target.

Layouts of the same training targets (history h items, instruction I tokens, response R tokens):

- per_prefix: one row per target, [instruction][items 1..h][response]. The reference.
- packed: one row per user, [items 1..max h][response for h_1][response for h_2]..., where each copy
  sees the items up to its own h, itself, and no other copy, at the positions it would have had in
  its own prompt. The instruction is encoded once per micro-batch and shared as keys and values, or
  stands at the start of every row.

Both give every read-out the same value and gradient, since what a causal model knows after a prefix does not
depend on what follows; tests/finetune/test_packing.py shows it in float64.

The tokens of the rows lie side by side, padded to the longest row of a group (`lay_out`; suits CPUs), or one
behind the other in a single stream with the instruction once in front (`lay_out_stream`; suits GPUs).

Source: our derivation; related: prefix sharing (arXiv 2410.20305). The official release uses per_prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrec.data.batches import sent
from llmrec.interactions import Targets

BLOCK = 128
"""Streams are padded to a multiple of so many tokens, the blocks of FlexAttention's masks."""

RESPONSE_INDEX = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """One forward pass: G rows of T item slots and C response copies each.

    A row is one history window with some of its targets (packed), or one target (per_prefix).
    """

    items: Tensor
    """int64 (G, T) item ids, right-padded with 0"""
    history: Tensor
    """int64 (G, C) items each copy sees; -1 marks a slot without a target"""
    target: Tensor
    """int64 (n,) item to predict of each real copy, row by row"""
    negative: Tensor | None = None
    """int64 (n,) an item that is not the target, for losses that sample one"""


class Movable:
    """Tensors that go to a device together."""

    def to(self, device: torch.device) -> Any:
        """The same on another device."""
        moved = {name: sent(value, device) for name, value in vars(self).items()}
        return type(self)(**moved)


@dataclass(frozen=True, kw_only=True)
class TokenLayout(Movable):
    """Where the tokens of packed rows sit and what they see."""

    position: Tensor
    """int64 (G, Q) position ids"""
    visible: Tensor
    """bool (G, 1, Q, P + Q); the first P keys are a shared instruction, seen by all"""
    readout: Tensor
    """int64 (n,) index into the flattened (G * Q) tokens of each target's last response token, or without
    response tokens of its last item; G * Q stands for the last token of a shared instruction"""


@dataclass(frozen=True, kw_only=True)
class TokenStream(Movable):
    """The tokens of many rows one behind the other, S in all, the instruction first and padding last.

    What a token sees lies in three intervals of the stream: the instruction, items of its own row, and what
    is its own up to itself. All tensors are int64 (S,) unless said otherwise.
    """

    source: Tensor
    """row of the table [response; instruction; one row for padding; item tokens] that embeds the token"""
    position: Tensor
    shared: Tensor
    """it sees the tokens before this one"""
    first: Tensor
    """and those from this one on"""
    stop: Tensor
    """to before this one"""
    own: Tensor
    """and those from this one to itself"""
    readout: Tensor
    """(n,) place in the stream of each target's read-out"""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the token at `query` sees the one at `key`; bool of their common shape."""
        in_row = (key >= self.first[query]) & (key < self.stop[query])
        return (key < self.shared[query]) | in_row | ((key >= self.own[query]) & (key <= query))

    def visible(self) -> Tensor:
        """`sees` for all pairs, bool (1, 1, S, S)."""
        token = torch.arange(len(self.source), device=self.source.device)
        return self.sees(token[:, None], token[None, :])[None, None]

    def visible_blocks(self) -> Tensor:
        """Whether any token of a block sees any of another, bool (S / BLOCK, S / BLOCK).

        Exact, without looking at pairs of tokens: each interval is marked where it begins and behind its end.
        """
        token = torch.arange(len(self.source), device=self.source.device)
        blocks = len(token) // BLOCK
        begin = torch.stack([torch.zeros_like(token), self.first, self.own])
        end = torch.stack([self.shared, self.stop, token + 1])
        # Empty intervals begin and end at one mark.
        last = torch.where(end > begin, (end - 1) // BLOCK + 1, begin // BLOCK)
        row = (token // BLOCK).expand(3, -1) * (blocks + 1)
        marks = torch.zeros(blocks * (blocks + 1), dtype=torch.int32, device=token.device)
        one = marks.new_ones(1).expand(begin.numel())
        marks.index_add_(0, (row + begin // BLOCK).flatten(), one)
        marks.index_add_(0, (row + last).flatten(), -one)
        return marks.view(blocks, blocks + 1).cumsum(1)[:, :-1] > 0


def group_rows(targets: Targets, layout: str, min_slots: int = 0) -> np.ndarray:
    """Row number of each target, int64 (E,), counted from 0.

    Packed: consecutive targets of one user and one window share a row. per_prefix: one row each. Histories of
    1 to min_slots - 1 items start later than longer ones (see `lay_out`), so a row ends with one.
    """
    if layout == "per_prefix":
        return np.arange(len(targets))
    new = np.ones(len(targets), dtype=bool)
    history = targets.stop - targets.start
    shifted = (history[:-1] > 0) & (history[:-1] < min_slots) & (history[1:] != history[:-1])
    new[1:] = (targets.user[1:] != targets.user[:-1]) | (targets.start[1:] != targets.start[:-1]) | shifted
    return np.cumsum(new) - 1


def pack(item: Tensor, targets: Targets, row: np.ndarray, negative: np.ndarray | None = None) -> PackedRows:
    """Lay out targets in rows.

    Args:
        item: int64 (n,) all interactions' items, on the device to compute on.
        targets: the targets of these rows, in the order of `group_rows`.
        row: int64 (E,) non-decreasing row number of each target.
        negative: int64 (E,) a sampled item for each target.
    """
    device = item.device
    start, stop, target = (
        torch.as_tensor(array, device=device) for array in (targets.start, targets.stop, targets.item)
    )
    _, number, copies = torch.unique_consecutive(
        torch.as_tensor(row, device=device), return_inverse=True, return_counts=True
    )
    first = torch.cumsum(copies, 0) - copies
    row_start = start[first]
    longest = torch.zeros_like(first).scatter_reduce_(0, number, stop - start, "amax")
    slot = torch.arange(max(int(longest.max()), 1), device=device)
    real = slot < longest[:, None]
    items = torch.where(real, item[(row_start[:, None] + slot).clamp_(max=len(item) - 1)], 0)
    history = torch.full((len(copies), int(copies.max())), -1, device=device)
    history[number, torch.arange(len(number), device=device) - first[number]] = stop - start
    sampled = None if negative is None else torch.as_tensor(negative, device=device)
    return PackedRows(items=items, history=history, target=target, negative=sampled)


def several_slots(rows: PackedRows, tokens_per_item: int) -> PackedRows:
    """The same rows with so many slots in place of every item's one."""
    if tokens_per_item == 1:
        return rows
    history = torch.where(rows.history >= 0, rows.history * tokens_per_item, -1)
    items = rows.items.repeat_interleave(tokens_per_item, dim=1)
    return PackedRows(items=items, history=history, target=rows.target, negative=rows.negative)


def lay_out(
    rows: PackedRows, *, instruction: int, response: int, shared: bool, min_slots: int = 0
) -> TokenLayout:
    """Positions, visibility and read-outs of packed rows.

    A row's tokens are [instruction, unless shared][T items][C * R response tokens]. Each token has an
    index (instruction <= 0, item j = 1..T), a limit (largest index it sees), a copy number (0 for
    instruction and items) and a place r inside its copy. A query sees a key of copy 0 with index <=
    its limit, and the keys of its own copy with place <= its own.

    Args:
        rows: what to lay out.
        instruction: I, number of instruction tokens.
        response: R, number of response tokens; 0 reads out at the last item.
        shared: whether the instruction is kept outside the rows, as P = I shared keys.
        min_slots: the response stands behind so many slots at least; fewer items stand right before it,
            and nothing sees the empty slots (the official collator: 2).
    """
    device = rows.items.device
    num_rows, num_slots = rows.items.shape
    num_copies = rows.history.shape[1]
    head = torch.arange(1 if shared else 1 - instruction, num_slots + 1, device=device)
    place = torch.arange(response, device=device).repeat(num_copies)
    copy = torch.arange(1, num_copies + 1, device=device).repeat_interleave(response)
    seen = rows.history.clamp(min=0).repeat_interleave(response, dim=1)

    zeros = torch.zeros_like(head)
    key_index = torch.cat([head, torch.full_like(place, RESPONSE_INDEX)])
    token_copy = torch.cat([zeros, copy])
    token_place = torch.cat([zeros, place])
    limit = torch.cat([head.expand(num_rows, -1), seen], dim=1)
    shift = (head > 0) * item_shift(rows, min_slots)[:, None]
    before = seen.clamp(min=min_slots)
    position = torch.cat([head + instruction - 1 + shift, instruction + before + place], dim=1)

    in_prompt = key_index <= limit[:, :, None]
    in_copy = (token_copy[:, None] == token_copy) & (token_place <= token_place[:, None]) & (token_copy > 0)
    visible = in_prompt | in_copy
    if shared:
        visible = torch.cat([visible.new_ones(*visible.shape[:2], instruction), visible], dim=2)
    width = len(token_copy)
    if response:
        last = len(head) + response * torch.arange(1, num_copies + 1, device=device) - 1
        last = last.expand(num_rows, -1)
    else:
        last = rows.history + len(head) - num_slots - 1
    flat = torch.arange(num_rows, device=device)[:, None] * width + last
    flat = torch.where(last < 0, num_rows * width, flat)
    return TokenLayout(position=position, visible=visible[:, None], readout=flat[rows.history >= 0])


def item_shift(rows: PackedRows, min_slots: int) -> Tensor:
    """How much later a row's items stand because they are fewer than min_slots, int64 (G,)."""
    return (min_slots - rows.history.amax(dim=1)).clamp(min=0)


def lay_out_stream(
    rows: PackedRows,
    *,
    instruction: int,
    response: int,
    min_slots: int = 0,
    tokens_per_item: int = 1,
    bucketed: bool = False,
) -> TokenStream:
    """The tokens of packed rows as one stream: what `lay_out` says, without padding between rows.

    Args:
        rows: what to lay out, one slot per item.
        instruction: I; it stands once in front and all rows see it.
        response: R; 0 reads out at the last item.
        min_slots: see `lay_out`.
        tokens_per_item: tokens that stand for one item.
        bucketed: pad to `stream_bucket`, so that few different lengths occur.
    """
    device = rows.items.device
    rows, min_slots = several_slots(rows, tokens_per_item), min_slots * tokens_per_item
    num_rows, num_slots = rows.items.shape
    num_copies = rows.history.shape[1]
    longest = rows.history.amax(dim=1)
    length = longest + response * (rows.history >= 0).sum(dim=1)
    start = (instruction + torch.cumsum(length, 0) - length)[:, None]
    slot = torch.arange(1, num_slots + 1, device=device)
    place = torch.arange(response, device=device).repeat(num_copies)
    before = response * torch.arange(num_copies, device=device).repeat_interleave(response)
    history = rows.history.repeat_interleave(response, dim=1)
    seen = history.clamp(min=0)
    items_at = response + instruction + 1
    real = torch.cat([slot <= longest[:, None], history >= 0], dim=1)

    def both(of_items: Tensor, of_copies: Tensor) -> Tensor:
        """A field of the tokens of all rows, from what broadcasts to (G, T) and to (G, C * R)."""
        parts = [of_items.expand(num_rows, num_slots), of_copies.expand(num_rows, len(place))]
        return torch.cat(parts, dim=1)[real]

    shift = item_shift(rows, min_slots)[:, None]
    head = torch.arange(instruction, device=device)
    none = torch.zeros_like(head)
    everything = torch.full_like(slot[:1], instruction)
    parts = {
        "source": (
            response + head,
            both(items_at + rows.items * tokens_per_item + (slot - 1) % tokens_per_item, place),
        ),
        "position": (
            head,
            both(slot + instruction - 1 + shift, instruction + seen.clamp(min=min_slots) + place),
        ),
        "shared": (none, both(everything, everything)),
        "first": (none, both(start, start)),
        "stop": (none, both(start + slot, start + seen)),
        "own": (none, both(start + slot - 1, start + longest[:, None] + before)),
    }
    joined = {name: torch.cat(pair) for name, pair in parts.items()}
    if bucketed:
        joined = to_bucket(joined, instruction=instruction, response=response)
    if response:
        ordinal = torch.arange(1, num_copies + 1, device=device)
        readout = start + longest[:, None] + response * ordinal - 1
    else:
        readout = torch.where(rows.history > 0, start + rows.history - 1, instruction - 1)
    return TokenStream(**joined, readout=readout[rows.history >= 0])


def to_bucket(fields: dict[str, Tensor], *, instruction: int, response: int) -> dict[str, Tensor]:
    """Fields of a `TokenStream`, (S,) each, with padding up to `stream_bucket`, which sees itself alone."""
    size = len(fields["source"])
    empty = torch.arange(size, stream_bucket(size), device=fields["source"].device)
    zero = torch.zeros_like(empty)
    padding = {"source": zero + response + instruction, "own": empty}
    return {name: torch.cat([values, padding.get(name, zero)]) for name, values in fields.items()}


def stream_bucket(size: int) -> int:
    """The length a stream is padded to: at most an eighth more, two or more times `BLOCK`."""
    step = max(BLOCK, 1 << max((size - 1).bit_length() - 4, 0))
    return max(2 * BLOCK, -(-size // step) * step)


def count_tokens(
    targets: Targets,
    *,
    instruction: int,
    response: int,
    layout: str,
    shared: bool,
    min_slots: int = 0,
    tokens_per_item: int = 1,
) -> int:
    """Tokens a forward and backward pass over the targets costs, without padding.

    Args:
        targets: one micro-batch (a shared instruction is counted once).
        instruction: I.
        response: R.
        layout: 'packed' or 'per_prefix'.
        shared: whether the instruction is shared.
        min_slots: see `lay_out`; a packed row has no empty slots, a prompt of its own pads to so many.
        tokens_per_item: tokens that stand for one item.
    """
    row = group_rows(targets, layout, min_slots)
    num_rows = int(row[-1]) + 1 if len(row) else 0
    longest = np.zeros(num_rows, dtype=np.int64)
    np.maximum.at(longest, row, targets.stop - targets.start)
    empty = min_slots if layout == "per_prefix" else 0
    items = tokens_per_item * int(np.maximum(longest, empty).sum())
    return items + response * len(targets) + instruction * (1 if shared else num_rows)
