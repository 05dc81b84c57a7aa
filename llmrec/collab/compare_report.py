"""The comparison of sequence models as text, markdown and one page that stands alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from llmrec import __version__
from llmrec.evaluation.report import part_curves
from llmrec.evaluation.tables import p_text, spread_text
from llmrec.pages import drawing, environment, epochs_along, legend_above, line_colours, svg

COLUMNS = ("recall@10", "ndcg@10")
MORE_COLUMNS = ("recall@5", "recall@20", "ndcg@5", "ndcg@20", "mrr@10")
"""What stands behind the difference to the reference, where a narrow window does not reach."""


def label(name: str, row: dict[str, Any]) -> str:
    """A row's name with its loss, which is part of a method."""
    loss = row.get("loss")
    return name if loss is None or loss in name else f"{name} ({loss})"


def difference(row: dict[str, Any], metric: str) -> str:
    """Difference to the reference with its interval and corrected p."""
    found = row.get("difference", {}).get(metric)
    if found is None:
        return ""
    inside = f"{found['low']:+.4f} to {found['high']:+.4f}"
    if p := p_text(found.get("holm_p")):
        inside += f", p {p}"
    return f"{found['difference']:+.4f} ({inside})"


def markdown(results: dict[str, Any]) -> str:
    """Quality, costs and slices as markdown tables; rows without a finished cell are shown as missing."""
    rows = ordered(results["rows"])
    reference = results["reference"]
    head = ["method", "seeds", "recall@10", "ndcg@10", "seen kept: recall@10", "ndcg@10"]
    head += [
        f"ndcg@10 minus {reference}",
        "valid ndcg@10",
        "parameters",
        "s / epoch",
        "epochs (best)",
        "peak MiB",
    ]
    lines = [table_line(head), table_line(["---"] * len(head))]
    for name, row in rows.items():
        if not row["num_seeds"]:
            lines.append(table_line([name, f"0 of {row['num_wanted']}", *["missing"] * (len(head) - 2)]))
            continue
        lines.append(
            table_line(
                [
                    label(name, row),
                    f"{row['num_seeds']} of {row['num_wanted']}",
                    spread_text(row["test"]["recall@10"]),
                    spread_text(row["test"]["ndcg@10"]),
                    spread_text(row["test_seen_kept"]["recall@10"]),
                    spread_text(row["test_seen_kept"]["ndcg@10"]),
                    difference(row, "ndcg@10"),
                    spread_text(row["valid"]["ndcg@10"]) if "ndcg@10" in row["valid"] else "",
                    f"{row['num_parameters']:,}",
                    f"{row['seconds_per_epoch']:.1f}",
                    f"{row['epochs']:.0f} ({row['best_epoch']:.0f})",
                    f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                ]
            )
        )
    if popular := results.get("popularity"):
        figures = [popular[kind][name] for kind in ("test", "test_seen_kept") for name in COLUMNS]
        cells = ["popularity", "", *(f"{value:.4f}" for value in figures)]
        lines.append(table_line([*cells, *[""] * (len(head) - len(cells))]))
    for what, parts in results["slices"].items():
        lines += ["", f"recall@10 by {what}:", ""]
        lines.append(table_line(["method", *(f"{part} ({count:,} users)" for part, count in parts.items())]))
        lines.append(table_line(["---"] * (len(parts) + 1)))
        for name, row in rows.items():
            if row["num_seeds"]:
                values = [f"{row['slices'][what][part]['recall@10']:.4f}" for part in parts]
                lines.append(table_line([label(name, row), *values]))
    return "\n".join([*lines, "", *notes(results)]) + "\n"


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the figures."""
    jobs, where = results["jobs"], results["machine"]
    trained = f"Machine: {where}; {jobs} trained at a time" if jobs else f"Summed up on {where}"
    return [
        f"{results['num_users']:,} users, {results['num_items']:,} items, split {results['split']}; every "
        "item is ranked, items of the history left out unless 'seen kept'. ± is the standard deviation over "
        "seeds; intervals (95 %) and p (paired t-test, corrected by Holm) are over users, of the mean over "
        "seeds. Settings are to be chosen by the validation column, not by what test items say.",
        *how_epochs_were_chosen(results["rows"]),
        f"{trained}. Command: {results['command']}",
    ]


def how_epochs_were_chosen(rows: dict[str, Any]) -> list[str]:
    """Sentences on what epochs were chosen by and what was learned from, where rows differ by row."""
    done = {name: row for name, row in rows.items() if row["num_seeds"]}
    kinds = {
        "chose their epoch by validation ndcg@10": lambda row: row["select"] == "valid",
        "kept the last epoch": lambda row: row["select"] == "last" and not row["include_valid"],
        "kept the last epoch, and learned from validation items too": lambda row: row["include_valid"],
    }
    found = {}
    for what, fits in kinds.items():
        if names := [name for name, row in done.items() if fits(row)]:
            found[what] = names
    if len(found) == 1:
        return [f"All rows {what}." for what in found]
    return [f"{', '.join(names)} {what}." for what, names in found.items()]


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def ordered(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows by test ndcg@10, best first; missing ones last."""

    def key(name: str) -> float:
        return -rows[name]["test"]["ndcg@10"]["mean"] if rows[name]["num_seeds"] else 1.0

    return {name: rows[name] for name in sorted(rows, key=key)}


