"""Users' sequences as the rows that a sequence model is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrec.data.batches import Batch, length_groups, pad_histories, sent
from llmrec.errors import DataError
from llmrec.interactions import Sequences

MAX_CELLS = {"cpu": 1 << 14, "gpu": 1 << 18}
"""Most positions in one forward pass, padding included."""

OVERHEAD_CELLS = {"cpu": 512, "gpu": 1 << 15}
"""What one more forward pass of a step costs, in positions; on the CPU as measured on Beauty."""


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Sequences to learn from on the device, cut into rows; users with nothing to predict are left out.

    Row r shows the items ``start[r] .. stop[r] - 2`` and predicts those from ``first_target[r]`` to
    ``stop[r] - 1``: with layout ``positions`` all but the first, with ``prefixes`` the last alone.

    With windows ``last`` both layouts hold the same targets, the last max_history of every user, each after
    what the row shows before it. With ``all``, every item but a user's first is a target: with ``positions``
    in rows of max_history targets, cut from the end; with ``prefixes`` after its max_history last items.
    """

    item: Tensor
    """int64 (n,)"""
    time: Tensor
    """int64 (n,)"""
    start: Tensor
    """int64 (rows,)"""
    stop: Tensor
    """int64 (rows,)"""
    first_target: Tensor
    """int64 (rows,)"""
    length: np.ndarray
    """int64 (rows,), items shown, at least 1"""
    offset: np.ndarray
    """int64 (users + 1,), the rows of user u are offset[u] .. offset[u + 1] - 1"""
    num_targets: int
    """Next items predicted in one epoch."""
    layout: str
    """``positions`` or ``prefixes``."""
    places_per_item: int = 1
    """Positions that an item takes in the model, for the size of a pass."""

    @classmethod
    def of(
        cls,
        sequences: Sequences,
        max_history: int,
        layout: str,
        device: torch.device,
        windows: str = "last",
        places_per_item: int = 1,
    ) -> TrainingRows:
        offset, item, time = sequences
        keep = offset[1:] - offset[:-1] >= 2
        if not keep.any():
            raise DataError(
                f"train_collab: none of {len(offset) - 1} users has two items in the train split, so there "
                "is no next item to learn from; give longer histories or filter less in prepare_data"
            )
        begin, stop = offset[:-1][keep], offset[1:][keep]
        if windows == "last":
            begin = np.maximum(begin, stop - max_history - 1)
        targets = stop - begin - 1
        if layout == "positions":
            rows = -(-targets // max_history)
            stop = np.repeat(stop, rows) - max_history * (np.repeat(rows, rows) - 1 - place_in_group(rows))
            start = np.maximum(np.repeat(begin, rows), stop - max_history - 1)
            first_target = start + 1
        else:
            rows = targets
            first_target = np.repeat(begin, rows) + 1 + place_in_group(rows)
            stop = first_target + 1
            start = np.maximum(np.repeat(begin, rows), first_target - max_history)
        arrays = {"item": item, "time": time, "start": start, "stop": stop, "first_target": first_target}
        return cls(
            **{name: torch.as_tensor(array, device=device) for name, array in arrays.items()},
            length=stop - start - 1,
            offset=np.concatenate([[0], np.cumsum(rows)]),
            num_targets=int(targets.sum()),
            layout=layout,
            places_per_item=places_per_item,
        )

    @property
    def num_users(self) -> int:
        return len(self.offset) - 1

    @property
    def num_items(self) -> int:
        """Different items that are shown or predicted."""
        change = torch.zeros(len(self.item) + 1, dtype=torch.int64, device=self.item.device)
        change.index_add_(0, self.start, torch.ones_like(self.start))
        change.index_add_(0, self.stop, -torch.ones_like(self.stop))
        return len(self.item[change.cumsum(0)[:-1] > 0].unique())

    @property
    def num_rows(self) -> int:
        return len(self.length)

    def rows_of(self, users: np.ndarray) -> np.ndarray:
        """All rows of some users, in the users' order."""
        count = self.offset[users + 1] - self.offset[users]
        return np.repeat(self.offset[users], count) + place_in_group(count)

    def steps(self, batch_by: str, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The rows of every optimiser step of an epoch, in a new order.

        Args:
            batch_by: ``users``: all rows of batch_size users; ``targets``: rows, each by itself, until they
                predict batch_size items (a row is never cut, so a long one may overshoot).
            batch_size: see there.
            rng: where the order comes from.
        """
        if batch_by == "users":
            order = rng.permutation(self.num_users)
            steps = np.split(order, range(batch_size, len(order), batch_size))
            return [self.rows_of(users) for users in steps]
        order = rng.permutation(self.num_rows)
        targets = np.ones_like(order) if self.layout == "prefixes" else self.length[order]
        step = (np.cumsum(targets) - targets) // batch_size
        return np.split(order, np.flatnonzero(np.diff(step)) + 1)

    def batches(self, rows: np.ndarray, *, step: int = 0, epoch: int = 1) -> Iterator[Batch]:
        """Some rows in batches of similar length."""
        kind = "cpu" if self.item.device.type == "cpu" else "gpu"
        most, overhead = (cells[kind] // self.places_per_item for cells in (MAX_CELLS, OVERHEAD_CELLS))
        for group in length_groups(self.length[rows], most, overhead_cells=overhead):
            chosen = sent(torch.from_numpy(rows[group]), self.item.device)
            start, stop = self.start[chosen], self.stop[chosen]
            longest = int(self.length[rows[group]].max())
            sequence = pad_histories(self.item, start, stop, longest + 1)
            place = torch.arange(1, sequence.shape[1], device=start.device)
            wanted = start[:, None] + place >= self.first_target[chosen, None]
            target = torch.where(wanted, sequence[:, 1:], 0)
            followed = start[:, None] + place < stop[:, None]
            times = pad_histories(self.time, start, stop, longest + 1)
            yield Batch(
                item=torch.where(followed, sequence[:, :-1], 0),
                target=target,
                time=torch.where(followed, times[:, :-1], 0),
                next_time=times[:, 1:],
                step=step,
                epoch=epoch,
            )


def place_in_group(count: np.ndarray) -> np.ndarray:
    """0 .. count[0] - 1, 0 .. count[1] - 1, and so on, int64 (sum of count,)."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
