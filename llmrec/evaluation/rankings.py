"""The table of ranks that evaluate writes, rankings.parquet: one row per ranked user, in raw ids.

Columns: ``user``, ``target``, ``history_length``, ``target_group`` (head, mid, tail or cold), and of every
method ``rank_<method>``, the place of the target (1 the best; half of those tied with it stand before it),
and ``top_<method>``, the best items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from llmrec.artifacts import Report
from llmrec.errors import ConfigError
from llmrec.evaluation.analysis import GROUPS
from llmrec.evaluation.rank import Ranking
from llmrec.evaluation.tables import fine_tuned_in
from llmrec.interactions import Interactions, Targets


def table_of(
    data: Interactions, targets: Targets, rankings: dict[str, Ranking], group_of_item: np.ndarray
) -> pa.Table:
    """The table.

    Args:
        data: names users and items.
        targets: that were ranked.
        rankings: by method.
        group_of_item: int64 (N + 1,), index into GROUPS.
    """
    raw = np.array(["", *data.raw_ids], dtype=object)
    users = np.array(data.user_raw_ids, dtype=object)
    columns: dict[str, Any] = {
        "user": users[targets.user].tolist(),
        "target": raw[targets.item].tolist(),
        "history_length": targets.stop - targets.start,
        "target_group": np.array(GROUPS, dtype=object)[group_of_item[targets.item]].tolist(),
    }
    for name, ranking in rankings.items():
        columns[f"rank_{name}"] = ranking.rank + 1
        columns[f"top_{name}"] = [[item for item in row if item] for row in raw[ranking.top].tolist()]
    return pa.table(columns)


def ranks_in(table: pa.Table, method: str) -> np.ndarray:
    """Ranks of a method as metrics take them, counted from 0, float64 (U,)."""
    return table[f"rank_{method}"].to_numpy().astype(np.float64) - 1


def ranks_of(report: Report, method: str | None = None) -> np.ndarray:
    """`ranks_in`, by the name of a method in the report's table or in its metrics; None: the fine-tuned one.

    Raises:
        ConfigError: no such method.
    """
    return ranks_in(report.rankings, key_of(report, method))


def key_of(report: Report, method: str | None) -> str:
    """What a method is called in the report's metrics; None: the fine-tuned one.

    Raises:
        ConfigError: no such method.
    """
    rows = report.metrics["rows"]
    if method is None:
        return fine_tuned_in(report.metrics)
    if method in rows:
        return method
    labels = report.metrics.get("labels", {})
    found = [name for name, label in labels.items() if method in (label, label.partition(" (")[0])]
    if len(found) == 1:
        return found[0]
    known = [name if labels.get(name, name) == name else f"{name} ({labels[name]})" for name in rows]
    raise ConfigError(f"there is no method {method!r}, but {', '.join(known)}")
