"""What comparisons show, whatever they compare: tables, as Markdown and on a page alike, and charts."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from llmrec import __version__, machine
from llmrec.evaluation.tables import Table
from llmrec.files import write_json
from llmrec.pages import drawing, environment, legend_above, legend_beside, line_looks, name_points, plot, svg

MAIN = "ndcg@10"
"""Metric of differences, of the cost chart, and of validation."""
SHOWN = ("recall@10", MAIN)

Results = dict[str, Any]
"""What a comparison found, as results.json holds it."""

Chart = Callable[[], str]
"""Draws an SVG element; pages call it, text does not."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row with results, as charts show it."""

    name: str
    test: Mapping[str, Mapping[str, Any]]
    """`mean_and_spread` by metric"""
    difference: Mapping[str, Any] | None = None
    """`analysis.difference_of` to the reference, of ndcg@10"""
    minutes: float | None = None
    """Of training, one seed"""
    slices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """recall@10 by part of users, by what parts them"""
    validation: Sequence[tuple[float, float]] = ()
    """Place in training and ndcg@10, first seed"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a comparison."""

    title: str = ""
    note: str = ""
    table: Table | None = None
    charts: Sequence[Chart] = ()
    folded: Mapping[str, Callable[[], list[str]]] = field(default_factory=dict)
    """Charts behind a line to click on, by that line"""
    links: Mapping[str, str] = field(default_factory=dict)
    """Addresses relative to the page, by what is read"""


def as_markdown(sections: Sequence[Section], notes: Sequence[str], *, code: bool = False) -> str:
    """Tables and notes; `code`: names of rows as code."""
    parts = []
    for section in sections:
        if section.table is not None:
            parts += [f"{section.title}:\n"] if section.title else []
            parts.append(section.table.markdown(code=code) + "\n")
    return "\n".join([*parts, *notes]) + "\n"


