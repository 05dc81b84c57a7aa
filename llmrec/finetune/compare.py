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

from llmrec import jobs, tracking
from llmrec.console import guarded, set_up_logging
from llmrec.errors import ConfigError, TrainingError
from llmrec.finetune.compare_cells import (
    ROWS,
    Comparison,
    cells_to_run,
    check_settings,
    own_rows,
    prepare,
    run_cells,
)
from llmrec.recipe import Recipe, apply_overrides, name_of, recipe_of

OF_CELLS = {
    "finetune.seed": "seeds are given by --seeds, to all rows",
    "finetune.method": "methods are chosen by --rows, or by --row NAME method=...",
}
"""What tells cells apart, and is no setting of all."""


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
    asked = comparison_of(options, recipe)
    set_up_logging()
    tracking.choose(options.track)
    from llmrec import launched

    at_a_time = cells_at_a_time(options.jobs, len(asked.rows) * len(asked.seeds))
    failed: list[str] = []
    if options.summarise:
        check_settings(asked)
    else:
        failed = train(asked, at_a_time)
    if not launched.is_main():
        return
    some = bool(options.summarise and options.rows)
    impossible = show(asked, None if options.summarise else at_a_time, failed, some=some)
    if failed:
        cells = len(asked.rows) * len(asked.seeds)
        raise TrainingError(f"{len(failed)} of {cells} cells failed: {'; '.join(failed)}")
    named = [*(options.rows or []), *(name for name, *_ in options.row)]
    if (cannot := [name for name in named if name in impossible]) and not options.summarise:
        raise ConfigError(f"{', '.join(cannot)} cannot be run with these settings; the table says why")


def comparison_of(options: argparse.Namespace, recipe: Callable[[], Recipe] | None) -> Comparison:
    """What the command line asks for.

    Raises:
        ConfigError: it names settings, rows or a recipe that cannot be.
    """
    if recipe is None:
        name, made = Path(options.recipe).stem, recipe_of(Path(options.recipe))
    else:
        name, made = name_of(recipe)[0], recipe()
    for path in (assignment.partition("=")[0].strip() for assignment in options.set):
        if path in OF_CELLS:
            raise ConfigError(f"--set {path}: {OF_CELLS[path]}")
    chosen = apply_overrides(made, options.set)
    rows = options.rows or ([] if options.row else list(ROWS))
    root = Path(options.run_dir or Path("runs") / (f"{name}_refit" if options.refit else name))
    return Comparison(
        recipe=chosen,
        rows={row: ROWS[row] for row in rows} | own_rows(chosen, options.row),
        seeds=options.seeds,
        root=root,
        out=Path(options.out or root / "methods"),
        refit=Path(options.refit) if options.refit else None,
    )


def cells_at_a_time(asked: int | None, cells: int) -> int:
    """How many cells are trained at a time.

    Raises:
        ConfigError: several, where a launcher has started several processes already.
    """
    from llmrec import launched

    several = launched.world_size() > 1
    at_a_time = min(cells, asked or (1 if several else jobs.default()))
    if at_a_time > 1 and several:
        raise ConfigError("--jobs starts processes of its own; leave it out under a launcher of several")
    return at_a_time


def train(asked: Comparison, at_a_time: int) -> list[str]:
    """Run what is not finished, several cells at a time in processes of their own, or one by one in this one.

    Returns:
        A line for each cell that failed.
    """
    prepared = prepare(asked)
    if at_a_time > 1:
        return jobs.run(cells_to_run(prepared), at_a_time)
    run_cells(prepared)
    return []


def show(asked: Comparison, at_a_time: int | None, failed: list[str], *, some: bool) -> list[str]:
    """Print the table, and write it and the page.

    Args:
        asked: what was compared.
        at_a_time: cells that were trained at a time; None: nothing was trained.
        failed: a line for each cell that failed.
        some: a table that is there already may have more rows, and stays.

    Returns:
        Names of the rows that cannot be run.
    """
    from llmrec.evaluation.comparison import made_here, write
    from llmrec.finetune.compare_report import add_reasons, cells_of, markdown, page, summarise

    out = asked.out
    results = summarise({row: cells_of(out, row, asked.seeds) for row in asked.rows}, asked.seeds)
    results |= made_here(at_a_time, failed)
    impossible = add_reasons(results, out)
    text = markdown(results)
    print(text)
    if out.is_dir() and not (some and (out / "table.md").exists()):
        write(out, results, text, page)
        print(f"report: {out / 'report.html'}")
    return impossible
