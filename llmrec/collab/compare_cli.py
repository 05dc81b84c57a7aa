"""The command line of a comparison, shared by the tool and by recipes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from llmrec import arguments, jobs, tracking
from llmrec.assignments import override
from llmrec.collab.config import PROVIDER_FIELDS, TrainCollabConfig
from llmrec.console import guarded, set_up_logging
from llmrec.data.config import PrepareDataConfig
from llmrec.errors import ConfigError, TrainingError
from llmrec.evaluation.config import EvaluateConfig
from llmrec.interactions import Interactions

logger = logging.getLogger("llmrec")

Rows = dict[str, TrainCollabConfig]


def every_provider() -> Rows:
    """One row per sequence model, with its default settings."""
    return {name: TrainCollabConfig(provider=cast(Any, name)) for name in PROVIDER_FIELDS}


def main(
    rows: Callable[[], Rows] = every_provider,
    data: Callable[[], PrepareDataConfig] | None = None,
    *,
    name: str = "compare_providers",
    description: str | None = None,
    arguments: list[str] | None = None,
) -> None:
    """Compare from the command line, and exit (codes as in `llmrec.recipe.main`).

    Args:
        rows: settings by row.
        data: settings of prepare_data; None: ``--prepare-data`` must be given.
        name: of the folder that results go to, below runs/.
        description: help text.
        arguments: command line; None: the process's.
    """
    sys.exit(guarded(lambda: compare(rows(), data() if data else None, name, description, arguments)))


def compare(
    rows: Rows,
    data_config: PrepareDataConfig | None,
    name: str,
    description: str | None,
    arguments: list[str] | None,
) -> None:
    """Train what is missing and write results.json, table.md and report.html; arguments as of `main`."""
    options = parser(rows, data_config, name, description).parse_args(arguments)
    of_data, of_rows = by_stage(options.set, data_config is not None)
    if of_data and options.prepare_data:
        raise ConfigError(
            f"--set prepare_data.{next(iter(of_data))} has no effect with --prepare-data (they are there)"
        )
    asked = asked_rows(rows, options, of_rows)
    reference = options.reference or ("sasrec" if "sasrec" in asked else next(iter(asked)))
    if reference not in asked:
        raise ConfigError(f"--reference must be among the rows ({', '.join(asked)}), got {reference!r}")
    set_up_logging()
    tracking.choose(options.track)
    if not options.rows and not options.row and (left_out := [name for name in rows if name not in asked]):
        logger.info("compare: %s left out: they read encoded items, see --encode-items", ", ".join(left_out))
    from llmrec.collab.compare import summarise_cells
    from llmrec.evaluation.comparison import made_here

    root = Path(options.run_dir or Path("runs") / name)
    if options.summarise and not root.is_dir():
        raise ConfigError(f"{root}: there is no such folder, so nothing to summarise; give --run-dir")
    folder = Path(options.prepare_data) if options.prepare_data else root / "prepare_data"
    data = data_in(folder, None if options.prepare_data else data_config, of_data)
    at_a_time = None if options.summarise else options.jobs or jobs.default()
    failed = [] if at_a_time is None else train(asked, options, folder, root, at_a_time)
    results = summarise_cells(
        asked, options.seeds, data, root, reference=reference, length_edges=options.length_edges
    )
    results |= made_here(at_a_time, failed)
    some = options.summarise and options.rows and not set(rows) <= set(asked)
    show(results, root, some=bool(some))
    if failed:
        cells = len(asked) * len(options.seeds)
        raise TrainingError(f"{len(failed)} of {cells} cells failed: {'; '.join(failed)}")


def asked_rows(rows: Rows, options: argparse.Namespace, settings: dict[str, str]) -> Rows:
    """The rows that the command line asks for, the user's own last.

    Args:
        rows: those that have a name.
        options: the command line.
        settings: of train_collab, see `by_stage`.
    """
    own = own_rows(rows, options.row)
    names = options.rows or ([] if own else rows_of_recipe(rows, options))
    return chosen_rows(rows | own, [*names, *own], settings)


def rows_of_recipe(rows: Rows, options: argparse.Namespace) -> list[str]:
    """All rows; without encoded items, those that need none, if there are such."""
    without = [name for name, row in rows.items() if not row.content]
    return list(rows) if options.encode_items or options.summarise or not without else without


def data_in(folder: Path, config: PrepareDataConfig | None, settings: dict[str, str]) -> Interactions:
    """The data in a folder, prepared first if they are not there yet.

    Args:
        folder: output of prepare_data.
        config: what to prepare; None: they are there.
        settings: of prepare_data, which change it.
    """
    if config is None:
        from llmrec.finished import load

        return load(Interactions, folder)
    from llmrec.data.prepare import prepare_data
    from llmrec.pipeline import run_stage

    return run_stage(prepare_data, override(config, settings, prefix="prepare_data."), (), folder)


def train(rows: Rows, options: argparse.Namespace, folder: Path, root: Path, at_a_time: int) -> list[str]:
    """Train what is not finished.

    Args:
        rows: settings by row.
        options: the command line.
        folder: output of prepare_data.
        root: where cells are kept.
        at_a_time: how many are trained at a time.

    Returns:
        A line for each cell that failed.
    """
    from llmrec import launched
    from llmrec.collab.compare import run_cells

    if launched.world_size() > 1:
        raise ConfigError("a comparison starts processes of its own, see --jobs; call it with python alone")
    content = Path(options.encode_items) if options.encode_items else None
    if wanting := [name for name, row in rows.items() if row.content and content is None]:
        raise ConfigError(f"--encode-items: {', '.join(wanting)} need the output folder of encode_items")
    return run_cells(rows, options.seeds, folder, root, at_a_time, content)


def show(results: dict[str, Any], root: Path, *, some: bool) -> None:
    """Print the table, and write it and the page.

    Args:
        results: see `summarise_cells`.
        root: where they go.
        some: results that are there already may have more rows, and stay.
    """
    from llmrec.collab.compare_report import markdown, page
    from llmrec.evaluation.comparison import write

    text = markdown(results)
    if some and (root / "results.json").exists():
        print(text)
        return
    write(root, results, text, page)
    print(text)
    print(f"report: {root / 'report.html'}")


def parser(
    rows: Rows, data_config: PrepareDataConfig | None, name: str, description: str | None
) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--run-dir", metavar="DIR", help=f"where cells and results go (runs/{name})")
    made.add_argument(
        "--prepare-data",
        metavar="DIR",
        required=data_config is None,
        help="a finished prepare_data folder",
    )
    made.add_argument(
        "--encode-items",
        metavar="DIR",
        help="a finished encode_items folder, for rows whose models read texts or pictures (else left out)",
    )
    made.add_argument(
        "--rows", nargs="+", metavar="NAME", help=f"of {', '.join(rows)} (all, or none beside --row)"
    )
    jobs.add_row(made, "a row of your own: a name, and settings of train_collab that it changes")
    jobs.add_seeds(made)
    jobs.add_argument(made)
    tracking.add_argument(made)
    made.add_argument(
        "--reference", metavar="NAME", help="row that others are compared with (sasrec, or the first row)"
    )
    made.add_argument(
        "--length-edges",
        nargs="+",
        type=arguments.positive,
        action=arguments.Ascending,
        default=EvaluateConfig.length_edges,
        metavar="N",
        help="users grouped by the length of their history: the longest of each group but the last, in items "
        "(5 10 20 50 100 200)",
    )
    made.add_argument(
        "--set",
        metavar="STAGE.FIELD=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change settings of every row (train_collab.epochs=50), of one model "
        "(train_collab.gmvae.num_interests=8)"
        + ("" if data_config is None else ", or of the data (prepare_data.k_core=10)"),
    )
    made.add_argument(
        "--summarise",
        action="store_true",
        help="train nothing; make the table of what there is (a table of some --rows takes no other's place)",
    )
    return made


def own_rows(rows: Rows, given: list[list[str]]) -> Rows:
    """Rows that a user made up: a name, and settings of train_collab. ``provider`` among these chooses the
    model, and what they leave out is as in the row of that model's name, or else the default.

    Raises:
        ConfigError: as `arguments.own_rows`, settings that cannot be, or a row that trains no model.
    """
    found = {}
    for name, typed in arguments.own_rows(given, "train_collab", (*rows, "popularity")).items():
        parts = (setting.partition("=") for setting in typed)
        settings = {path.strip(): text.strip() for path, _, text in parts}
        provider = settings.get("provider", TrainCollabConfig.provider)
        base = rows.get(provider)
        if base is None or base.provider != provider:
            known = provider in PROVIDER_FIELDS
            base = TrainCollabConfig(provider=cast(Any, provider)) if known else TrainCollabConfig()
        found[name] = override(base, settings, prefix="train_collab.")
        if found[name].provider == "precomputed":
            raise ConfigError(f"--row {name}: provider=precomputed trains no model that could be compared")
    return found


def by_stage(assignments: list[str], has_data: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Settings of prepare_data and of train_collab, by path within the stage.

    Raises:
        ConfigError: no setting of these.
    """
    stages = ["prepare_data", "train_collab"][not has_data :]
    found: dict[str, dict[str, str]] = {"prepare_data": {}, "train_collab": {}}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        stage, _, rest = path.strip().partition(".")
        if not equals or not rest or stage not in stages:
            raise ConfigError(
                f"--set {assignment!r} is not of the form STAGE.FIELD=VALUE, with a stage of "
                f"{', '.join(stages)}"
            )
        found[stage][rest] = text.strip()
    return found["prepare_data"], found["train_collab"]


