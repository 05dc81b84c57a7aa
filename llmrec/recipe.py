"""A recipe: one config per stage, in order, and the command line that runs it.

A recipe file defines a function that returns a `Recipe` and ends with ``main(recipe)``. A variant
calls that function and changes fields with `dataclasses.replace`.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from llmrec import tracking
from llmrec.assignments import format_value, override
from llmrec.collab.config import TrainCollabConfig
from llmrec.config import Settings, flatten
from llmrec.console import guarded, set_up_logging
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig
from llmrec.errors import ConfigError
from llmrec.evaluation.config import EvaluateConfig
from llmrec.exchanged import collab_without_what_goes, finetune_without_what_goes
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.presets import PRESETS as FINETUNE_PRESETS
from llmrec.own import BESIDE_RECIPES, beside
from llmrec.refit import refit
from llmrec.semantic_ids.config import PRESETS as ID_PRESETS
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.stage_changes import TO_DO, refuse_what_is_stale, statuses
from llmrec.stages import STAGES

C = TypeVar("C")

PRESETS = tuple(FINETUNE_PRESETS)


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Numbers of a whole run; one field per stage, in order."""

    prepare_data: PrepareDataConfig = field(default_factory=PrepareDataConfig)
    train_collab: TrainCollabConfig = field(default_factory=TrainCollabConfig)
    encode_items: EncodeItemsConfig = field(default_factory=EncodeItemsConfig)
    learn_semantic_ids: LearnSemanticIdsConfig = field(default_factory=LearnSemanticIdsConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def main(recipe: Callable[[], Recipe], arguments: list[str] | None = None) -> None:
    """Run a recipe from the command line, and exit.

    Exit codes: 0 done, 2 something the user gave cannot work (one line says what), 130 interrupted.
    """
    sys.exit(guarded(lambda: run_recipe(recipe, arguments)))


def run_recipe(recipe: Callable[[], Recipe], arguments: list[str] | None) -> None:
    """Parse the command line of a recipe and do what it says."""
    if not callable(recipe):
        raise ConfigError(f"main takes the function that returns a Recipe, got the {type(recipe).__name__}")
    name, description = name_of(recipe)
    options = parser(name, description.strip()).parse_args(arguments)
    chosen = with_seed(with_preset(recipe(), options.preset, options.set), options.seed)
    chosen = apply_overrides(chosen, options.set)
    root = Path(options.run_dir or Path("runs") / (f"{name}_refit" if options.refit else name))
    if options.refit:
        chosen = refit(chosen, Path(options.refit))
    tracking.choose(options.track)
    if options.print_config:
        print("\n".join(f"{path}={format_value(value)}" for path, value in flatten(chosen)))
        return
    if not options.dry_run:
        set_up_logging()
        check_push(options.push_to_hub, options.until)
    stages = statuses(chosen, root, options.until)
    if options.dry_run:
        print("\n".join(f"{stage:20s} {status}" for stage, status in stages.items()))
    refuse_what_is_stale(root, stages)
    refuse_what_cannot_finish(chosen, stages)
    if not options.dry_run:
        compute(chosen, root, options.until, options.push_to_hub)


def check_push(repo: str | None, until: str | None) -> None:
    """Refuse now what would be refused when all is done; nothing to do if nothing is to be pushed.

    Raises:
        ConfigError: the run would not be finished, there can be no such repository, or nobody is logged in.
    """
    if not repo:
        return
    if until not in (None, "evaluate"):
        raise ConfigError(f"--push-to-hub pushes a finished run, which --until {until} does not make")
    from llmrec.hub import check_login, check_name

    check_name(repo)
    check_login()


def compute(recipe: Recipe, root: Path, until: str | None, repo: str | None) -> None:
    """Run what is not finished, print the table, and push the run if a repository is given."""
    from llmrec import launched
    from llmrec.pipeline import RunDir, run

    report = run(recipe, RunDir(root), until=until)
    if not launched.is_main():
        return
    if report is not None:
        from llmrec.evaluation.table import format_table

        print(format_table(report.metrics))
        print(f"report: {root / 'evaluate' / 'report.html'}")
    if repo:
        push_run(root, repo)


def name_of(recipe: Callable[[], Recipe]) -> tuple[str, str]:
    """What a recipe is called, as the file of its function, and what that file says of it."""
    while isinstance(recipe, functools.partial):
        recipe = recipe.func
    function = inspect.unwrap(recipe)
    return Path(function.__code__.co_filename).stem, function.__globals__.get("__doc__") or ""


def module_of(path: str | Path, example: str = "mme_sid_sample") -> ModuleType:
    """A recipe's file as a module, which may import what lies beside it, and name models and methods there.

    Raises:
        ConfigError: no such file; it imports by dots; or what it imports from beside it would be a module
            that lies elsewhere.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"{path}: no such recipe; give a Python file such as recipes/{example}.py")
    folder = str(path.resolve().parent)
    refuse_modules_of_others(path)
    BESIDE_RECIPES.add(Path(folder))
    sys.path.insert(0, folder)
    try:
        # Under a name that is no other module's.
        spec = importlib.util.spec_from_file_location(f"llmrec recipe {path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for the names in their annotations
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # for classes that its settings name, which are imported later
    return module


def refuse_modules_of_others(path: Path) -> None:
    """Raise ConfigError if a recipe imports what lies beside it, and Python holds a module of this name that
    lies elsewhere, which it would be given in its stead; or imports by dots, out of a package."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ConfigError(
                f"{path}, line {node.lineno}: a recipe is a file of its own, without a package to import "
                "from; leave out the dots, and it is given what lies beside it"
            )
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in {name.partition(".")[0] for name in names}:
            meant = beside(path.resolve().parent, name)
            loaded = getattr(sys.modules.get(name), "__file__", None)
            if meant and loaded and Path(loaded).resolve() != meant.resolve():
                raise ConfigError(
                    f"{path} imports {name}, which lies beside it, and this process has loaded {loaded} by "
                    "that name; give one of them another name, or start a process for each recipe"
                )


