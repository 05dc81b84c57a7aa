"""Who interacted with what: the artefact of prepare_data, and targets as ranges of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.errors import ArtifactMismatchError
from llmrec.files import load_arrays, read_json, save_arrays, write_json
from llmrec.shown import Shown

Split = Literal["train", "valid", "test"]

SPLIT_CODES: dict[str, int] = {"train": 0, "valid": 1, "test": 2, "context": 3}
"""Values of the split column. ``context``: shown as history, never trained on nor ranked."""


def catalog_of(raw_ids: list[str]) -> str:
    """sha256 of the item order; two artefacts fit together only if theirs are equal."""
    return hashlib.sha256("\n".join(raw_ids).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """Items to predict and the histories they are predicted from, as index ranges.

    The history of target e is ``interactions.item[start[e]:stop[e]]`` (may be empty). All int64 (E,).
    """

    user: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    item: np.ndarray

    def __len__(self) -> int:
        return len(self.item)

    def take(self, index: np.ndarray) -> Targets:
        """The chosen targets, in that order."""
        return Targets(
            user=self.user[index], start=self.start[index], stop=self.stop[index], item=self.item[index]
        )


class Sequences(NamedTuple):
    """Part of what users did: those of user u are ``item[offset[u]:offset[u + 1]]``, with their times."""

    offset: np.ndarray
    """int64 (U + 1,)"""
    item: np.ndarray
    """int64 (n,)"""
    time: np.ndarray
    """int64 (n,)"""


ENDS = 2048
"""How many bytes of a picture are read at its beginning, and at its end, to tell it from another."""


def digest_of_ends(root: Path, paths: list[str]) -> bytes:
    """Hash of the names, sizes, first bytes and last bytes of files."""
    digest = hashlib.sha256()
    for path in paths:
        with (root / path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path}\0{size}\0".encode() + file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.digest()


def knows_times(summary: Mapping[str, Any]) -> bool:
    """Whether a data set's timestamps are times, not the places of a user's interactions."""
    return not summary.get("times_are_positions", summary.get("source") == "sequences")


def split_codes(column: pa.ChunkedArray) -> np.ndarray:
    """Codes int8 (n,) of a column that names splits, see SPLIT_CODES."""
    encoded = column.unify_dictionaries().combine_chunks()
    codes = np.array([SPLIT_CODES[name] for name in encoded.dictionary.to_pylist()], np.int8)
    return codes[encoded.indices.to_numpy()]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Interactions(Shown):
    """Who interacted with what, in time order, split; made by prepare_data.

    Users are 0..U-1 and items 1..N inside the package; people see ``user_raw_ids`` and the
    ``raw_id`` column of ``items``. The interactions of user u are ``item[offset[u]:offset[u + 1]]``.
    """

    stage: ClassVar[str] = "prepare_data"

    user_raw_ids: list[str]
    items: pa.Table
    """One row per item in id order: raw_id, title, train_count, optional text columns, image_path."""
    offset: np.ndarray
    """int64 (U + 1,)"""
    item: np.ndarray
    """int64 (n,), item ids 1..N"""
    timestamp: np.ndarray
    """int64 (n,), as given (position in the file where the source has none)"""
    split: np.ndarray
    """int8 (n,), see SPLIT_CODES; train rows come first in every user"""
    summary: dict[str, Any]
    """Counts, filters, tie figures and warnings, for the report."""
    image_root: Path | None = None
    """Folder that image_path is relative to."""
    images: dict[str, bytes] = field(default_factory=dict)
    """Files to be written below the artefact's own folder (sample market), by image_path."""
    true_scores: np.ndarray | None = None
    """float32 (U, N + 1): true probability of each user's next item at the test target, where known."""

    def __post_init__(self) -> None:
        users, rows = len(self.user_raw_ids), len(self.item)
        if len(self.offset) != users + 1 or self.offset[0] != 0 or self.offset[-1] != rows:
            raise ArtifactMismatchError(
                f"interactions: offset must run from 0 to {rows} in {users + 1} entries"
            )
        if not (len(self.timestamp) == len(self.split) == rows):
            raise ArtifactMismatchError("interactions: item, timestamp and split differ in length")
        if rows and (self.item.min() < 1 or self.item.max() > self.num_items):
            raise ArtifactMismatchError(
                f"interactions: item ids must lie in 1..{self.num_items}, "
                f"got {self.item.min()}..{self.item.max()}"
            )
        counts = np.bincount(self.item[self.split == 0], minlength=self.num_items + 1)
        if not np.array_equal(counts, self.train_count):
            raise ArtifactMismatchError("items.train_count does not match the train split")

    @property
    def num_users(self) -> int:
        return len(self.user_raw_ids)

    @property
    def num_items(self) -> int:
        """N, without the padding row."""
        return self.items.num_rows

    @property
    def raw_ids(self) -> list[str]:
        """Raw item ids; entry i belongs to item i + 1."""
        return self.items["raw_id"].to_pylist()

    @property
    def titles(self) -> list[str]:
        """Item titles ('' where missing); entry i belongs to item i + 1."""
        return self.items["title"].to_pylist()

    @property
    def catalog(self) -> str:
        return catalog_of(self.raw_ids)

    @property
    def train_count(self) -> np.ndarray:
        """Interactions per item in the train split, int64 (N + 1,), entry 0 is 0."""
        return np.concatenate([[0], self.items["train_count"].to_numpy()]).astype(np.int64)

    @property
    def knows_times(self) -> bool:
        """Whether timestamps are times, not the places of a user's interactions."""
        return knows_times(self.summary)

    def image_file(self, item_id: int) -> Path | None:
        """Where the picture of an item lies, or None if it has none."""
        path = self.items["image_path"][item_id - 1].as_py()
        return self.image_root / path if path and self.image_root else None

    def pictures_digest(self) -> str | None:
        """Hash of the items' picture files: names, sizes, first and last bytes; None if there are none, or if
        some are gone."""
        paths = [path for path in self.items["image_path"].to_pylist() if path]
        if not paths or self.image_root is None:
            return None
        root, blocks = self.image_root, [paths[start : start + 256] for start in range(0, len(paths), 256)]
        digest = hashlib.sha256()
        with ThreadPoolExecutor(8) as threads:
            try:
                for found in threads.map(lambda block: digest_of_ends(root, block), blocks):
                    digest.update(found)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return f"ends:{digest.hexdigest()}"

    def sequences(self, *splits: Split) -> Sequences:
        """The interactions of these splits alone, by user and time."""
        keep = np.isin(self.split, [SPLIT_CODES[split] for split in splits])
        cumulative = np.concatenate([[0], np.cumsum(keep)])
        return Sequences(cumulative[self.offset], self.item[keep], self.timestamp[keep])

    def targets(
        self, *splits: Split, max_history: int | None = None, max_targets: int | None = None
    ) -> Targets:
        """Every interaction of a split, or of several, as a target, in user and time order.

        Args:
            splits: which interactions are targets. A train target's history is everything before
                it, so the first one of a user has an empty history.
            max_history: context length in items. Kept targets of one user share windows, each of the
                `max_history` items before its last target, so that their histories are prefixes of each
                other: a target sees 1 to `max_history` items. None: unlimited.
            max_targets: keep only the last so many targets of each user. None: all.
        """
        row = np.flatnonzero(np.isin(self.split, [SPLIT_CODES[split] for split in splits]))
        user = np.searchsorted(self.offset, row, side="right") - 1
        last = np.append(user[1:] != user[:-1], True)
        if max_targets is not None and len(row):
            end = np.flatnonzero(last)[np.cumsum(last) - last]
            keep = end - np.arange(len(row)) < max_targets
            row, user, last = row[keep], user[keep], last[keep]
        start = self.offset[user]
        if max_history is not None and len(row):
            last_row = row[np.flatnonzero(last)[np.cumsum(last) - last]]
            windows_later = (last_row - row) // max_history
            start = np.maximum(start, last_row - (windows_later + 1) * max_history)
        return Targets(user=user, start=start, stop=row, item=self.item[row])

    def save(self, folder: Path) -> None:
        user = np.repeat(np.arange(self.num_users), np.diff(self.offset))
        pq.write_table(
            pa.table(
                {
                    "user_id": user,
                    "item_id": self.item,
                    "timestamp": self.timestamp,
                    "split": pa.DictionaryArray.from_arrays(
                        pa.array(self.split, pa.int32()), list(SPLIT_CODES)
                    ),
                }
            ),
            folder / "interactions.parquet",
        )
        pq.write_table(pa.table({"raw_id": self.user_raw_ids}), folder / "users.parquet")
        pq.write_table(self.items, folder / "items.parquet")
        root = None if self.image_root is None or self.images else str(self.image_root)
        write_json(
            folder / "summary.json",
            {"catalog": self.catalog, "image_root": root, **self.summary},
        )
        for path, content in self.images.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        if self.true_scores is not None:
            save_arrays(folder / "true_scores.safetensors", self.catalog, scores=self.true_scores)

    @classmethod
    def load(cls, folder: str | Path) -> Interactions:
        folder = Path(folder)
        table = pq.read_table(folder / "interactions.parquet")
        users = pq.read_table(folder / "users.parquet")["raw_id"].to_pylist()
        counts = np.bincount(table["user_id"].to_numpy(), minlength=len(users))
        summary = read_json(folder / "summary.json")
        catalog, root = summary.pop("catalog"), summary.pop("image_root")
        items = pq.read_table(folder / "items.parquet")
        truth = folder / "true_scores.safetensors"
        loaded = cls(
            user_raw_ids=users,
            items=items,
            offset=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            item=table["item_id"].to_numpy().copy(),  # arrow's own memory is read-only
            timestamp=table["timestamp"].to_numpy().copy(),
            split=split_codes(table["split"]),
            summary=summary,
            image_root=Path(root) if root else folder,
            true_scores=load_arrays(truth, catalog)["scores"] if truth.exists() else None,
        )
        if loaded.catalog != catalog:
            raise ArtifactMismatchError(f"{folder}: items.parquet is not the table it was saved with")
        return loaded
