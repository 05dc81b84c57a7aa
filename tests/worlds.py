"""Small data sets with a known answer, for tests of every stage."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from llmrec.interactions import Interactions


def interactions(
    sequences: list[list[int]], num_items: int, *, titles: list[str] | None = None
) -> Interactions:
    """Leave-one-out interactions from lists of item ids 1..N, one list a user, oldest first."""
    lengths = np.array([len(sequence) for sequence in sequences])
    offset = np.concatenate([[0], np.cumsum(lengths)])
    item = np.concatenate([np.array(sequence, dtype=np.int64) for sequence in sequences])
    split = np.zeros(len(item), dtype=np.int8)
    split[offset[1:] - 2], split[offset[1:] - 1] = 1, 2
    count = np.bincount(item[split == 0], minlength=num_items + 1)[1:]
    items = pa.table(
        {
            "raw_id": [f"i{number}" for number in range(1, num_items + 1)],
            "title": titles or [f"item {number}" for number in range(1, num_items + 1)],
            "train_count": count,
            "image_path": pa.nulls(num_items, pa.string()),
        }
    )
    position = np.concatenate([np.arange(length) for length in lengths])
    return Interactions(
        user_raw_ids=[f"u{number}" for number in range(len(sequences))],
        items=items,
        offset=offset.astype(np.int64),
        item=item,
        timestamp=position,
        split=split,
        summary={},
    )


def two_communities(num_users: int = 60, num_items: int = 20, seed: int = 0) -> Interactions:
    """Even users like even items and odd users odd ones, in a random order without repeats.

    All but one item of the user's parity are in the history, so the next item is certain.
    """
    rng = np.random.default_rng(seed)
    sequences = []
    for user in range(num_users):
        liked = np.arange(1, num_items + 1)
        liked = liked[liked % 2 == user % 2]
        sequences.append(rng.permutation(liked).tolist())
    return interactions(sequences, num_items)


def cycle(num_users: int = 64, num_items: int = 12, length: int = 8, seed: int = 0) -> Interactions:
    """Item i is always followed by item i + 1 (N by 1); users start anywhere."""
    starts = np.random.default_rng(seed).integers(0, num_items, num_users)
    return interactions(
        [[int(start + step) % num_items + 1 for step in range(length)] for start in starts], num_items
    )
