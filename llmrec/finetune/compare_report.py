"""What the cells of a comparison of methods found: the paper's Table 3, costs and plots."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from llmrec.errors import MissingArtifactError
from llmrec.evaluation import analysis, comparison
from llmrec.evaluation.comparison import Compared, Section
from llmrec.evaluation.config import EvaluateConfig
from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k
from llmrec.evaluation.metrics import summarise as means_of
from llmrec.evaluation.rankings import ranks_in
from llmrec.evaluation.tables import Table, difference_cells, fine_tuned_in, mean_and_spread, spread_text
from llmrec.files import read_json, read_jsonl
from llmrec.finetune.compare_cells import BESIDE, folder_of, why_missing
from llmrec.finished import peak_memory_of, stage_manifest

METRICS = ("recall@10", "ndcg@10", "recall@5", "recall@20", "ndcg@5", "ndcg@20")
REPORT = Path("evaluate") / "report.html"
OF_DATA = ("num_users", "num_items", "split", "mask_seen", "data_warnings")
"""Of a cell's metrics.json: what all cells have in common."""


def cells_of(out: Path, row: str, seeds: list[int]) -> list[dict[str, Any]]:
    """What the finished cells of a row measured: metrics, ranks, costs, analyses."""
    found = []
    for seed in seeds:
        folder = folder_of(out, row, seed)
        try:
            manifest = stage_manifest(folder / "finetune")
            evaluated = read_json(folder / "evaluate" / "metrics.json")
            rows = evaluated["rows"]
        except MissingArtifactError:
            continue
        of_tuning = folder / "finetune" / "analysis.json"
        ranks = pq.read_table(folder / "evaluate" / "rankings.parquet")
        found.append(
            {
                "seed": seed,
                "rows": rows,
                "fine_tuned": fine_tuned_in(evaluated),
                "labels": evaluated["labels"],
                "trained_on": evaluated.get("trained_on", {}),
                "of_data": {name: evaluated[name] for name in OF_DATA if name in evaluated},
                "ranks": {name: ranks_in(ranks, name) for name in rows},
                "history_length": ranks["history_length"].to_numpy(),
                "length_edges": evaluated.get("length_edges", EvaluateConfig.length_edges),
                "target_group": np.array(ranks["target_group"].to_pylist()),
                "valid_mask_seen": manifest["config"].get("mask_seen", True),
                "metrics": read_json(folder / "finetune" / "metrics.json"),
                "log": read_jsonl(folder / "finetune" / "log.jsonl"),
                "memory": peak_memory_of(manifest),
                "analysis": read_json(of_tuning) if of_tuning.is_file() else {},
            }
        )
    return found


def summarise(cells: dict[str, list[dict[str, Any]]], seeds: list[int]) -> dict[str, Any]:
    """Everything that the table and the page show of finished cells, by row.

    The difference to the first row is of ndcg@10, user by user, of means over the seeds both have; p is
    that of a paired t-test, corrected for the number of rows (Holm).

    Returns:
        ``rows``, an entry for each, and after them the collaborative provider and popularity, for scale;
        ``reference``, the first row; users by part as ``slices``; and what is known of the data.
    """
    reference = next(iter(cells))
    some = next((cell for found in cells.values() for cell in found), None)
    parts = {} if some is None else parts_of(some)
    table = [row_of(name, found, len(seeds), parts) for name, found in cells.items()]
    users = {
        name: {cell["seed"]: ndcg_at_k(cell["ranks"][cell["fine_tuned"]], 10) for cell in found}
        for name, found in cells.items()
    }
    if some is not None:
        others = [name for name in some["rows"] if name not in (some["fine_tuned"], *BESIDE)]
        for name in [*others, "popularity"]:
            table.append(row_beside(name, some, parts))
            users[name] = dict.fromkeys(seeds, ndcg_at_k(some["ranks"][name], 10))
    add_differences(table, users, reference)
    counts = {what: {part: int(mask.sum()) for part, mask in masks.items()} for what, masks in parts.items()}
    of_data = {} if some is None else some["of_data"]
    return {"rows": table, "reference": reference, "seeds": seeds, "slices": counts, **of_data}


