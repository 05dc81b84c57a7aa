"""Many prompts in few tokens: a user's history once, one copy of the response header per target.

Layouts of the same training targets (history h items, instruction I tokens, response R tokens):

- per_prefix: one row per target, [instruction][items 1..h][response]. The reference.
- packed: one row per user, [items 1..max h][response for h_1][response for h_2]..., where each copy
  sees the items up to its own h, itself, and no other copy, at the positions it would have had in
  its own prompt. The instruction is encoded once per micro-batch and shared as keys and values, or
  stands at the start of every row.

Both give every read-out the same value and gradient (specs: prefix packing is exact for causal
models), which tests/finetune/test_packing.py shows in float64.
Source: our derivation; related: prefix sharing (arXiv 2410.20305). The official release uses per_prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrec.artifacts import Targets

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

    @property
    def num_targets(self) -> int:
        return len(self.target)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Where the tokens of packed rows sit and what they see."""

    position: Tensor
    """int64 (G, Q) position ids"""
    visible: Tensor
    """bool (G, 1, Q, P + Q); the first P keys are a shared instruction, seen by all"""
    readout: Tensor
    """int64 (n,) index into the flattened (G * Q) tokens of each target's last response token"""


def group_rows(targets: Targets, layout: str) -> np.ndarray:
    """Row number of each target, int64 (E,), counted from 0.

    Packed: consecutive targets of one user and one window share a row. per_prefix: one row each.
    """
    if layout == "per_prefix":
        return np.arange(len(targets))
    new = np.ones(len(targets), dtype=bool)
    new[1:] = (targets.user[1:] != targets.user[:-1]) | (targets.start[1:] != targets.start[:-1])
    return np.cumsum(new) - 1


def pack(item: Tensor, targets: Targets, row: np.ndarray) -> PackedRows:
    """Lay out targets in rows.

    Args:
        item: int64 (n,) all interactions' items, on the device to compute on.
        targets: the targets of these rows, in the order of `group_rows`.
        row: int64 (E,) non-decreasing row number of each target.
    """
    device = item.device
    row = torch.as_tensor(row, device=device)
    start, stop, target = (
        torch.as_tensor(array, device=device) for array in (targets.start, targets.stop, targets.item)
    )
    _, row, copies = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
    first = torch.cumsum(copies, 0) - copies
    row_start = start[first]
    longest = torch.zeros_like(first).scatter_reduce_(0, row, stop - start, "amax")
    slot = torch.arange(max(int(longest.max()), 1), device=device)
    real = slot < longest[:, None]
    items = torch.where(real, item[(row_start[:, None] + slot).clamp_(max=len(item) - 1)], 0)
    history = torch.full((len(copies), int(copies.max())), -1, device=device)
    history[row, torch.arange(len(row), device=device) - first[row]] = stop - start
    return PackedRows(items=items, history=history, target=target)


def several_slots(rows: PackedRows, tokens_per_item: int) -> PackedRows:
    """The same rows with so many slots in place of every item's one."""
    if tokens_per_item == 1:
        return rows
    history = torch.where(rows.history >= 0, rows.history * tokens_per_item, -1)
    items = rows.items.repeat_interleave(tokens_per_item, dim=1)
    return PackedRows(items=items, history=history, target=rows.target)


def lay_out(rows: PackedRows, *, instruction: int, response: int, shared: bool) -> TokenLayout:
    """Positions, visibility and read-outs of packed rows.

    A row's tokens are [instruction, unless shared][T items][C * R response tokens]. Each token has an
    index (instruction <= 0, item j = 1..T), a limit (largest index it sees), a copy number (0 for
    instruction and items) and a place r inside its copy. A query sees a key of copy 0 with index <=
    its limit, and the keys of its own copy with place <= its own.

    Args:
        rows: what to lay out.
        instruction: I, number of instruction tokens.
        response: R, number of response tokens, >= 1.
        shared: whether the instruction is kept outside the rows, as P = I shared keys.
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
    position = torch.cat([(head + instruction - 1).expand(num_rows, -1), instruction + seen + place], dim=1)

    in_prompt = key_index <= limit[:, :, None]
    in_copy = (token_copy[:, None] == token_copy) & (token_place <= token_place[:, None]) & (token_copy > 0)
    visible = in_prompt | in_copy
    if shared:
        visible = torch.cat([visible.new_ones(*visible.shape[:2], instruction), visible], dim=2)
    last = len(head) + response * torch.arange(1, num_copies + 1, device=device) - 1
    flat = torch.arange(num_rows, device=device)[:, None] * len(token_copy) + last
    return TokenLayout(position=position, visible=visible[:, None], readout=flat[rows.history >= 0])


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
        min_slots: item slots a row has at least (the official collator: 2).
        tokens_per_item: tokens that stand for one item.
    """
    row = group_rows(targets, layout)
    num_rows = int(row[-1]) + 1 if len(row) else 0
    longest = np.zeros(num_rows, dtype=np.int64)
    np.maximum.at(longest, row, targets.stop - targets.start)
    items = tokens_per_item * int(np.maximum(longest, min_slots).sum())
    return items + response * len(targets) + instruction * (1 if shared else num_rows)
