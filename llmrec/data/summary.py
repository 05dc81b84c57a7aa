"""What a reader of results must know about the data: counts, lengths, ties, leaks."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from llmrec.data import ties
from llmrec.interactions import SPLIT_CODES, knows_times

logger = logging.getLogger("llmrec")

FEW = 100
"""Test items below which metrics say little: half of the interval of a recall of 0.2 is 0.08 then."""


def summarise(offset: np.ndarray, split: np.ndarray, train_count: np.ndarray) -> dict[str, Any]:
    """Counts of what is left after filters.

    Args:
        offset: first row of each user, int64 (U + 1,).
        split: split codes, int8 (n,).
        train_count: train interactions of each item, int64 (N,), without the padding row.
    """
    length = np.diff(offset)
    return {
        "num_users": len(length),
        "num_items": len(train_count),
        "num_interactions": len(split),
        "split_counts": {name: int((split == code).sum()) for name, code in SPLIT_CODES.items()},
        "history_length": {
            "min": int(length.min()),
            "median": float(np.median(length)),
            "mean": float(length.mean()),
            "max": int(length.max()),
        },
        "items_never_trained": int((train_count == 0).sum()),
    }


def future_rate(timestamp: np.ndarray, split: np.ndarray) -> float:
    """Share of train interactions later than the median test interaction."""
    middle = np.median(timestamp[split == SPLIT_CODES["test"]])
    return float((timestamp[split == SPLIT_CODES["train"]] > middle).mean())


def leaking_user_rate(timestamp: np.ndarray, split: np.ndarray) -> float:
    """Share of test interactions, one a user, that are older than some train interaction."""
    last = timestamp[split == SPLIT_CODES["train"]].max()
    return float((timestamp[split == SPLIT_CODES["test"]] < last).mean())


REAL_TIME = 100_000_000
"""A number above it is a time since 1970, in seconds (1973) or less, and no place or day."""


def warnings_of_times(first: int, last: int) -> list[str]:
    """A sentence if the first and last time can hardly be in one unit."""
    if last <= REAL_TIME or not 0 <= first < last / 100:
        return []
    return [
        f"Times run from {first} to {last}, which can hardly be in one unit: some rows may have milliseconds "
        "where others have seconds, or 0 where the time is not known. Histories are in the order of these "
        "numbers."
    ]


def warnings_of(summary: dict[str, Any]) -> list[str]:
    """Sentences for the log and the report."""
    found = []
    if "ties" in summary and (sentence := ties.warning(summary["ties"])):
        found.append(sentence)
    if not knows_times(summary):
        found.append(
            "Times are places in a user's history, so two things cannot be measured: how many interactions "
            "happened at the same time, whose order in the file a model can learn, and how much of the "
            "future of other users a model trains on."
        )
    if summary.get("train_after_test_rate") or summary.get("leaking_user_rate"):
        found.append(
            "Leave-one-out lets a model train on the future of other users: "
            f"{summary['train_after_test_rate']:.1%} of train interactions are later than the median test "
            f"interaction, and {summary['leaking_user_rate']:.1%} of the users have a test item older than "
            "something that was trained on. prepare_data.split=global_time does not."
        )
    if (ranked := summary["split_counts"].get("test", 0)) < FEW:
        lost = summary.get("dropped", {}).get("test_without_history", 0)
        why = f"; {lost} more had nothing in their history" if lost else ""
        items = "test item" if ranked == 1 else "test items"
        found.append(f"Only {ranked} {items}: too few to tell methods apart{why}.")
    if summary.get("items_without_title"):
        found.append(f"{summary['items_without_title']} of {summary['num_items']} items have no title.")
    if lost := summary.get("missing_picture_files"):
        found.append(
            f"The pictures of {lost} of {summary['num_items']} items are named but do not exist. To have "
            "them, put them there, and delete this stage's folder and what was made from it."
        )
    if lost := summary.get("items_without_picture_path"):
        found.append(f"{lost} of {summary['num_items']} items name no picture.")
    if lost := summary.get("pictures_not_fetched"):
        found.append(f"The pictures of {lost} of {summary['num_items']} items could not be fetched.")
    left_out = summary.get("incomplete_items", {})
    if number := left_out.get("items"):
        found.append(f"{number} of {left_out['of_items']} items are left out, lacking a title or picture.")
    if may := max(one.get("pictures_that_may_come", 0) for one in (summary, left_out)):
        found.append(
            f"{may} pictures were not to be had now but may come (status.parquet beside them says why). They "
            "are asked for again once prepare_data is computed again: delete its folder and what was made "
            "from it."
        )
    return found


def log_summary(summary: dict[str, Any]) -> None:
    """One line of counts, one per warning."""
    logger.info(
        "prepare_data: %d users, %d items, %d interactions (%s)",
        summary["num_users"],
        summary["num_items"],
        summary["num_interactions"],
        ", ".join(f"{count} {name}" for name, count in summary["split_counts"].items() if count),
    )
    if dropped := {reason: count for reason, count in summary.get("dropped", {}).items() if count}:
        logger.info(
            "prepare_data: interactions left out: %s",
            ", ".join(f"{count} by {reason}" for reason, count in dropped.items()),
        )
    for sentence in summary["warnings"]:
        logger.warning("prepare_data: %s", sentence)
