"""Ranks of targets among the whole catalogue, by counting, in blocks that processes share.

Blocks do not depend on the number of processes and every number is computed by one of them, so a
sharded result equals the single-process one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrec import distributed, launched
from llmrec.data.batches import pad_histories, sent
from llmrec.errors import TrainingError
from llmrec.interactions import Interactions, Targets

MOST_SCORES = 1 << 26
"""Scores held at once (256 MiB)."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A method to be ranked: histories in, scores of the whole catalogue out."""

    name: str
    score: Callable[..., Tensor]
    """history int64 (B, T), right-padded with 0 -> float (B, N + 1); column 0 means nothing"""
    max_history: int | None = None
    """Most recent items it is shown; None: all of them."""
    max_items: int | None = None
    """Most items of histories in one call, all together; None: no limit."""
    uses_time: bool = False
    """Whether `score` takes the timestamps of the history, int64 (B, T), as its second argument."""
    uses_request_time: bool = False
    """Whether it takes those of the items that follow, the target's at last, int64 (B, T), as its third."""


def popularity(data: Interactions) -> Scorer:
    """The same scores for everyone: interactions in the train split."""
    count = torch.from_numpy(data.train_count).float().to(distributed.device())
    return Scorer(name="popularity", score=lambda history: count.expand(len(history), -1))


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Where the targets stand, in the order of the targets."""

    rank: np.ndarray
    """float64 (E,), 0-based, ties count half"""
    rank_seen_kept: np.ndarray
    """float64 (E,), the same with the user's seen items as candidates"""
    top: np.ndarray
    """int64 (E, k) item ids, best first; 0 where fewer items are left"""


def rank_targets(scores: Tensor, target: Tensor, seen: Tensor | None = None) -> Tensor:
    """0-based ranks of the targets; float64 (B,).

    Args:
        scores: (B, N + 1); column 0 never counts.
        target: int64 (B,), items 1..N; a target is never masked.
        seen: int64 (B, T) items to leave out, 0 = padding; repeats do no harm.

    Raises:
        TrainingError: if a score is NaN.
    """
    own = scores.gather(1, target[:, None])
    if torch.isnan(scores[:, 1:].sum(dim=1)).any() and torch.isnan(scores[:, 1:]).any():
        raise TrainingError("a method gave NaN scores; its training went wrong")
    # Sums of a float buffer are several times as fast as sums of booleans, and exact below 2^24 items.
    exact = torch.float32 if scores.shape[1] < 2**24 else torch.float64
    buffer = torch.empty_like(scores, dtype=exact)
    above = torch.gt(scores, own, out=buffer).sum(dim=1).double()
    not_below = torch.ge(scores, own, out=buffer).sum(dim=1).double()
    # Half of the tied ones; the target, which ties with itself, and column 0 do not count.
    ahead = (above + not_below - 1) / 2
    padding = scores[:, :1]
    ahead -= ((padding > own).double() + (padding >= own).double())[:, 0] / 2
    return ahead if seen is None else ahead - seen_ahead(scores, target, seen)


