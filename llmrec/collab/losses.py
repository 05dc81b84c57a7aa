"""What sequence models are trained with: next-item losses over a tied or untied item table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.data.batches import Batch
from llmrec.item_softmax import item_cross_entropy


@dataclass(frozen=True)
class Pooled:
    """A figure of all passes together that is no mean over targets: sums of a pass, and what is made of them.

    Passes are added up first, so the figure does not depend on how rows are cut into passes.
    """

    sums: tuple[Tensor, ...]
    """Of one pass or of several, detached"""
    make: Callable[..., Tensor]
    """The figure, a scalar or (K,), from the sums"""

    def __add__(self, other: Pooled) -> Pooled:
        return Pooled(tuple(one + more for one, more in zip(self.sums, other.sums, strict=True)), self.make)

    def double(self) -> Pooled:
        """The same in float64."""
        return Pooled(tuple(value.double() for value in self.sums), self.make)

    def figure(self) -> Tensor:
        return self.make(*self.sums)


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """total / count, 0 where nothing was counted; for `Pooled`."""
    return total / count.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one forward pass costs, summed over the items it predicted."""

    total: Tensor
    """Scalar to differentiate: a sum over targets; a term of the whole batch enters times num_targets."""
    num_targets: int
    """Items predicted; 0 for a batch without any."""
    parts: Mapping[str, Tensor | Pooled] = field(default_factory=dict)
    """Detached quantities to log, summed over targets: scalars, or vectors (K,) with one entry per expert,
    interest or weight; or `Pooled` ones, which carry what they are divided by. If `total` holds more than the
    prediction loss, ``prediction_loss`` is that alone."""


def next_item_loss(
    name: str,
    query: Tensor,
    items: Tensor,
    batch: Batch,
    *,
    num_negatives: int = 0,
    temperature: float = 1.0,
    skip_row_0: bool = True,
) -> Loss:
    """Loss of naming the targets of a batch by inner products with the item table.

    Args:
        name: ``ce``: softmax over items 1..N; ``bce``: -log sigmoid(s+) - log(1 - sigmoid(s-)) with one
            negative per position, as SASRec was published; ``sampled_ce``: softmax over the target and
            num_negatives random items, which all positions of a row share (Klenitskiy and Vasilev,
            "Turning Dross Into Gold Loss", RecSys 2023).
        query: what the model knows after each position, (B, T, D).
        items: output table (N + 1, D).
        batch: whose targets to predict. Negatives are items outside the row's history and targets.
        num_negatives: for ``sampled_ce``.
        temperature: scores are divided by it.
        skip_row_0: False lets row 0 (padding) compete with the items in ``ce``, as some released codes do.
    """
    row, position = batch.target.nonzero(as_tuple=True)
    known = torch.cat([batch.item, batch.target], dim=1)
    target = batch.target[row, position]
    wanted_by = query[row, position] / temperature
    if name == "ce":
        total = item_cross_entropy(wanted_by, items, target, skip_row_0=skip_row_0)
    elif name == "bce":
        negative = draw_unseen(known, batch.target.shape[1], len(items) - 1)[row, position]
        wanted, unwanted = ((wanted_by * items[chosen]).sum(-1) for chosen in (target, negative))
        total = F.softplus(-wanted).sum() + F.softplus(unwanted).sum()
    elif name == "sampled_ce":
        negative = draw_unseen(known, num_negatives, len(items) - 1)
        unwanted = (query @ items[negative].transpose(1, 2))[row, position] / temperature
        wanted = (wanted_by * items[target]).sum(-1)
        total = (torch.cat([wanted[:, None], unwanted], dim=1).logsumexp(1) - wanted).sum()
    else:
        raise AssertionError(name)
    return Loss(total=total, num_targets=len(target))


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


def last_of(hidden: Tensor, history: Tensor) -> Tensor:
    """What stands at the last shown item of each row, (B, D), from (B, T, D) and int64 (B, T).

    Rows without any item give their first position.
    """
    last = (history != 0).sum(1).clamp(min=1) - 1
    return hidden[torch.arange(len(history), device=history.device), last]
