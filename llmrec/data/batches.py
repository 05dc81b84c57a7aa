"""Sequences on the device: padding by index arithmetic, and batches of similar length.

Histories are short (Beauty: median 6, at most 200), so a step that pads every user to the longest
one computes mostly padding. `length_groups` cuts a step into a few groups instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Histories and what to predict from them: what a sequence model trains on in one forward pass."""

    item: Tensor
    """int64 (B, T), shown items, padded on the right with 0"""
    target: Tensor
    """int64 (B, T), the item to predict after seeing item[:, : t + 1]; 0 where there is none"""
    time: Tensor
    """int64 (B, T), timestamps of the shown items as the data gives them, 0 on padding"""
    next_time: Tensor
    """int64 (B, T), those of the items that follow them, the last of which is not shown; 0 on padding"""
    step: int = 0
    """Optimiser steps taken before this one."""
    epoch: int = 1
    """Pass over the data that this batch belongs to, from 1."""


def sent(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, on its way while this process goes on.

    What goes to a GPU goes by way of pinned memory: a copy from ordinary memory first waits for all the work
    that the GPU was given before.
    """
    if device.type == "cuda" and value.device.type == "cpu" and torch.cuda.is_available():
        value = value.pin_memory()
    return value.to(device, non_blocking=device.type == "cuda")


def pad_histories(item: Tensor, start: Tensor, stop: Tensor, longest: int | None = None) -> Tensor:
    """The ranges ``item[start[b]:stop[b]]`` as rows, padded on the right with 0.

    Args:
        item: item ids (or their timestamps) one after another, int64 (n,).
        start: first index of each range, int64 (B,).
        stop: index after the last of each range, int64 (B,).
        longest: T, if that is known; else it is read off the device, which waits for a GPU.

    Returns:
        int64 (B, T), T the longest range but at least 1.
    """
    length = stop - start
    if longest is None:
        longest = max(int(length.max()), 1) if len(length) else 1
    step = torch.arange(longest, device=item.device)
    valid = step < length[:, None]
    if not len(item):
        return torch.zeros(valid.shape, dtype=torch.int64, device=item.device)
    index = torch.where(valid, start[:, None] + step, 0)
    return torch.where(valid, item[index], 0)


def length_groups(
    length: Tensor | np.ndarray, max_cells: int, *, overhead_cells: int = 1024
) -> list[np.ndarray]:
    """Cut sequences into groups of similar length so that the padded work is least.

    A group of B sequences, the longest of length T, costs B * T cells plus a fixed overhead. The
    cut of the sequences, sorted by length, with the least total cost is found exactly; groups of
    more than max_cells are then cut further to bound memory.

    Args:
        length: lengths of the sequences, (B,).
        max_cells: most cells of one group, padding included (one sequence is never cut).
        overhead_cells: cost of one more group, in cells.

    Returns:
        Index arrays int64, together a permutation of 0..B-1, shortest sequences first.
    """
    length = np.asarray(length)
    order = np.argsort(length, kind="stable")
    value, rows = np.unique(length, return_counts=True)
    bound = np.concatenate([[0], np.cumsum(rows)])
    # best[k]: least cost of the k shortest distinct lengths; cut[k]: where their last group starts
    best, cut = np.zeros(len(value) + 1), np.zeros(len(value) + 1, dtype=np.int64)
    for k in range(1, len(value) + 1):
        cost = best[:k] + (bound[k] - bound[:k]) * max(int(value[k - 1]), 1) + overhead_cells
        cut[k] = cost.argmin()
        best[k] = cost[cut[k]]
    groups: list[np.ndarray] = []
    k = len(value)
    while k:
        group = order[bound[cut[k]] : bound[k]]
        size = max(max_cells // max(int(value[k - 1]), 1), 1)
        groups[:0] = [group[first : first + size] for first in range(0, len(group), size)]
        k = cut[k]
    return groups
