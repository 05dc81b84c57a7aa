"""Finished runs side by side: methods of several evaluations on the same users, seeds averaged, differences
tested user by user."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.artifacts import Report
from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.evaluation import analysis
from llmrec.evaluation.metrics import METRICS, per_user
from llmrec.evaluation.rankings import key_of, ranks_in
from llmrec.evaluation.tables import Table, difference_cells, fine_tuned_in, mean_and_spread, spread_text
from llmrec.finished import load

KS = (5, 10, 20)
SAME = {"split": "split", "mask_seen": "masking of the history"}
"""What runs must have in common to be compared, in metrics.json, as people say it."""


@dataclass(frozen=True)
class Entry:
    """One method in one evaluation (None: what was fine-tuned there); entries of one name are seeds."""

    name: str
    folder: Path
    method: str | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        """From ``NAME=FOLDER`` or ``NAME=FOLDER:METHOD``; the folder is the longest one that is there.

        Raises:
            ConfigError: it is of another form.
        """
        name, _, place = text.partition("=")
        # A folder may have colons in its name, and so may a method.
        cuts = [len(place), *(index for index in range(len(place) - 1, 0, -1) if place[index] == ":")]
        cut = next((cut for cut in cuts if Path(place[:cut]).is_dir()), len(place.partition(":")[0]))
        folder, method = place[:cut], place[cut + 1 :]
        if not name or not folder:
            raise ConfigError(f"{text!r} is not of the form NAME=FOLDER or NAME=FOLDER:METHOD")
        return cls(name, Path(folder), method or None)


def compare_runs(entries: list[Entry]) -> list[dict[str, Any]]:
    """One row per name, in order; differences are to the first.

    Args:
        entries: what to compare.

    Returns:
        Rows with ``name``, ``runs``, ``trained_on`` (blank for what is not trained, or where a run does not
        say), mean and spread over the runs by metric (``sd`` is None for one run), and for all but the first
        the mean difference of ndcg@10, its 95 % interval over users, and p of a paired t-test, corrected for
        the number of rows (Holm).

    Raises:
        ArtifactMismatchError: runs on other items, users, targets or under another protocol.
        ConfigError: fewer than two names, a method that is not in a run, a run that is given twice, or runs
            of one name that share what was trained.
    """
    if len({entry.name for entry in entries}) < 2:
        raise ConfigError("give at least two names to compare")
    found = seeds_by_name(entries)
    rows = [row_of(name, seeds) for name, seeds in found.items()]
    reference, *others = (mean_by_user(seeds, "ndcg@10") for seeds in found.values())
    for row, mean in zip(rows[1:], others):
        row |= analysis.difference_of(mean - reference)
    tested = [row for row in rows if row.get("p_value") is not None]
    for row, p in zip(tested, analysis.holm([row["p_value"] for row in tested])):
        row["p"] = p
    return rows


Training = tuple[str, str]
"""A stage, and the hash of its output"""


@dataclass
class Seeds:
    """What the runs of one name measured."""

    users: list[dict[str, np.ndarray]] = field(default_factory=list)
    """Every metric of every user, (U,), by run"""
    trained_on: set[str] = field(default_factory=set)
    """See `compare_runs`"""
    trainings: dict[Training, Path] = field(default_factory=dict)
    """Where each was found, by `training_of`"""


def seeds_by_name(entries: list[Entry]) -> dict[str, Seeds]:
    """Read the runs; arguments and errors as of `compare_runs`."""
    found: dict[str, Seeds] = {}
    first: Report | None = None
    counted: set[tuple[str, Path, str]] = set()
    for entry in entries:
        report = load(Report, entry.folder)
        first = first or report
        check_comparable(first, report, entries[0].folder, entry.folder)
        try:
            method = key_of(report, entry.method)
        except ConfigError as error:
            raise ConfigError(f"{entry.folder}: {error}") from None
        # A folder and a method have several names each, and as a seed of its own a run would be no other one.
        if (one := (entry.name, entry.folder.resolve(), method)) in counted:
            raise ConfigError(f"{entry.name}={entry.folder}:{method} is given twice; a run counts once")
        counted.add(one)
        seeds = found.setdefault(entry.name, Seeds())
        training = training_of(report, method)
        if training is not None and training in seeds.trainings:
            raise ConfigError(
                f"{entry.name}={entry.folder}:{method} and {seeds.trainings[training]}:{method} are one "
                f"training, since the runs share their {training[0]}; it counts once"
            )
        if training is not None:
            seeds.trainings[training] = entry.folder
        seeds.users.append(per_user(ranks_in(report.rankings, method), KS))
        seeds.trained_on.add(report.metrics.get("trained_on", {}).get(method, ""))
    return found


def training_of(report: Report, method: str) -> Training | None:
    """What a method was trained in; None for what is not trained, or where it is not known."""
    inputs = (getattr(report, "_manifest", None) or {}).get("inputs", {})
    if method not in report.metrics.get("trained_on", {}):
        return None
    stage = "finetune" if method == fine_tuned_in(report.metrics) else "train_collab"
    return (stage, inputs[stage]) if stage in inputs else None


def mean_by_user(seeds: Seeds, metric: str) -> np.ndarray:
    """A metric of every user, (U,): the mean over the runs."""
    return np.stack([run[metric] for run in seeds.users]).mean(axis=0)


def row_of(name: str, seeds: Seeds) -> dict[str, Any]:
    """What the table says of one name by itself."""
    row: dict[str, Any] = {
        "name": name,
        "runs": len(seeds.users),
        "trained_on": " or ".join(sorted(seeds.trained_on)),
    }
    for metric in (f"{metric}@{k}" for k in KS for metric in METRICS):
        row[metric] = mean_and_spread([float(run[metric].mean()) for run in seeds.users])
    return row


def check_comparable(first: Report, other: Report, first_folder: Path, folder: Path) -> None:
    """Raise `ArtifactMismatchError` unless both ranked the same targets of the same users in the same way."""
    if other.catalog != first.catalog:
        raise ArtifactMismatchError(f"{folder} ranked other items than {first_folder}")
    for key, what in SAME.items():
        ours, theirs = first.metrics.get(key), other.metrics.get(key)
        if ours != theirs:
            raise ArtifactMismatchError(f"{folder} and {first_folder} differ in {what}: {theirs} and {ours}")
    for column in ("user", "target", "history_length"):
        if first.rankings[column] != other.rankings[column]:
            raise ArtifactMismatchError(f"{folder} ranked other users or targets than {first_folder}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    metrics = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20")
    head = ["", "runs", "learned from", *metrics, f"ndcg@10 minus {rows[0]['name']} (95 % interval)", "p"]
    lines = [
        [
            *(row["name"], str(row["runs"]), row["trained_on"]),
            *(spread_text(row[metric]) for metric in metrics),
            *difference_cells(row),
        ]
        for row in rows
    ]
    return Table(head, lines).markdown()
