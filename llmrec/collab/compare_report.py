"""The comparison of sequence models as Markdown and as one page that stands alone."""

from __future__ import annotations

import functools
from typing import Any

from llmrec.evaluation import comparison
from llmrec.evaluation.comparison import Compared, Section
from llmrec.evaluation.report import part_curves
from llmrec.evaluation.tables import Table, difference_cells, spread_text

METRICS = ("recall@10", "ndcg@10", "recall@5", "recall@20", "ndcg@5", "ndcg@20", "mrr@10")
KEPT = ("recall@10", "ndcg@10")
"""Metrics shown with items of the history kept, too."""


def label(name: str, row: dict[str, Any]) -> str:
    """A row's name with its loss, which is part of a method."""
    loss = row.get("loss")
    return name if loss is None or loss in name.split("-") else f"{name} ({loss})"


def difference(row: dict[str, Any]) -> dict[str, Any]:
    """A row's difference to the reference in ndcg@10, with the corrected p; nothing without one."""
    found = row.get("difference", {}).get(comparison.MAIN, {})
    return found | {"p": found.get("holm_p")}


def markdown(results: dict[str, Any]) -> str:
    """Quality, costs and slices as Markdown tables; rows without a finished cell are shown as missing."""
    return comparison.as_markdown(sections(results), notes(results))


def page(results: dict[str, Any]) -> str:
    """One HTML page with the tables and the plots."""
    return comparison.as_page("Sequence models compared", sections(results), notes(results))


def sections(results: dict[str, Any]) -> list[Section]:
    """What the text and the page show."""
    rows, reference = ordered(results["rows"]), results["reference"]
    done = {name: row for name, row in rows.items() if row["num_seeds"]}
    shown = [compared(name, row) for name, row in done.items()]
    quality = Section(table=quality_table(rows, results))
    if not shown:
        return [quality]
    charts = [functools.partial(comparison.quality_chart, shown)]
    if any(row.difference for row in shown):
        charts.append(functools.partial(comparison.difference_chart, shown, reference))
    inside = {
        label(name, row): functools.partial(part_curves, row["log"])
        for name, row in done.items()
        if any(entry.get("parts") for entry in row["log"])
    }
    found = [
        Section(table=quality.table, charts=charts),
        Section(
            title="Costs",
            table=cost_table(done),
            charts=[functools.partial(comparison.cost_chart, shown, of="training and validation")],
        ),
        *comparison.slice_sections(shown, results["slices"]),
        Section(
            title="Validation while training",
            charts=[functools.partial(comparison.validation_chart, shown, "epoch")],
        ),
    ]
    if inside:
        note = "What each model reports about itself, epoch by epoch, first seed."
        found.append(Section(title="Inside the models", note=note, folded=inside))
    return found


def compared(name: str, row: dict[str, Any]) -> Compared:
    """A row as charts show it."""
    return Compared(
        name=label(name, row),
        test=row["test"],
        difference=difference(row) if "difference" in row else None,
        minutes=row["seconds"] / 60,
        slices={
            what: {part: figures["recall@10"] for part, figures in parts.items()}
            for what, parts in row["slices"].items()
        },
        validation=[
            (entry["epoch"], entry["valid_ndcg@10"]) for entry in row["log"] if "valid_ndcg@10" in entry
        ],
    )


def quality_table(rows: dict[str, Any], results: dict[str, Any]) -> Table:
    """Metrics of every row, missing ones too, and popularity for scale."""
    first, more = METRICS[:2], METRICS[2:]
    head = ["method", "seeds", *first, f"ndcg@10 minus {results['reference']} (95 % interval)", "p"]
    head += ["valid ndcg@10", *(f"seen kept: {name}" for name in KEPT), *more]
    lines = []
    for name, row in rows.items():
        if not row["num_seeds"]:
            lines.append([name, f"0 of {row['num_wanted']}", "missing"])
            continue
        valid = row["valid"].get("ndcg@10")
        lines.append(
            [
                label(name, row),
                f"{row['num_seeds']} of {row['num_wanted']}",
                *(spread_text(row["test"][metric]) for metric in first),
                *difference_cells(difference(row)),
                "" if valid is None else spread_text(valid),
                *(spread_text(row["test_seen_kept"][metric]) for metric in KEPT),
                *(spread_text(row["test"][metric]) for metric in more),
            ]
        )
    if popular := results.get("popularity"):
        test = {name: f"{value:.4f}" for name, value in popular["test"].items()}
        kept = [f"{popular['test_seen_kept'][name]:.4f}" for name in KEPT]
        before, after = ([test[name] for name in names] for names in (first, more))
        lines.append(["popularity", "", *before, "", "", "", *kept, *after])
    return Table(head, lines)


def cost_table(rows: dict[str, Any]) -> Table:
    """What finished rows took."""
    head = ["method", "parameters", "s / epoch", "targets / s", "epochs", "best epoch", "minutes in all"]
    return Table(
        [*head, "peak MiB"],
        [
            [
                label(name, row),
                f"{row['num_parameters']:,}",
                f"{row['seconds_per_epoch']:.1f}",
                f"{row['targets_per_second']:,.0f}",
                f"{row['epochs']:.0f}",
                f"{row['best_epoch']:.0f}",
                f"{row['seconds'] / 60:.1f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            ]
            for name, row in rows.items()
        ],
    )


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the figures."""
    found = [
        comparison.protocol(results),
        "Items of the history are left out, unless 'seen kept'.",
        *fewer_seeds(results["rows"]),
        *how_epochs_were_chosen(results["rows"]),
        *(
            f"{name}, seed {', '.join(map(str, seeds))}: no better than popularity on validation items; "
            "nothing was learned of users."
            for name, row in results["rows"].items()
            if (seeds := row.get("learned_nothing"))
        ),
    ]
    return [*found, *results["data_warnings"], comparison.provenance(results)]


def fewer_seeds(rows: dict[str, Any]) -> list[str]:
    """A sentence on rows that lack cells, if any has but some."""
    names = [name for name, row in rows.items() if 0 < row["num_seeds"] < row["num_wanted"]]
    if not names:
        return []
    return [
        f"Of {', '.join(names)} some seeds are missing; their differences are of the mean over the others."
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
    if kept := [
        name for name, row in done.items() if row["select"] == "valid" and not row.get("mask_seen", True)
    ]:
        found["ranked items of the history, too, at validation"] = kept
    return [
        f"{'All rows' if names == list(done) else ', '.join(names)} {what}." for what, names in found.items()
    ]


def ordered(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows by test ndcg@10, best first; missing ones last."""

    def key(name: str) -> float:
        return -rows[name]["test"]["ndcg@10"]["mean"] if rows[name]["num_seeds"] else 1.0

    return {name: rows[name] for name in sorted(rows, key=key)}