def as_page(title: str, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """One HTML page that stands alone."""
    with drawing():
        drawn = [
            {
                "section": section,
                "charts": [chart() for chart in section.charts],
                "folded": {name: charts() for name, charts in section.folded.items()},
            }
            for section in sections
        ]
    return (
        environment(Path(__file__).parent)
        .get_template("comparison.html.j2")
        .render(title=title, notes=notes, parts=drawn, version=__version__)
    )


def write(folder: Path, results: Results, text: str, page: Callable[[Results], str]) -> None:
    """Write a comparison as results.json, table.md and, drawn once these are safe, report.html."""
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(page(results), encoding="utf-8")


def protocol(results: Mapping[str, Any]) -> str:
    """What a reader must know of how rows were ranked, spread and tested.

    Args:
        results: with ``num_users``, ``num_items`` and ``split``.
    """
    return (
        f"{results['num_users']:,} users, {results['num_items']:,} items, split {results['split']}; every "
        "item is ranked. ± is the standard deviation over seeds; intervals (95 %) and p (paired t-test, "
        "corrected by Holm) are over users, of the mean over seeds. Settings are to be chosen by the "
        "validation column, not by what test items say."
    )


def made_here(at_a_time: int | None, failed: list[str]) -> Results:
    """What results say of how they were made: by this process.

    Args:
        at_a_time: cells that were trained at a time; None: nothing was trained.
        failed: a line for each cell that failed.
    """
    return {
        "machine": machine.describe(),
        "jobs": at_a_time,
        "command": shlex.join(["python", *sys.argv]),
        "failed": failed,
    }


def provenance(results: Mapping[str, Any]) -> str:
    """Where the figures were made, and by which command.

    Args:
        results: with all of `made_here`.
    """
    jobs, where = results["jobs"], results["machine"]
    trained = f"Machine: {where}; {jobs} trained at a time" if jobs else f"Summed up on {where}"
    return f"{trained}. Command: {results['command']}"


def slice_sections(rows: Sequence[Compared], counts: Mapping[str, Mapping[str, int]]) -> list[Section]:
    """recall@10 in every part of the users.

    Args:
        rows: what is shown; rows without slices are left out.
        counts: users by part, by what parts them.
    """
    rows = [row for row in rows if row.slices]
    found = []
    for what, parts in counts.items():
        head = ["method", *(f"{part} ({count:,} users)" for part, count in parts.items())]
        cells = [[row.name, *(f"{row.slices[what][part]:.4f}" for part in parts)] for row in rows]
        charts = [functools.partial(slice_chart, rows, what, list(parts))] if rows else []
        found.append(Section(title=f"recall@10 by {what}", table=Table(head, cells), charts=charts))
    return found


def quality_chart(rows: Sequence[Compared]) -> str:
    """Dots for means, bars for one standard deviation over seeds; SVG."""
    figure, axes = _lines_of(rows)
    place = np.arange(len(rows))[::-1]
    for offset, metric in ((0.12, SHOWN[0]), (-0.12, SHOWN[1])):
        figures = [row.test[metric] for row in rows]
        axes.errorbar(
            [found["mean"] for found in figures],
            place + offset,
            xerr=[found["sd"] or 0 for found in figures],
            fmt="o",
            markersize=4,
            label=metric,
        )
    axes.set_xlim(left=0)
    legend_above(axes)
    return svg(figure)


def difference_chart(rows: Sequence[Compared], reference: str) -> str:
    """Differences to the reference with their 95 % intervals over users; SVG."""
    rows = [row for row in rows if row.difference is not None]
    figure, axes = _lines_of(rows)
    found = [row.difference for row in rows if row.difference is not None]
    centre = np.array([each["difference"] for each in found])
    ends = np.abs(np.array([[each["low"], each["high"]] for each in found]).T - centre)
    axes.errorbar(centre, np.arange(len(rows))[::-1], xerr=ends, fmt="o", markersize=4)
    axes.axvline(0, color="#9a9a9a", linewidth=1)
    axes.set_xlabel(f"{MAIN} minus {reference}, 95 % interval over users")
    return svg(figure)


def _lines_of(rows: Sequence[Compared]) -> tuple[Any, Any]:
    """A plot with a line for each row."""
    figure, axes = plot(6, 0.7 + 0.28 * len(rows))
    axes.set_yticks(np.arange(len(rows))[::-1], [row.name for row in rows])
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def cost_chart(rows: Sequence[Compared], *, of: str = "training") -> str:
    """Quality against time, both as measured, SVG; ``of``: what the time was spent on."""
    points = {row.name: (row.minutes, row.test[MAIN]["mean"]) for row in rows if row.minutes is not None}
    figure, axes = plot(6, max(3, 0.6 + 0.17 * len(points)))
    for point in points.values():
        axes.plot(*point, "o", markersize=5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Times that are much alike would lie between two marks of a logarithmic axis.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high >= 10 * low else MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"minutes of {of}, one seed")
    axes.set_ylabel(MAIN)
    name_points(axes, points)
    return svg(figure)


def slice_chart(rows: Sequence[Compared], what: str, parts: Sequence[str]) -> str:
    """recall@10 of every row in each slice of users; SVG."""
    figure, axes = plot(6, 2.8)
    place = np.arange(len(parts))
    for row, look in zip(rows, line_looks(len(rows))):
        values = [row.slices[what][part] for part in parts]
        axes.plot(place, values, marker="o", markersize=3, label=row.name, **look)
    axes.set_xticks(place, list(parts))
    axes.set_xlabel(what)
    axes.set_ylabel("recall@10")
    legend_beside(axes)
    return svg(figure)


def validation_chart(rows: Sequence[Compared], along: str) -> str:
    """Validation ndcg@10 while training, first seed of every row; SVG.

    Args:
        rows: what is shown.
        along: what their places in training count.
    """
    rows = [row for row in rows if row.validation]
    figure, axes = plot(6, 2.8)
    for row, look in zip(rows, line_looks(len(rows))):
        few = len(row.validation) < 20
        axes.plot(*zip(*row.validation), marker="." if few else None, label=row.name, **look)
    axes.set_xlabel(along)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylabel(f"valid {MAIN}")
    legend_beside(axes)
    return svg(figure)
