"""What is trained on in which order: targets, optimiser steps, and how processes share a step.

Everything here is a function of settings, data, seed, epoch and step, so a run that was stopped goes on with
the very steps it would have had, on as many processes as there are then.
"""

from __future__ import annotations

import itertools

import numpy as np

from llmrec.data.batches import length_groups
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.packing import group_rows
from llmrec.interactions import Interactions, Targets


def training_targets(config: FinetuneConfig, data: Interactions) -> Targets:
    """The targets of one epoch, in user and time order.

    Raises:
        ConfigError: the settings leave none.
    """
    splits = ("train", "valid") if config.include_valid else ("train",)
    found = data.targets(*splits, max_history=config.max_history, max_targets=config.max_targets)
    kept = np.ones(len(found), dtype=bool)
    if config.targets == "last_only":
        kept[:-1] = found.user[1:] != found.user[:-1]
    if config.skip_empty:
        kept &= found.stop > found.start
    if not kept.any():
        raise ConfigError("finetune: these settings leave no target to train on")
    return found.take(np.flatnonzero(kept))


def train_counts(config: FinetuneConfig, data: Interactions) -> np.ndarray:
    """Interactions per item that the frequency-driven weights look at, int64 (N + 1,)."""
    counts = data.train_count
    if config.count_valid:
        valid = data.targets("valid").item
        counts = counts + np.bincount(valid, minlength=len(counts))
    return counts


def epoch_steps(
    targets: Targets,
    config: FinetuneConfig,
    generator: np.random.Generator,
    response: int = 1,
    tokens_per_item: int = 1,
) -> list[np.ndarray]:
    """Which targets each optimiser step of one epoch holds.

    Users (packed) or single targets (per_prefix) are shuffled and laid end to end. With batch_by='targets'
    every `batch_size` targets make a step, so a user may straddle two steps; else a step ends with the user
    that fills it.

    Args:
        targets: all targets of an epoch.
        config: settings.
        generator: of the order.
        response: R, for batch_by='tokens'.
        tokens_per_item: the same.
    """
    row = group_rows(targets, config.layout)
    num_rows = int(row[-1]) + 1
    place = generator.permutation(num_rows)
    order = np.argsort(place[row], kind="stable")
    if config.batch_by == "targets":
        return np.split(order, range(config.batch_size, len(order), config.batch_size))
    if config.batch_by == "users":
        step_of_place = np.arange(num_rows) // config.batch_size
    else:
        length = np.empty(num_rows, dtype=np.int64)
        length[place] = row_lengths(targets, row, response, tokens_per_item)
        step_of_place = (np.cumsum(length) - length) // config.batch_size
    step = step_of_place[place[row[order]]]
    return np.split(order, np.flatnonzero(step[1:] != step[:-1]) + 1)


def steps_of_epoch(
    targets: Targets, config: FinetuneConfig, epoch: int, response: int = 1, tokens_per_item: int = 1
) -> list[np.ndarray]:
    """`epoch_steps` of an epoch, counted from 1."""
    generator = np.random.default_rng((config.seed, epoch))
    return epoch_steps(targets, config, generator, response, tokens_per_item)


def row_lengths(targets: Targets, row: np.ndarray, response: int, tokens_per_item: int = 1) -> np.ndarray:
    """Tokens of each row without instruction: its longest history and its response copies."""
    longest = np.zeros(int(row[-1]) + 1, dtype=np.int64)
    np.maximum.at(longest, row, targets.stop - targets.start)
    return tokens_per_item * np.maximum(longest, 1) + response * np.bincount(row)


def share_rows(length: np.ndarray, world: int) -> list[np.ndarray]:
    """Rows of each process, so that their total lengths are close: longest first, to and fro."""
    order = np.argsort(-length, kind="stable")
    place = np.arange(len(order)) % (2 * world)
    owner = np.minimum(place, 2 * world - 1 - place)
    return [order[owner == rank] for rank in range(world)]


def micro_batches(length: np.ndarray, max_tokens: int, *, stream: bool) -> list[list[np.ndarray]]:
    """Cut rows into forward passes of at most max_tokens tokens (a single row is never cut).

    Args:
        length: tokens of each row, (n,).
        max_tokens: tokens of one pass, padding included.
        stream: rows stand one behind the other; else in groups of similar length, padded to the longest.

    Returns:
        Per pass, its groups of indices into `length`; streams have one group.
    """
    if not len(length):
        return []
    if stream:
        ends, cuts = np.cumsum(length), [0]
        while cuts[-1] < len(length):
            before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
            fits = int(np.searchsorted(ends, before + max_tokens, side="right"))
            cuts.append(max(fits, cuts[-1] + 1))
        return [[np.arange(*cut)] for cut in itertools.pairwise(cuts)]
    passes: list[list[np.ndarray]] = []
    cells = max_tokens
    for group in length_groups(length, max_tokens):
        size = len(group) * int(length[group].max())
        if cells + size > max_tokens:
            passes.append([])
            cells = 0
        passes[-1].append(group)
        cells += size
    return passes


def sampled_items(target: np.ndarray, num_items: int, seed: tuple[int, ...]) -> np.ndarray:
    """For each target one of the other items 1..N, all equally likely, int64 (n,)."""
    drawn = np.random.default_rng(seed).integers(1, max(num_items, 2), len(target))
    return drawn + (drawn >= target)
