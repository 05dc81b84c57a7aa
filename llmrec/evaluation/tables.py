"""Parts of tables: figures of several seeds, differences to another row, names. Imports nothing heavy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table as text, to be read as Markdown or on a page."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Cells; where a row has fewer than the head, the others are blank"""

    def lines(self) -> list[list[str]]:
        """The rows with all their cells."""
        return [[*row, *[""] * (len(self.head) - len(row))] for row in self.rows]

    def markdown(self, *, code: bool = False) -> str:
        """The table, first cells as code if asked for."""
        rows = [[f"`{first}`" if code else first, *rest] for first, *rest in self.lines()]
        lines = [self.head, ["---"] * len(self.head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fine_tuned_in(metrics: dict[str, Any]) -> str:
    """What the fine-tuned model is called in a metrics.json: its method; in older ones ``mme_sid`` always."""
    return str(metrics.get("fine_tuned", "mme_sid"))


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds, as ``mean`` and ``sd`` (None for one)."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def spread_text(figure: dict[str, Any]) -> str:
    """A figure of `mean_and_spread`."""
    return f"{figure['mean']:.4f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.4f}")


def difference_cells(row: dict[str, Any]) -> list[str]:
    """A row's difference (`analysis.difference_of`) with its interval, and its p; blank without one."""
    if "difference" not in row:
        return ["", ""]
    return [f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})", p_text(row.get("p"))]


def p_text(p: float | None) -> str:
    """A p-value as tables show it, where the smallest round to 0; blank without one."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