def recipe_of(path: str | Path) -> Recipe:
    """The recipe that a file defines.

    Raises:
        ConfigError: no such file, or it defines none.
    """
    module = module_of(path)
    if not callable(getattr(module, "recipe", None)):
        raise ConfigError(
            f"{path} defines no function `recipe` that returns a Recipe; what compares sequence models "
            "(recipes/providers_*.py) has none"
        )
    made = module.recipe()
    if not isinstance(made, Recipe):
        raise ConfigError(f"{path}: recipe() must return a Recipe, got {type(made).__name__}")
    return made


def push_run(root: Path, repo: str) -> None:
    """Package a finished run, push it to the Hub, and write down where it is (pushed.json)."""
    import tempfile

    from llmrec.files import write_json
    from llmrec.hub import push
    from llmrec.inference.package import package_run
    from llmrec.storage import writing

    with tempfile.TemporaryDirectory() as scratch:
        pushed = push(package_run(root, Path(scratch) / "package"), repo)
    print(f"pushed: {pushed.url} at {pushed.revision}", flush=True)
    with writing(root / "pushed.json"):
        write_json(
            root / "pushed.json", {"repo": pushed.repo, "url": pushed.url, "revision": pushed.revision}
        )


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The command line every recipe has."""
    made = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        epilog=f"stages, in order: {', '.join(STAGES)}. `llmrec STAGE --help` lists the settings of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--run-dir", metavar="DIR", help=f"where stages keep their output (runs/{name})")
    made.add_argument(
        "--preset",
        choices=PRESETS,
        help="put the settings of the paper, or of the published code, in place of all that the recipe has "
        "for learn_semantic_ids and finetune, base model included; --set changes them (default: no change)",
    )
    made.add_argument(
        "--seed",
        metavar="SEED",
        type=int,
        help=f"that of every stage that is trained ({', '.join(TRAINED)}); a stage's own by --set",
    )
    made.add_argument(
        "--refit",
        metavar="DIR",
        help="learn from validation items too, for as many epochs as the run in DIR chose by them",
    )
    made.add_argument("--until", metavar="STAGE", choices=list(STAGES), help="last stage to run")
    made.add_argument(
        "--set",
        metavar="STAGE.FIELD=VALUE",
        action="extend",
        nargs="+",
        default=[],
        help="change settings, such as finetune.lora_rank=16; may be repeated",
    )
    made.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="when all is done, push the recommender to this repository of the Hub (private if it is new)",
    )
    tracking.add_argument(made)
    made.add_argument("--print-config", action="store_true", help="print every setting and leave")
    made.add_argument("--dry-run", action="store_true", help="say what each stage would do and leave")
    return made


TRAINED = ("train_collab", "learn_semantic_ids", "finetune")
"""Stages whose result their seed changes; prepare_data's says which data, evaluate's which resamplings."""

TABLE_4: dict[str | None, dict[str, dict[str, Any]]] = {
    "toys_and_games": {"finetune": {"learning_rate": 2e-4, "epochs": 3}},
    "sports_and_outdoors": {
        "learn_semantic_ids": {"num_codes": 300},
        "finetune": {"learning_rate": 2e-4, "epochs": 2, "warmup_steps": 200},
    },
}
"""MME-SID Table 4: what it sets otherwise than for Beauty, for which the published script is."""


def with_preset(recipe: Recipe, name: str | None, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe with the settings of that name wherever a stage has some, those of its data set included;
    ``default`` and None leave it as it is.

    Args:
        recipe: settings.
        name: of the preset.
        assignments: what will be applied afterwards, which may choose another data set.
    """
    if name in (None, "default"):
        return recipe
    chosen = {path.strip(): text.strip() for path, _, text in (one.partition("=") for one in assignments)}
    own = TABLE_4.get(chosen.get("prepare_data.category", recipe.prepare_data.category), {})
    return replace(
        recipe,
        learn_semantic_ids=replace(ID_PRESETS[name], **own.get("learn_semantic_ids", {})),
        finetune=replace(FINETUNE_PRESETS[name], **own.get("finetune", {})),
    )