def seen_ahead(scores: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """What distinct seen items, targets aside, add to the ranks of `rank_targets`; float64 (B,)."""
    own = scores.gather(1, target[:, None])
    seen = seen.sort(dim=1).values
    counts = (seen > 0) & (seen != target[:, None])
    counts[:, 1:] &= seen[:, 1:] != seen[:, :-1]
    found = scores.gather(1, seen)
    ahead = (found > own).double() + 0.5 * (found == own).double()
    return (ahead * counts).sum(dim=1)


def top_items(scores: Tensor, k: int, seen: Tensor | None = None) -> Tensor:
    """Best items int64 (B, k), seen ones left out; 0 where fewer are left."""
    masked = scores.clone()
    if seen is not None:
        masked.scatter_(1, seen, -torch.inf)
    masked[:, 0] = -torch.inf
    best = masked.topk(min(k, masked.shape[1] - 1), dim=1)
    found = torch.where(best.values == -torch.inf, 0, best.indices)
    return torch.nn.functional.pad(found, (0, k - found.shape[1]))


def rank_users(
    scorer: Scorer,
    data: Interactions,
    targets: Targets,
    *,
    block_size: int = 256,
    mask_seen: bool = True,
    top_k: int = 0,
    shard: bool = False,
) -> Ranking:
    """Rank every target by a scorer.

    Args:
        scorer: the method.
        data: where the histories are.
        targets: what to rank; the whole history of a target is masked, also where the scorer is shown
            less of it.
        block_size: most targets scored at once (fewer in very large catalogues, so that memory does not grow
            with both); histories of similar length stand together.
        mask_seen: whether `rank` and `top` leave out items of the history.
        top_k: items to keep per target.
        shard: share the blocks over processes; every process must call, and gets the whole result.
            Without it no process talks to another.
    """
    device = distributed.device()
    block_size = max(1, min(block_size, MOST_SCORES // (data.num_items + 1)))
    blocks = blocks_of(targets.stop - targets.start, block_size, scorer)
    mine: list[np.ndarray | None] = list(blocks)
    if shard:
        world = launched.world_size()
        mine = [*blocks[launched.rank() :: world]]
        # Where weights are sharded, all processes must score equally often.
        mine += [None] * (-(-len(blocks) // world) - len(mine))
    size = len(targets)
    result = {
        "rank": torch.zeros(size, dtype=torch.float64, device=device),
        "rank_seen_kept": torch.zeros(size, dtype=torch.float64, device=device),
        "top": torch.zeros(size, top_k, dtype=torch.int64, device=device),
        "times": torch.zeros(size, dtype=torch.int64, device=device),
    }
    item = torch.from_numpy(data.item).to(device)
    time = torch.from_numpy(data.timestamp).to(device) if scorer.uses_time else None
    with torch.no_grad():
        for own in mine:
            block = blocks[0] if own is None else own
            out = (
                {name: torch.zeros_like(values) for name, values in result.items()} if own is None else result
            )
            _rank_block(scorer, item, time, targets.take(block), block, mask_seen, top_k, out)
    if shard and launched.world_size() > 1:
        for values in result.values():
            torch.distributed.all_reduce(values)
    times = result.pop("times")
    assert bool((times == 1).all()), "every target must be ranked exactly once"
    return Ranking(**{name: values.cpu().numpy() for name, values in result.items()})


def blocks_of(length: np.ndarray, block_size: int, scorer: Scorer) -> list[np.ndarray]:
    """Targets scored together, shortest histories first, as indices into length.

    Args:
        length: of the histories, int64 (E,).
        block_size: most targets of a block.
        scorer: whose limits hold; a block of one history may exceed them.
    """
    order = np.argsort(length, kind="stable")
    shown = length[order] if scorer.max_history is None else np.minimum(length[order], scorer.max_history)
    blocks, first = [], 0
    while first < len(order):
        last = min(first + block_size, len(order))
        if scorer.max_items is not None:
            # Side by side, histories are padded to the longest, which is the last.
            room = shown[first:last] * np.arange(1, last - first + 1) <= scorer.max_items
            last = first + max(1, int(room.sum()))
        blocks.append(order[first:last])
        first = last
    return blocks


def _rank_block(
    scorer: Scorer,
    item: Tensor,
    time: Tensor | None,
    targets: Targets,
    place: np.ndarray,
    mask_seen: bool,
    top_k: int,
    result: dict[str, Tensor],
) -> None:
    start, stop, target, row = (
        sent(torch.from_numpy(array), item.device)
        for array in (targets.start, targets.stop, targets.item, place)
    )
    seen = pad_histories(item, start, stop)
    first, shown = start, seen
    if scorer.max_history is not None and seen.shape[1] > scorer.max_history:
        first = torch.maximum(start, stop - scorer.max_history)
        shown = pad_histories(item, first, stop)
    times = [] if time is None else [pad_histories(time, first, stop)]
    if time is not None and scorer.uses_request_time:
        times.append(pad_histories(time, first + 1, stop + 1))  # a target stands behind its history
    scores = scorer.score(shown, *times)
    kept = rank_targets(scores, target)
    masked = kept - seen_ahead(scores, target, seen) if mask_seen else kept
    result["rank"][row] = masked
    result["rank_seen_kept"][row] = kept
    if top_k:
        others = torch.where(seen == target[:, None], 0, seen)  # a target is never masked
        result["top"][row] = top_items(scores, top_k, others if mask_seen else None)
    result["times"][row] += 1
