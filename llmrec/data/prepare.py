"""prepare_data: from raw files to one ordered, filtered, split set of interactions."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec.artifacts import SPLIT_CODES, Interactions
from llmrec.data import splits, ties
from llmrec.data.config import PrepareDataConfig
from llmrec.data.filters import first_of_duplicates, k_core
from llmrec.data.sample_market import sample_market
from llmrec.data.sources import Log, read_log, read_sequences, read_table, text_column
from llmrec.errors import DataError

logger = logging.getLogger("llmrec")


@dataclass(kw_only=True)
class Rows:
    """Interactions in numbers; everything here is in the same row order."""

    user: np.ndarray
    """int64 (n,), index into users"""
    item: np.ndarray
    """int64 (n,), index into items"""
    timestamp: np.ndarray
    users: np.ndarray
    """Raw user ids in order"""
    items: np.ndarray
    """Raw item ids in order"""
    dropped: dict[str, int] = field(default_factory=dict)
    """Interactions left out, by reason"""

    def keep(self, chosen: np.ndarray, reason: str) -> None:
        """Keep a bool mask of rows, and only the users and items that still occur."""
        self.dropped[reason] = self.dropped.get(reason, 0) + int((~chosen).sum())
        self.reorder(np.flatnonzero(chosen))
        for ids, names in (("user", "users"), ("item", "items")):
            present, numbers = np.unique(getattr(self, ids), return_inverse=True)
            setattr(self, ids, numbers)
            setattr(self, names, getattr(self, names)[present])

    def reorder(self, order: np.ndarray) -> None:
        self.user, self.item, self.timestamp = (
            column[order] for column in (self.user, self.item, self.timestamp)
        )

    @property
    def offset(self) -> np.ndarray:
        """First row of each user, int64 (U + 1,); rows must be in user order."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.user, minlength=len(self.users)))])


def prepare_data(config: PrepareDataConfig) -> Interactions:
    """Read, filter, order and split.

    Items are numbered 1..N in the order of their raw ids (as numbers if all are), users likewise, so
    the result does not depend on the order of the file, except for ties (see `ties`).

    What happens to imperfect data, all of it counted in the summary:

    - rows that agree in user, item and time: the first is kept; repeats at other times stay
    - equal timestamps of a user: kept in file order, or shuffled; measured, and warned about
    - interactions with items that the items file lacks: an error, or dropped (unknown_items)
    - items that no kept interaction has: left out
    - missing titles become '', missing picture files a missing picture
    - text in a number column, empty ids, a second row for an item, missing columns: an error

    Raises:
        DataError: the files do not hold what they should; names file, row and column.
    """
    if config.source == "sample_market":
        return sample_market(config.market, config.seed)
    path = Path(config.interactions)
    if config.source == "sequences":
        log = read_sequences(path)
    else:
        log = read_log(
            path,
            user=config.user_column,
            item=config.item_column,
            timestamp=config.timestamp_column,
            rating=config.rating_column,
        )
    rows = filter_rows(config, log)
    items = ItemFile(config, rows.items)
    rows.reorder(ties.time_order(rows.user, rows.timestamp, config.ties, config.seed))
    split, details = split_rows(config, rows)
    keep = split != splits.DROPPED
    rows.keep(keep, "after_the_test_item_or_without_history")
    return assemble(config, rows, split[keep], items.columns(rows.items), details)