def with_seed(recipe: Recipe, seed: int | None) -> Recipe:
    """The recipe with one seed for all stages that are trained; None leaves it as it is."""
    if seed is None:
        return recipe
    trained = [name for name in TRAINED if getattr(getattr(recipe, name), "provider", "") != "precomputed"]
    return replace(recipe, **{name: replace(getattr(recipe, name), seed=seed) for name in trained})


def apply_overrides(config: C, assignments: list[str]) -> C:
    """The config with every ``path=value`` applied; of two for one path, the later wins."""
    for assignment in assignments:
        if "=" not in assignment:
            raise ConfigError(f"--set {assignment!r} is not of the form field=value")
    split = (assignment.partition("=") for assignment in assignments)
    pairs = {path.strip(): text.strip() for path, _, text in split}
    if isinstance(config, Recipe):
        config = cast(C, without_what_goes(config, pairs))
    return override(config, pairs)


def without_what_goes(recipe: Recipe, pairs: dict[str, str]) -> Recipe:
    """The recipe without its own settings of a provider, method or base model that pairs exchange.

    They would have no effect any more, which is an error where a user sets them, but not here.
    """
    return replace(
        recipe,
        train_collab=collab_without_what_goes(recipe.train_collab, pairs),
        finetune=finetune_without_what_goes(recipe.finetune, pairs),
    )


def refuse_what_cannot_finish(recipe: Recipe, stages: dict[str, str]) -> None:
    """Say now what a stage would stumble over hours later.

    Args:
        recipe: the settings.
        stages: what `statuses` says of them.

    Raises:
        ConfigError: files, models, or settings that do not go together; all of them, with what to do.
    """
    from llmrec.preflight import in_the_way

    to_do = [name for name, status in stages.items() if status == TO_DO]
    problems = [one for one in in_the_way(recipe, to_do) if one.status == "problem"]
    if problems:
        raise ConfigError("; ".join(f"{one.what} ({one.advice})" for one in problems))