def page(results: dict[str, Any]) -> str:
    """One HTML page with the table and the plots."""
    rows = {name: row for name, row in ordered(results["rows"]).items() if row["num_seeds"]}
    with drawing():
        charts = {
            "quality": quality_chart(rows),
            "cost": cost_chart(rows),
            "slices": {what: slice_chart(rows, what, parts) for what, parts in results["slices"].items()},
            "curves": validation_chart(rows),
            "parts": {
                label(name, row): part_curves(row["log"])
                for name, row in rows.items()
                if any(entry.get("parts") for entry in row["log"])
            },
        }
    return (
        environment(Path(__file__).parent)
        .get_template("compare.html.j2")
        .render(
            rows=ordered(results["rows"]),
            columns=COLUMNS,
            more_columns=MORE_COLUMNS,
            label=label,
            spread=spread_text,
            difference=difference,
            popularity=results.get("popularity"),
            reference=results["reference"],
            charts=charts,
            notes=notes(results),
            ties=results.get("ties"),
            version=__version__,
        )
    )


def quality_chart(rows: dict[str, Any]) -> str:
    """Dots for means, bars for one standard deviation over seeds; SVG."""
    figure, axes = plt.subplots(figsize=(6, 0.7 + 0.28 * len(rows)))
    place = np.arange(len(rows))[::-1]
    for offset, metric in ((0.12, "recall@10"), (-0.12, "ndcg@10")):
        figures = [row["test"][metric] for row in rows.values()]
        axes.errorbar(
            [found["mean"] for found in figures],
            place + offset,
            xerr=[found["sd"] or 0 for found in figures],
            fmt="o",
            markersize=4,
            label=metric,
        )
    axes.set_yticks(place, [label(name, row) for name, row in rows.items()])
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    legend_above(axes)
    return svg(figure)


def cost_chart(rows: dict[str, Any]) -> str:
    """Quality against training time, both as measured; SVG."""
    figure, axes = plt.subplots(figsize=(6, 3))
    for name, row in rows.items():
        minutes = row["seconds"] / 60
        axes.plot(minutes, row["test"]["ndcg@10"]["mean"], "o", markersize=5)
        axes.annotate(
            name,
            (minutes, row["test"]["ndcg@10"]["mean"]),
            xytext=(5, 2),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("minutes of training, one seed")
    axes.set_ylabel("ndcg@10")
    return svg(figure)


def slice_chart(rows: dict[str, Any], what: str, parts: dict[str, int]) -> str:
    """recall@10 of every row in each slice of users; SVG."""
    figure, axes = plt.subplots(figsize=(6, 2.8))
    place = np.arange(len(parts))
    colours = line_colours(len(rows))
    for number, (name, row) in enumerate(rows.items()):
        values = [row["slices"][what][part]["recall@10"] for part in parts]
        axes.plot(place, values, marker="o", markersize=3, color=colours[number], label=label(name, row))
    axes.set_xticks(place, [f"{part}\n{count:,} users" for part, count in parts.items()])
    axes.set_xlabel(what)
    axes.set_ylabel("recall@10")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure)


def validation_chart(rows: dict[str, Any]) -> str:
    """Validation ndcg@10 over epochs, first seed of every row; SVG."""
    figure, axes = plt.subplots(figsize=(6, 2.8))
    colours = line_colours(len(rows))
    for number, (name, row) in enumerate(rows.items()):
        shown = [entry for entry in row["log"] if "valid_ndcg@10" in entry]
        axes.plot(
            [entry["epoch"] for entry in shown],
            [entry["valid_ndcg@10"] for entry in shown],
            color=colours[number],
            label=label(name, row),
        )
    epochs_along(axes)
    axes.set_ylabel("valid ndcg@10")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure)
