"""prepare_data: from raw files to one ordered, filtered, split set of interactions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.config import given, unhandled
from llmrec.data import splits, ties
from llmrec.data.config import PrepareDataConfig
from llmrec.data.filters import first_of_duplicates, k_core
from llmrec.data.hub import warnings_of_address
from llmrec.data.items import ItemFile
from llmrec.data.named import resolve, warnings_of_counts
from llmrec.data.sample_market import sample_market
from llmrec.data.sources import Log, read_log, read_sequences
from llmrec.data.summary import (
    future_rate,
    leaking_user_rate,
    log_summary,
    summarise,
    warnings_of,
    warnings_of_times,
)
from llmrec.data.table_file import TableFile, no_file, not_utf8
from llmrec.errors import DataError
from llmrec.interactions import Interactions, knows_times
from llmrec.manifest import sha256


def prepare_data(config: PrepareDataConfig) -> Interactions:
    """Read, filter, order and split.

    Users and items are numbered in the order of their raw ids (as numbers if all are whole numbers, else
    as text), so the result does not depend on the order of rows, except for ties in file order. Filters
    apply in this order: unknown items, rating, duplicates, k-core, excluded and incomplete items with the
    users who then have too few interactions (once, not again and again: MME-SID's rule).

    What happens to imperfect data, counted in the summary:

    - rows that agree in user, item and time: the first is kept; repeats at other times stay
    - equal timestamps of a user: kept in file order, or shuffled; measured, and warned about
    - interactions with items that the items file lacks: an error, or dropped (unknown_items)
    - items without interactions: left out; items with none in the train split: kept
    - empty titles stay '', missing or unnamed picture files become a null image_path
    - under a global-time split (`splits.global_time`), interactions after a user's test target, and of
      users without history before it, are left out
    - rows of the items file that say the same of an item once more: the first is kept
    - text where a number belongs, an empty id, two rows that differ for an item, a missing column, a row of
      the wrong length, bytes that are not UTF-8: an error with file, row and column

    Raises:
        DataError: the files do not hold what they should, or nothing is left to split.
    """
    if config.source == "sample_market":
        data = sample_market(config.market, config.seed)
        log_summary(data.summary)
        return data
    asked = config
    if config.source == "amazon_2014":
        config = resolve(config)
    log = read(config)
    item_file = ItemFile(config)
    rows = filter_rows(config, log, item_file)
    summary: dict[str, Any] = {
        "source": asked.source,
        "files": files_of(config),
        "read": {"users": len(log.users), "items": len(log.items), "interactions": len(log)},
    }
    if item_file.repeated_rows:
        summary["read"]["repeated_item_rows"] = item_file.repeated_rows
    if config.source == "table":
        summary["times_are_positions"] = config.timestamp_column is None or times_are_positions(log)
    unexpected = warnings_of_counts(asked, (len(rows.users), len(rows.items), len(rows.user)))
    order_rows(config, rows, summary)
    split = split_rows(config, rows, summary)
    for address in (config.interactions, config.items):
        if address is not None and TableFile(Path(address)).on_hub:
            unexpected += warnings_of_address(address)
    return assemble(rows, split, item_file, summary, unexpected)


def read(config: PrepareDataConfig) -> Log:
    """All interactions of the file, as they stand there."""
    path = Path(given(config.interactions))
    if config.source == "sequences":
        return read_sequences(path)
    if config.source == "table":
        return read_log(
            TableFile(path, config.column_names),
            user=config.user_column,
            item=config.item_column,
            timestamp=config.timestamp_column,
            timestamp_format=config.timestamp_format,
            rating=config.rating_column,
        )
    assert config.source != "sample_market" and config.source != "amazon_2014", "which are no files"
    unhandled(config.source)


@dataclass(kw_only=True)
class Rows:
    """Interactions that are still in, with the users and items that they have."""

    user: np.ndarray
    """int64 (n,), index into users"""
    item: np.ndarray
    """int64 (n,), index into items"""
    timestamp: np.ndarray
    """int64 (n,)"""
    users: np.ndarray
    """Raw user ids in order"""
    items: np.ndarray
    """Raw item ids in order"""
    dropped: dict[str, int] = field(default_factory=dict)
    """Interactions left out, by reason"""
    incomplete: dict[str, int] = field(default_factory=dict)
    """Items left out for what they lack, and how many lacked what"""

    def keep(self, chosen: np.ndarray, reason: str) -> None:
        """Keep a bool mask of rows, and only the users and items that still occur."""
        self.dropped[reason] = int((~chosen).sum())
        if self.dropped[reason]:
            self.reorder(np.flatnonzero(chosen))
            self.user, self.users = _renumber(self.user, self.users)
            self.item, self.items = _renumber(self.item, self.items)

    def reorder(self, order: np.ndarray) -> None:
        self.user, self.item = self.user[order], self.item[order]
        self.timestamp = self.timestamp[order]

    @property
    def offset(self) -> np.ndarray:
        """First row of each user, int64 (U + 1,); rows must be in user order."""
        count = np.bincount(self.user, minlength=len(self.users))
        return np.concatenate([[0], np.cumsum(count)]).astype(np.int64)


def filter_rows(config: PrepareDataConfig, log: Log, item_file: ItemFile) -> Rows:
    """Apply every filter.

    Raises:
        DataError: an unknown item, or nothing is left.
    """
    rows = Rows(user=log.user, item=log.item, timestamp=log.timestamp, users=log.users, items=log.items)
    known = item_file.knows(log, config.unknown_items)
    rows.keep(known, "unknown_item")
    if config.min_rating is not None:
        assert log.rating is not None
        rows.keep(log.rating[known] >= config.min_rating, "low_rating")
    if config.source == "table":  # in a sequence, the same item again is a repeat
        rows.keep(first_of_duplicates(rows.user, rows.item, rows.timestamp), "duplicate")
    if config.least_interactions:
        rows.keep(k_core(rows.user, rows.item, config.least_interactions), "k_core")
    if len(rows.user):
        drop_items(config, rows, item_file)
    if not len(rows.user):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in rows.dropped.items() if count)
        raise DataError(
            f"{config.interactions}: no interaction is left of {len(log)} (dropped by {reasons}); users and "
            f"items with fewer than {config.least_interactions} interactions are left out: lower "
            "prepare_data.k_core or prepare_data.min_rating, or give more data"
        )
    return rows


def drop_items(config: PrepareDataConfig, rows: Rows, item_file: ItemFile) -> None:
    """Drop excluded and incomplete items, and then users with too few interactions left.

    Raises:
        DataError: the file of excluded items is absent, or names none that is here.
    """
    before = len(rows.user)
    if config.exclude_items is not None:
        path = Path(config.exclude_items)
        if not path.is_file():
            raise no_file(path)
        try:
            names = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        excluded = np.array([item in names for item in rows.items.tolist()], dtype=bool)
        if not excluded.any():
            raise DataError(
                f"{path}: none of its {len(names)} ids is an item here; expected one raw id a line"
            )
        rows.keep(~excluded[rows.item], "excluded_item")
    if config.incomplete_items == "drop":
        table, counts = item_file.table(rows.items)
        incomplete = np.zeros(len(rows.items), dtype=bool)
        if config.title_column is not None:
            incomplete |= np.array(table["title"].to_pylist()) == ""
        if item_file.root is not None:
            incomplete |= table["image_path"].is_null().to_numpy()
        counts.pop("items_without_interactions", None)
        rows.incomplete = {"items": int(incomplete.sum()), "of_items": len(incomplete)} | counts
        rows.keep(~incomplete[rows.item], "incomplete_item")
    if len(rows.user) < before:
        count = np.bincount(rows.user, minlength=len(rows.users))
        rows.keep(count[rows.user] >= config.least_interactions, "short_user")


def order_rows(config: PrepareDataConfig, rows: Rows, summary: dict[str, Any]) -> None:
    """Sort by user and time, and measure ties as the file has them, if it has times.

    Raises:
        DataError: ties to shuffle among places.
    """
    rows.reorder(ties.file_order(rows.user, rows.timestamp))
    if not knows_times(summary):
        if config.ties == "shuffle":
            raise DataError(
                f"{config.interactions}, column {config.timestamp_column!r}: every user's times count 0, 1, "
                "2, ..., so no two are equal and prepare_data.ties=shuffle has nothing to shuffle; give real "
                "times or leave it out"
            )
        return
    summary["ties"] = {"order": config.ties} | ties.measure(rows.offset, rows.timestamp, rows.item)
    if config.ties == "shuffle":
        rows.reorder(ties.shuffled_order(rows.user, rows.timestamp, rows.item, config.seed))
        after = ties.measure(rows.offset, rows.timestamp, rows.item)
        summary["ties"]["ascending_rate_after_shuffle"] = after["ascending_rate"]


def split_rows(config: PrepareDataConfig, rows: Rows, summary: dict[str, Any]) -> np.ndarray:
    """Split codes of the rows that stay.

    Raises:
        DataError: users too short for leave-one-out, or a global-time split with an empty part.
    """
    summary["split"] = config.split
    if config.split == "leave_one_out":
        _refuse_short_users(config, rows)
        split = splits.leave_one_out(rows.offset)
        if knows_times(summary):
            summary["train_after_test_rate"] = future_rate(rows.timestamp, split)
            summary["leaking_user_rate"] = leaking_user_rate(rows.timestamp, split)
        return split
    if summary["times_are_positions"]:
        assert config.timestamp_column is not None, "which the settings refuse"
        raise DataError(
            f"{config.interactions}, column {config.timestamp_column!r}: every user's times count 0, 1, 2, "
            "... and say nothing about other users; a global-time split needs real times, so give them or "
            "use prepare_data.split=leave_one_out"
        )
    points = splits.time_points(rows.timestamp, config.valid_rate, config.test_rate)
    split = splits.global_time(rows.offset, rows.timestamp, points)
    counts = {name: int((split == code).sum()) for name, code in splits.SPLIT_CODES.items()}
    if not (counts["train"] and counts["valid"] and counts["test"]):
        raise DataError(
            f"{config.interactions}: a global-time split at {points[0]} and {points[1]} leaves "
            f"{counts['train']} train, {counts['valid']} valid and {counts['test']} test interactions; "
            "change prepare_data.valid_rate or test_rate, or use split=leave_one_out"
        )
    summary["valid_from"], summary["test_from"] = points
    dropped = split[split < 0]
    rows.keep(split >= 0, "global_time")
    del rows.dropped["global_time"]
    rows.dropped |= {name: int((dropped == code).sum()) for code, name in splits.DROPPED.items()}
    return split[split >= 0]


def assemble(
    rows: Rows, split: np.ndarray, item_file: ItemFile, summary: dict[str, Any], unexpected: list[str]
) -> Interactions:
    """Put the artefact together, with the figures a reader of results needs."""
    train_count = np.bincount(rows.item[split == splits.TRAIN], minlength=len(rows.items))
    items, counts = item_file.table(rows.items)
    summary |= {"dropped": rows.dropped, **counts, **summarise(rows.offset, split, train_count)}
    if rows.incomplete:
        summary["incomplete_items"] = rows.incomplete
    summary["warnings"] = unexpected + warnings_of(summary)
    if knows_times(summary):
        summary["warnings"] += warnings_of_times(int(rows.timestamp.min()), int(rows.timestamp.max()))
    log_summary(summary)
    return Interactions(
        user_raw_ids=rows.users.tolist(),
        items=items.append_column("train_count", [train_count]),
        offset=rows.offset,
        item=rows.item + 1,
        timestamp=rows.timestamp,
        split=split,
        summary=summary,
        image_root=item_file.root,
    )


def times_are_positions(log: Log) -> bool:
    """Whether every user's timestamps count up by one from one common start, rows that stand twice aside."""
    once = first_of_duplicates(log.user, log.item, log.timestamp)
    user, timestamp = log.user[once], log.timestamp[once]
    count = np.bincount(user)
    earliest = np.full(len(count), np.iinfo(np.int64).max)
    latest = np.full(len(count), np.iinfo(np.int64).min)
    np.minimum.at(earliest, user, timestamp)
    np.maximum.at(latest, user, timestamp)
    same_start = (earliest == earliest[0]).all()
    return bool(same_start and (latest - earliest + 1 == count).all() and count.max() > 1)


def files_of(config: PrepareDataConfig) -> dict[str, dict[str, Any]]:
    """Names, sizes and hashes of the files read, so that a result says what it was made from."""
    found = {}
    for what in ("interactions", "items"):
        if (name := getattr(config, what)) is not None:
            path = Path(name)
            if TableFile(path).on_hub:
                found[what] = {"name": name}
                continue
            found[what] = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    return found


def _refuse_short_users(config: PrepareDataConfig, rows: Rows) -> None:
    length = np.diff(rows.offset)
    short = np.flatnonzero(length < 3)
    if len(short):
        raise DataError(
            f"{config.interactions}: {len(short)} of {len(length)} users have fewer than 3 interactions, the "
            f"first is {rows.users[short[0]]!r} with {length[short[0]]}; leave-one-out needs 3. Set "
            "prepare_data.k_core=3 (or more)"
        )


def _renumber(ids: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers without gaps, in the same order, and the names that still occur."""
    present = np.bincount(ids, minlength=len(names)) > 0
    return (np.cumsum(present) - 1)[ids], names[present]