def filter_rows(config: PrepareDataConfig, log: Log) -> Rows:
    """Number users and items and apply every filter."""
    users, user = _numbered(log.user)
    items, item = _numbered(log.item)
    rows = Rows(user=user, item=item, timestamp=log.timestamp, users=users, items=items)
    known = np.ones(len(log), dtype=bool)
    if config.items is not None:
        known = _known_items(config, log, rows)
    good = known if config.min_rating is None else known & (log.rating >= config.min_rating)
    if config.min_rating is not None:
        rows.dropped["low_rating"] = int((known & ~good).sum())
    rows.dropped["unknown_item"] = int((~known).sum())
    # Without its user's line number a position is no time: the same item twice is a repeat, not a copy.
    copies = np.zeros(len(log), dtype=bool)
    if config.source == "table":
        copies[good] = ~first_of_duplicates(rows.user[good], rows.item[good], rows.timestamp[good])
    rows.dropped["duplicate"] = int(copies.sum())
    counted = dict(rows.dropped)
    rows.keep(good & ~copies, "filtered")
    rows.dropped = counted
    if len(rows.user) and config.k_core:
        rows.keep(k_core(rows.user, rows.item, config.k_core), "k_core")
    if not len(rows.user):
        raise DataError(
            f"{config.interactions}: no interaction is left after filtering ({_sentence(rows.dropped)}); "
            "lower prepare_data.k_core or prepare_data.min_rating"
        )
    return rows


def split_rows(config: PrepareDataConfig, rows: Rows) -> tuple[np.ndarray, dict[str, Any]]:
    """Split codes of the ordered rows, and the points in time of a global split."""
    if config.split == "global_time":
        split, details = splits.global_time(rows.offset, rows.timestamp, config.valid_rate, config.test_rate)
        if not (split == splits.TEST).any() or not (split == splits.TRAIN).any():
            raise DataError(
                f"{config.interactions}: a global-time split leaves {(split == splits.TRAIN).sum()} train "
                f"and {(split == splits.TEST).sum()} test interactions; change valid_rate or test_rate"
            )
        return split, details
    length = np.diff(rows.offset)
    if (short := np.flatnonzero(length < 3)).size:
        raise DataError(
            f"{config.interactions}: {len(short)} users have fewer than 3 interactions, the first is "
            f"{rows.users[short[0]]!r} with {length[short[0]]}; leave-one-out needs 3. Set "
            "prepare_data.k_core=3 (or more)"
        )
    return splits.leave_one_out(rows.offset), {}


class ItemFile:
    """The items file: text and pictures by raw id, or nothing where there is no such file."""

    def __init__(self, config: PrepareDataConfig, raw_ids: np.ndarray) -> None:
        self.config = config
        self.table: pa.Table | None = None
        self.root: Path | None = None
        if config.items is None:
            return
        path = Path(config.items)
        self.table = read_table(path)
        ids = text_column(self.table, path, config.item_column, required=True)
        self.place = {raw_id: row for row, raw_id in enumerate(ids)}
        self.path = path
        self.root = path.resolve().parent

    def columns(self, raw_ids: np.ndarray) -> dict[str, Any]:
        """Columns of the items table, in the order of raw_ids."""
        config = self.config
        columns: dict[str, Any] = {"raw_id": raw_ids.tolist(), "title": [""] * len(raw_ids)}
        images: list[str | None] = [None] * len(raw_ids)
        self.missing_images = None
        if self.table is not None:
            rows = np.array([self.place[raw_id] for raw_id in raw_ids])
            columns["title"] = text_column(self.table, self.path, config.title_column)[rows].tolist()
            for name in config.text_columns:
                columns[name] = text_column(self.table, self.path, name)[rows].tolist()
            if config.image_column is not None:
                given = text_column(self.table, self.path, config.image_column)[rows]
                images = [name if name and (self.root / name).is_file() else None for name in given]
        columns["image_path"] = pa.array(images, pa.string())
        return columns


