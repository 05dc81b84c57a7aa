"""MME-SID, the methods it is compared with and its ablations, on one data set: the paper's Table 3, for
several seeds, with costs.

All rows share the data, vectors and settings of one recipe; a row changes what its name says and no more.
A comparison that was stopped goes on, and what is missing is shown as missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec import jobs, tracking
from llmrec.console import guarded, set_up_logging
from llmrec.errors import ConfigError, MissingArtifactError, TrainingError
from llmrec.evaluation.tables import difference_cells, mean_and_spread, spread_text
from llmrec.finetune.compare_cells import (
    BESIDE,
    ROWS,
    cells_to_run,
    check_settings,
    own_rows,
    prepare,
    run_cells,
    why_missing,
)
from llmrec.recipe import Recipe, apply_overrides, recipe_of

METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20")


def main(
    recipe: Callable[[], Recipe] | None = None,
    arguments: list[str] | None = None,
    *,
    description: str | None = None,
) -> None:
    """Compare from the command line, and exit (codes as in `llmrec.recipe.main`).

    Args:
        recipe: whose data, vectors and settings are used; None: the command line names a recipe's file.
        arguments: command line; None: the process's.
        description: help text.
    """
    options = parser(recipe is None, description).parse_args(arguments)
    sys.exit(guarded(lambda: compare(options, recipe)))


def parser(names_recipe: bool, description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n" + "\n".join(f"  {name:16}{row.meaning}" for name, row in ROWS.items()),
    )  # fmt: skip
    if names_recipe:
        made.add_argument("recipe", metavar="RECIPE", help="a recipe's file")
    made.add_argument("--run-dir", metavar="DIR", help="where the recipe's stages are (runs/NAME)")
    made.add_argument("--out", metavar="DIR", help="where cells and tables go (RUN_DIR/methods)")
    made.add_argument(
        "--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="see below (all, or none beside --row)"
    )
    made.add_argument(
        "--row", nargs="+", action="append", default=[], metavar="NAME FIELD=VALUE",
        help="a row of your own: a name, and settings of finetune that it changes; may be repeated",
    )  # fmt: skip
    jobs.add_seeds(made)
    made.add_argument(
        "--refit",
        metavar="DIR",
        help="learn from validation items too, for as many epochs as each cell of the comparison in this run "
        "directory chose by them",
    )
    jobs.add_argument(made)
    tracking.add_argument(made)
    made.add_argument(
        "--summarise",
        action="store_true",
        help="train nothing; make the table of what there is (a table of some --rows takes no other's place)",
    )
    made.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="STAGE.FIELD=VALUE", help="change settings"
    )
    return made


def compare(options: argparse.Namespace, recipe: Callable[[], Recipe] | None) -> None:
    """Train what is missing; print the table and write table.md and table.json."""
    if recipe is None:
        name, made = Path(options.recipe).stem, recipe_of(Path(options.recipe))
    else:
        name, made = Path(recipe.__code__.co_filename).stem, recipe()
    chosen = apply_overrides(made, options.set)
    names = options.rows or ([] if options.row else list(ROWS))
    rows = {name: ROWS[name] for name in names} | own_rows(chosen, options.row)
    set_up_logging()
    tracking.choose(options.track)
    root = Path(options.run_dir or Path("runs") / (f"{name}_refit" if options.refit else name))
    out = Path(options.out or root / "methods")
    from llmrec import distributed
    from llmrec.files import write_json

    cells = len(rows) * len(options.seeds)
    at_a_time = min(cells, options.jobs or (1 if distributed.world_size() > 1 else jobs.default()))
    if at_a_time > 1 and distributed.world_size() > 1:
        raise ConfigError("--jobs starts processes of its own; leave it out under a launcher of several")
    failed: list[str] = []
    refit = Path(options.refit) if options.refit else None
    if options.summarise:
        check_settings(chosen, rows, options.seeds, out, refit)
    else:
        work = (prepare(chosen, root, refit), rows, options.seeds, root, out, refit)
        if at_a_time > 1:
            failed = jobs.run(cells_to_run(*work), at_a_time)
        else:
            run_cells(*work)
    if not distributed.is_main():
        return
    found = summarise({row: cells_of(out, row, options.seeds) for row in rows}, options.seeds)
    reasons: dict[str, str] = {}
    for entry in found:
        if entry["row"] in rows and not entry["seeds"] and (why := why_missing(out, entry["row"])).is_file():
            reasons[entry["row"]] = entry["why_missing"] = why.read_text(encoding="utf-8").strip()
    text = markdown(found)
    print(text)
    some = options.summarise and options.rows and (out / "table.md").exists()
    if out.is_dir() and not some:  # the files may be of more rows
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        write_json(out / "table.json", found)
    if failed:
        raise TrainingError(f"{len(failed)} of {cells} cells failed: {'; '.join(failed)}")
    asked = [*(options.rows or []), *(name for name, *_ in options.row)]
    if (cannot := [name for name in asked if name in reasons]) and not options.summarise:
        raise ConfigError(f"{', '.join(cannot)} cannot be run with these settings; the table says why")


def cells_of(out: Path, row: str, seeds: list[int]) -> list[dict[str, Any]]:
    """What the finished cells of a row measured: metrics, ranks, costs, analyses."""
    import pyarrow.parquet as pq

    from llmrec.evaluation.rankings import ranks_in
    from llmrec.evaluation.tables import fine_tuned_in
    from llmrec.files import read_json
    from llmrec.finished import peak_memory_of, stage_manifest

    found = []
    for seed in seeds:
        folder = out / row / f"seed{seed}"
        try:
            manifest = stage_manifest(folder / "finetune")
            evaluated = read_json(folder / "evaluate" / "metrics.json")
            rows = evaluated["rows"]
        except MissingArtifactError:
            continue
        analysis = folder / "finetune" / "analysis.json"
        ranks = pq.read_table(folder / "evaluate" / "rankings.parquet")
        found.append(
            {
                "seed": seed,
                "rows": rows,
                "fine_tuned": fine_tuned_in(evaluated),
                "labels": evaluated["labels"],
                "trained_on": evaluated.get("trained_on", {}),
                "ranks": {name: ranks_in(ranks, name) for name in rows},
                "metrics": read_json(folder / "finetune" / "metrics.json"),
                "memory": peak_memory_of(manifest),
                "analysis": read_json(analysis) if analysis.is_file() else {},
            }
        )
    return found


def summarise(cells: dict[str, list[dict[str, Any]]], seeds: list[int]) -> list[dict[str, Any]]:
    """One entry per row, and after them the collaborative provider and popularity, for scale.

    The difference to the first row is of ndcg@10, user by user, of means over the seeds both have; p is
    that of a paired t-test, corrected for the number of rows (Holm).
    """
    import numpy as np

    from llmrec.evaluation.analysis import difference_of, holm
    from llmrec.evaluation.metrics import ndcg_at_k
    from llmrec.evaluation.metrics import summarise as means_of

    table, users = [], {}
    reference = next(iter(cells))
    for name, found in cells.items():
        entry: dict[str, Any] = {"row": name, "seeds": len(found), "of": len(seeds)}
        if found:
            ranks = {cell["seed"]: cell["ranks"][cell["fine_tuned"]] for cell in found}
            values = [means_of(rank) for rank in ranks.values()]
            users[name] = {seed: ndcg_at_k(rank, 10) for seed, rank in ranks.items()}
            entry |= {metric: mean_and_spread([value[metric] for value in values]) for metric in METRICS}
            entry |= {
                "trained_on": found[0]["trained_on"].get(found[0]["fine_tuned"], ""),
                "trained": found[0]["metrics"]["parameters"]["trainable"],
                "tokens": found[0]["metrics"]["tokens"],
                "seconds": float(np.mean([training_seconds(cell["metrics"]) for cell in found])),
                "memory": max(cell["memory"] for cell in found),
            }
            entry |= after_tuning(found)
            valid = [row["valid_ndcg@10"] for cell in found if (row := cell["metrics"].get("valid"))]
            if len(valid) == len(found):
                entry["valid_ndcg@10"] = mean_and_spread(valid)
        table.append(entry)
    some = next((cell for found in cells.values() for cell in found), None)
    if some is not None:
        others = [name for name in some["rows"] if name not in (some["fine_tuned"], *BESIDE)]
        for name in [*others, "popularity"]:
            users[name] = {seed: ndcg_at_k(some["ranks"][name], 10) for seed in seeds}
            of_it = means_of(some["ranks"][name])
            own = {metric: mean_and_spread([of_it[metric]]) for metric in METRICS}
            entry = {"row": name, "label": some["labels"][name], "seeds": 1, "of": 1, **own}
            table.append(entry | {"trained_on": some["trained_on"].get(name, "")})
    for entry in table:
        common = sorted(users.get(entry["row"], {}).keys() & users.get(reference, {}).keys())
        if entry["row"] != reference and common:
            ours, theirs = (
                np.mean([users[row][seed] for seed in common], axis=0) for row in (entry["row"], reference)
            )
            entry |= difference_of(ours - theirs, samples=2000, seed=0)
    tested = [entry for entry in table if entry.get("p_value") is not None]
    for entry, p in zip(tested, holm([entry["p_value"] for entry in tested])):
        entry["p"] = p
    return table


def training_seconds(metrics: dict[str, Any]) -> float:
    """Seconds of optimiser steps, those before fine-tuning included; without validation and analyses."""
    return metrics["train_seconds"] + metrics.get("align_seconds", 0.0)


def after_tuning(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Numerical rank of the item tokens (before their activation, where there is one), and tau of the
    collaborative codes after fine-tuning, of the first seed, where they were measured."""
    analysis = found[0]["analysis"]
    spectra, taus = analysis.get("spectra", {}), analysis.get("tau", {}).get("after", {})
    name = "token_before_activation" if "token_before_activation" in spectra else "token"
    return {
        "rank_of_tokens": spectra.get(name, {}).get("numerical_rank"),
        "tau_of_codes": taus.get("codes_collab"),
    }