def chosen_rows(rows: Rows, names: list[str], settings: dict[str, str]) -> Rows:
    """The rows asked for; a setting of one model goes to the rows of that model alone.

    Raises:
        ConfigError: an unknown row, a seed or a model, or a setting that no row takes.
    """
    if "seed" in settings:
        raise ConfigError("--set train_collab.seed: seeds are given by --seeds, to all rows")
    if "provider" in settings:
        raise ConfigError(
            "--set train_collab.provider: models are chosen by --rows, or by --row NAME provider=..."
        )
    if unknown := [name for name in names if name not in rows]:
        raise ConfigError(f"--rows must be among {', '.join(rows)}, got {', '.join(unknown)}")
    of_one = {path: path.partition(".")[0] for path in settings}
    of_one = {path: model for path, model in of_one.items() if model in (*PROVIDER_FIELDS, "own")}
    for path, model in of_one.items():
        if not any(rows[name].reads(model) for name in names):
            model = "a model of your own" if model == "own" else model
            raise ConfigError(f"--set train_collab.{path} has no effect: no row trains {model}")
    found = {}
    for name in names:
        mine = {
            path: text
            for path, text in settings.items()
            if path not in of_one or rows[name].reads(of_one[path])
        }
        found[name] = override(rows[name], mine, prefix="train_collab.")
    return found