def assemble(
    config: PrepareDataConfig,
    rows: Rows,
    split: np.ndarray,
    columns: dict[str, Any],
    details: dict[str, Any],
) -> Interactions:
    """Put the artefact together, with the figures a reader of results needs."""
    train_count = np.bincount(rows.item[split == splits.TRAIN], minlength=len(rows.items))
    items = pa.table({**columns, "train_count": train_count})
    summary = summarise(rows, split, items, config.split) | details
    summary["source"] = config.source
    summary["dropped"] = {reason: number for reason, number in rows.dropped.items() if number}
    has_time = config.source == "table"
    if has_time:
        summary["ties"] = {"order": config.ties, **ties.measure(rows.offset, rows.timestamp, rows.item)}
        if sentence := ties.warning(summary["ties"]):
            summary["warnings"].append(sentence)
    if config.split == "leave_one_out" and has_time:
        summary["warnings"].append(leave_one_out_warning(rows, split))
    for sentence in summary["warnings"]:
        logger.warning("prepare_data: %s", sentence)
    return Interactions(
        user_raw_ids=rows.users.tolist(),
        items=items,
        offset=rows.offset.astype(np.int64),
        item=rows.item + 1,
        timestamp=rows.timestamp,
        split=split,
        summary=summary,
        image_root=None if config.items is None else Path(config.items).resolve().parent,
    )


def summarise(rows: Rows, split: np.ndarray, items: pa.Table, how: str) -> dict[str, Any]:
    """Counts and lengths, for the report."""
    length = np.diff(rows.offset)
    train_count = items["train_count"].to_numpy()
    return {
        "num_users": len(rows.users),
        "num_items": len(rows.items),
        "num_interactions": len(rows.user),
        "split": how,
        "split_counts": {name: int((split == code).sum()) for name, code in SPLIT_CODES.items()},
        "history_length": {
            "min": int(length.min()),
            "median": float(np.median(length)),
            "mean": float(length.mean()),
            "max": int(length.max()),
        },
        "items_never_trained": int((train_count == 0).sum()),
        "items_without_title": sum(title == "" for title in items["title"].to_pylist()),
        "items_without_image": items["image_path"].null_count,
        "warnings": [],
    }


def leave_one_out_warning(rows: Rows, split: np.ndarray) -> str:
    """How much leave-one-out trains on the future: train interactions later than the median test item."""
    middle = np.median(rows.timestamp[split == splits.TEST])
    later = float((rows.timestamp[split == splits.TRAIN] > middle).mean())
    return (
        "Leave-one-out lets models train on the future of other users: "
        f"{later:.1%} of train interactions are later than the median test interaction. "
        "prepare_data.split=global_time does not."
    )


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct raw ids in order (as numbers if all are) and the index of each value among them."""
    encoded = pa.array(values, pa.string()).dictionary_encode()
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    if all(name.isascii() and name.isdigit() for name in names):
        order = np.array(sorted(range(len(names)), key=lambda place: (int(names[place]), names[place])))
    else:
        order = np.argsort(names, kind="stable")
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return names[order], place[encoded.indices.to_numpy()]


def _known_items(config: PrepareDataConfig, log: Log, rows: Rows) -> np.ndarray:
    """Which rows have an item of the items file; bool (n,)."""
    path = Path(config.items)
    ids = text_column(read_table(path), path, config.item_column, required=True)
    distinct, first, count = np.unique(ids.astype(str), return_index=True, return_counts=True)
    if (count > 1).any():
        twice = distinct[count > 1][0]
        both = np.flatnonzero(ids == twice)[:2] + 2
        raise DataError(
            f"{path}, column {config.item_column!r}: item {twice!r} stands in rows {both[0]} and {both[1]}; "
            "keep one row per item"
        )
    known = np.isin(rows.items.astype(str), distinct)[rows.item]
    if config.unknown_items == "error" and not known.all():
        place = int(np.flatnonzero(~known)[0])
        raise DataError(
            f"{config.interactions}, row {log.row[place]}: item {log.item[place]!r} is not in {path} "
            f"({(~known).sum()} such interactions). Add it, or set prepare_data.unknown_items=drop"
        )
    return known


def _sentence(dropped: dict[str, int]) -> str:
    return ", ".join(f"{number} dropped as {reason}" for reason, number in dropped.items() if number)
