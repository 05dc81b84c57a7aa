"""MME-SID, the methods it is compared with and its ablations, on one data set: the paper's Table 3, for
several seeds, with costs.

All rows share the data, vectors and settings of one recipe; a row changes what its name says and no more.
A comparison that was stopped goes on, and what is missing is shown as missing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from llmrec import jobs, tracking
from llmrec.console import guarded, set_up_logging
from llmrec.errors import ConfigError, TrainingError
from llmrec.finetune.compare_cells import (
    ROWS,
    cells_to_run,
    check_settings,
    own_rows,
    prepare,
    run_cells,
)
from llmrec.recipe import Recipe, apply_overrides, name_of, recipe_of


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
    jobs.add_row(made, "a row of your own: a name, and settings of finetune that it changes")
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
    """Train what is missing; print the table and write it as table.md, results.json and report.html."""
    if recipe is None:
        name, made = Path(options.recipe).stem, recipe_of(Path(options.recipe))
    else:
        name, made = name_of(recipe)[0], recipe()
    chosen = apply_overrides(made, options.set)
    names = options.rows or ([] if options.row else list(ROWS))
    rows = {name: ROWS[name] for name in names} | own_rows(chosen, options.row)
    set_up_logging()
    tracking.choose(options.track)
    root = Path(options.run_dir or Path("runs") / (f"{name}_refit" if options.refit else name))
    out = Path(options.out or root / "methods")
    from llmrec import distributed, machine
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
    from llmrec.finetune.compare_report import add_reasons, cells_of, markdown, page, summarise

    results = summarise({row: cells_of(out, row, options.seeds) for row in rows}, options.seeds)
    results |= {
        "machine": machine.describe(),
        "jobs": None if options.summarise else at_a_time,
        "command": shlex.join(["python", *sys.argv]),
        "failed": failed,
    }
    reasons = add_reasons(results, out)
    text = markdown(results)
    print(text)
    some = options.summarise and options.rows and (out / "table.md").exists()
    if out.is_dir() and not some:  # the files may be of more rows
        (out / "table.md").write_text(text, encoding="utf-8")
        write_json(out / "results.json", results)
        (out / "report.html").write_text(page(results), encoding="utf-8")
        print(f"report: {out / 'report.html'}")
    if failed:
        raise TrainingError(f"{len(failed)} of {cells} cells failed: {'; '.join(failed)}")
    asked = [*(options.rows or []), *(name for name, *_ in options.row)]
    if (cannot := [name for name in asked if name in reasons]) and not options.summarise:
        raise ConfigError(f"{', '.join(cannot)} cannot be run with these settings; the table says why")