def markdown(table: list[dict[str, Any]]) -> str:
    """The comparison as a Markdown table; rows without a finished cell are shown as missing."""
    head = [
        "method",
        "seeds",
        *METRICS,
        "ndcg@10 to the first (95 % interval)",
        "p",
        "valid ndcg@10",
        "rank",
        "tau",
    ]
    head += ["trained", "tokens", "train seconds", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in table:
        cells = [f"`{entry.get('label', entry['row'])}`", f"{entry['seeds']} of {entry['of']}"]
        if not entry["seeds"]:
            cells += ["missing"] + [""] * (len(head) - 3)
            lines.append("| " + " | ".join(cells) + " |")
            continue
        cells += [spread_text(entry[metric]) for metric in METRICS]
        cells += difference_cells(entry)
        cells.append(spread_text(entry["valid_ndcg@10"]) if "valid_ndcg@10" in entry else "")
        cells.append("" if entry.get("rank_of_tokens") is None else str(entry["rank_of_tokens"]))
        cells.append("" if entry.get("tau_of_codes") is None else f"{entry['tau_of_codes']:.3f}")
        if "trained" in entry:
            cells += [f"{entry['trained']:,}", f"{entry['tokens']:,}", f"{entry['seconds']:.0f}"]
            cells.append(f"{entry['memory'] / 2**20:,.0f}")
        else:
            cells += [""] * 4
        lines.append("| " + " | ".join(cells) + " |")
    more = [f"`{entry['row']}`" for entry in table if "valid" in entry.get("trained_on", "")]
    if more:
        lines += ["", f"Learned from train and validation items: {', '.join(more)}."]
    for entry in table:
        if "why_missing" in entry:
            lines += ["", f"`{entry['row']}` cannot be run with these settings: {entry['why_missing']}"]
    return "\n".join(lines)