def row_of(
    name: str, found: list[dict[str, Any]], wanted: int, parts: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """What the finished cells of a row measured; their number alone if there are none.

    Args:
        name: of the row.
        found: its cells, see `cells_of`.
        wanted: how many there are to be.
        parts: see `parts_of`.
    """
    entry: dict[str, Any] = {"row": name, "seeds": len(found), "of": wanted}
    if not found:
        return entry
    first = found[0]
    entry |= quality_of([cell["ranks"][cell["fine_tuned"]] for cell in found], parts)
    entry |= {
        "seeds_done": sorted(cell["seed"] for cell in found),
        "valid_mask_seen": first["valid_mask_seen"],
        "trained_on": first["trained_on"].get(first["fine_tuned"], ""),
        "trained": first["metrics"]["parameters"]["trainable"],
        "tokens": round(np.mean([cell["metrics"]["tokens"] for cell in found])),
        "seconds": float(np.mean([training_seconds(cell["metrics"]) for cell in found])),
        "memory": max(cell["memory"] for cell in found),
        "validation": [[row["step"], row["valid_ndcg@10"]] for row in first["log"] if "valid_ndcg@10" in row],
    }
    entry |= after_tuning(found)
    valid = [row["valid_ndcg@10"] for cell in found if (row := cell["metrics"].get("valid"))]
    if len(valid) == len(found):
        entry["valid_ndcg@10"] = mean_and_spread(valid)
    return entry


def row_beside(name: str, cell: dict[str, Any], parts: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """A method that was ranked beside the fine-tuned ones, the same in every cell."""
    entry = {"row": name, "label": cell["labels"][name], "seeds": 1, "of": 1}
    return entry | quality_of([cell["ranks"][name]], parts) | {"trained_on": cell["trained_on"].get(name, "")}


def add_differences(
    table: list[dict[str, Any]], users: dict[str, dict[int, np.ndarray]], reference: str
) -> None:
    """Note in every row its difference to the reference, where both have a seed in common, and the corrected
    p.

    Args:
        table: the rows.
        users: ndcg@10 of every user, (U,), by seed, by row.
        reference: name of the row that others are compared with.
    """
    for entry in table:
        common = sorted(users[entry["row"]].keys() & users[reference].keys())
        if entry["row"] != reference and common:
            ours, theirs = (
                np.mean([users[row][seed] for seed in common], axis=0) for row in (entry["row"], reference)
            )
            entry |= analysis.difference_of(ours - theirs)
    tested = [entry for entry in table if entry.get("p_value") is not None]
    for entry, p in zip(tested, analysis.holm([entry["p_value"] for entry in tested])):
        entry["p"] = p


def parts_of(cell: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Users by part, bool (U,), by what parts them."""
    return {
        "history length": analysis.parts_by_length(cell["history_length"], cell["length_edges"]),
        "popularity of the target": analysis.parts_by_group(cell["target_group"]),
    }


def quality_of(ranks: list[np.ndarray], parts: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Metrics of some seeds' ranks, and the recall@10 of every part of the users."""
    values = [means_of(rank) for rank in ranks]
    found = np.mean([recall_at_k(rank, 10) for rank in ranks], axis=0)
    return {metric: mean_and_spread([value[metric] for value in values]) for metric in METRICS} | {
        "slices": {
            what: {part: float(found[mask].mean()) for part, mask in masks.items()}
            for what, masks in parts.items()
        }
    }


def training_seconds(metrics: dict[str, Any]) -> float:
    """Seconds of optimiser steps, those before fine-tuning included; without validation and analyses."""
    return metrics["train_seconds"] + metrics.get("align_seconds", 0.0)


def after_tuning(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Numerical rank of the item tokens (before their activation, where there is one), and tau of the
    collaborative codes after fine-tuning, of the first seed, where they were measured."""
    measured = found[0]["analysis"]
    spectra, taus = measured.get("spectra", {}), measured.get("tau", {}).get("after", {})
    name = "token_before_activation" if "token_before_activation" in spectra else "token"
    return {
        "rank_of_tokens": spectra.get(name, {}).get("numerical_rank"),
        "tau_of_codes": taus.get("codes_collab"),
    }


def add_reasons(results: dict[str, Any], out: Path) -> list[str]:
    """Note beside rows without a result why they cannot be run, where that is known; their names."""
    found = []
    for entry in results["rows"]:
        if not entry["seeds"] and (why := why_missing(out, entry["row"])).is_file():
            entry["why_missing"] = why.read_text(encoding="utf-8").strip()
            found.append(entry["row"])
    return found


def markdown(results: dict[str, Any]) -> str:
    """The comparison as Markdown tables; rows without a finished cell are shown as missing."""
    return comparison.as_markdown(sections(results), notes(results), code=True)


def page(results: dict[str, Any]) -> str:
    """One HTML page with the tables and the plots."""
    return comparison.as_page("Methods compared", sections(results), notes(results))


def sections(results: dict[str, Any]) -> list[Section]:
    """What the text and the page show."""
    table = results["rows"]
    done = [entry for entry in table if entry["seeds"]]
    shown = [compared(entry) for entry in done]
    if not shown:
        return [Section(table=quality_table(table, results["reference"]))]
    charts = [functools.partial(comparison.quality_chart, shown)]
    if any(row.difference for row in shown):
        charts.append(functools.partial(comparison.difference_chart, shown, results["reference"]))
    found = [
        Section(table=quality_table(table, results["reference"]), charts=charts),
        Section(
            title="Costs, and what the item tokens became",
            table=cost_table(done),
            charts=[functools.partial(comparison.cost_chart, shown)],
        ),
        *comparison.slice_sections(shown, results["slices"]),
    ]
    if any(row.validation for row in shown):
        chart = functools.partial(comparison.validation_chart, shown, "optimiser step")
        found.append(Section(title="Validation while training", charts=[chart]))
    links = {
        f"{entry['row']}, seed {seed}": (folder_of(Path(), entry["row"], seed) / REPORT).as_posix()
        for entry in done
        for seed in entry.get("seeds_done", [])
    }
    return [*found, Section(title="Reports of the single runs", links=links)]


def compared(entry: dict[str, Any]) -> Compared:
    """An entry as charts show it."""
    return Compared(
        name=name_of(entry),
        test={metric: entry[metric] for metric in METRICS},
        difference=entry if "difference" in entry else None,
        minutes=entry["seconds"] / 60 if "seconds" in entry else None,
        slices=entry["slices"],
        validation=[(step, value) for step, value in entry.get("validation", [])],
    )


def name_of(entry: dict[str, Any]) -> str:
    return entry.get("label", entry["row"])


def quality_table(table: list[dict[str, Any]], reference: str) -> Table:
    """The paper's Table 3. Differences stand in the middle, so that they can be seen in a narrow window."""
    first, more = METRICS[:2], METRICS[2:]
    head = ["method", "seeds", *first, f"ndcg@10 minus {reference} (95 % interval)", "p", "valid ndcg@10"]
    lines = []
    for entry in table:
        line = [name_of(entry), f"{entry['seeds']} of {entry['of']}"]
        if not entry["seeds"]:
            lines.append([*line, "missing"])
            continue
        line += [spread_text(entry[metric]) for metric in first]
        line += difference_cells(entry)
        line.append(spread_text(entry["valid_ndcg@10"]) if "valid_ndcg@10" in entry else "")
        lines.append(line + [spread_text(entry[metric]) for metric in more])
    return Table([*head, *more], lines)


def cost_table(table: list[dict[str, Any]]) -> Table:
    """What was trained for fine-tuned rows, and with what effort; and what `after_tuning` tells."""
    head = ["method", "trained", "tokens", "train seconds", "peak MiB", "rank", "tau"]
    lines = []
    for entry in table:
        if "trained" in entry:
            rank, tau = entry["rank_of_tokens"], entry["tau_of_codes"]
            lines.append(
                [
                    name_of(entry),
                    f"{entry['trained']:,}",
                    f"{entry['tokens']:,}",
                    f"{entry['seconds']:.0f}",
                    f"{entry['memory'] / 2**20:,.0f}",
                    "" if rank is None else str(rank),
                    "" if tau is None else f"{tau:.3f}",
                ]
            )
    return Table(head, lines)


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the figures, and why rows are missing."""
    found = []
    if "num_users" in results:
        history = "left out" if results["mask_seen"] else "ranked, too"
        found = [comparison.protocol(results), f"Items of the history are {history}."]
        if other := [
            f"`{entry['row']}`"
            for entry in results["rows"]
            if entry.get("validation") and entry["valid_mask_seen"] != results["mask_seen"]
        ]:
            history = "ranked, too" if results["mask_seen"] else "left out"
            found.append(f"At validation they are {history}: {', '.join(other)}.")
    if short := [f"`{entry['row']}`" for entry in results["rows"] if 0 < entry["seeds"] < entry["of"]]:
        found.append(
            f"Of {', '.join(short)} some seeds are missing; differences are of the seeds that both rows have."
        )
    found.append(
        "trained: parameters; tokens: of all training; train seconds: of optimiser steps alone; rank: "
        "numerical rank of the item tokens before their activation; tau: Kendall's, of the collaborative "
        "codes' distances after fine-tuning; both of the first seed."
    )
    if more := [f"`{entry['row']}`" for entry in results["rows"] if "valid" in entry.get("trained_on", "")]:
        found.append(f"Learned from train and validation items: {', '.join(more)}.")
    found += [
        f"`{entry['row']}` cannot be run with these settings: {entry['why_missing']}"
        for entry in results["rows"]
        if "why_missing" in entry
    ]
    found += results.get("data_warnings", [])
    return [*found, *([comparison.provenance(results)] if "machine" in results else [])]
