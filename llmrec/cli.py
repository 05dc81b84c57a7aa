"""The `llmrec` command: one verb per stage, with explicit input and output folders.

Help is answered without importing torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llmrec import __version__, tracking
from llmrec.arguments import settings_of
from llmrec.assignments import describe
from llmrec.console import guarded, set_up_logging
from llmrec.errors import ConfigError
from llmrec.inference import command
from llmrec.recipe import PRESETS, apply_overrides, recipe_of, with_preset
from llmrec.stages import COMMANDS, STAGES, Stage

GPU_NAMES = ("A100", "H100", "H200", "L40S", "RTX4090")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; it exits with what `console.guarded` says."""
    options = parser().parse_args(arguments)
    if options.stage == "estimate":
        sys.exit(guarded(lambda: print_estimate(options)))
    if options.stage == "doctor":
        sys.exit(guarded(lambda: doctor(options)))
    if options.stage in command.COMMANDS:
        sys.exit(guarded(lambda: command.COMMANDS[options.stage](options)))
    sys.exit(guarded(lambda: run(COMMANDS[options.stage], options)))


def stage_main(name: str, arguments: list[str] | None = None) -> None:
    """Entry point of ``tools/<stage>.py``."""
    stage = COMMANDS[name]
    made = argparse.ArgumentParser(prog=f"{name}.py", **help_of(stage))
    add_arguments(made, stage)
    options = made.parse_args(arguments)
    sys.exit(guarded(lambda: run(stage, options)))


def run(stage: Stage, options: argparse.Namespace) -> None:
    """Run one stage on the artefacts in the given folders."""
    preset = getattr(options, "preset", None)
    settings = settings_of(stage.name, options.set)
    config = apply_overrides(stage.presets[preset] if preset else stage.config(), settings)
    set_up_logging()
    tracking.choose(getattr(options, "track", None))
    from llmrec import finished, pipeline

    inputs = [
        finished.load(STAGES[name].artifact_class(), Path(getattr(options, name)))
        for name in (*stage.inputs, *stage.optional)
        if getattr(options, name) is not None
    ]
    result = pipeline.run_stage(stage, config, tuple(inputs), Path(options.out))
    from llmrec import launched

    if stage.name == "report_semantic_ids" and launched.is_main():
        print(f"report: {Path(options.out) / 'report.html'}")
    if stage.name == "evaluate" and launched.is_main():
        from llmrec.evaluation.table import format_table

        print(format_table(result.metrics))
        print(f"report: {Path(options.out) / 'report.html'}")


def print_estimate(options: argparse.Namespace) -> None:
    """Print what a recipe will cost."""
    set_up_logging()
    from llmrec.estimate import estimate
    from llmrec.estimate_inputs import fitting
    from llmrec.estimate_shown import shown

    recipe = with_preset(recipe_of(Path(options.recipe)), options.preset, options.set)
    recipe = apply_overrides(recipe, options.set)
    usual = Path("runs") / Path(options.recipe).stem
    run_dir = Path(options.run_dir) if options.run_dir else fitting(recipe, usual)
    print(shown(estimate(recipe, run_dir), options.gpu))


def doctor(options: argparse.Namespace) -> None:
    """Print whether the machine is ready, and fail if it is not."""
    set_up_logging()
    from llmrec.doctor import findings

    if not options.recipe and (options.set or options.preset):
        # A recipe behind --set is taken for a setting.
        raise ConfigError("settings are those of a recipe; name it first: llmrec doctor RECIPE --set ...")
    recipe = None
    if options.recipe:
        made = with_preset(recipe_of(Path(options.recipe)), options.preset, options.set)
        recipe = apply_overrides(made, options.set)
    problems = 0
    for found in findings(recipe):
        problems += found.status == "problem"
        if found.status != "ok" or options.all:
            print(f"{found.status:8} {found.what}{'; ' if found.advice else ''}{found.advice}")
    if problems:
        raise ConfigError(f"{problems} problem{'s' * (problems > 1)}; each line says what to do")
    print("ready")


def parser() -> argparse.ArgumentParser:
    """The command line of `llmrec`."""
    made = argparse.ArgumentParser(
        prog="llmrec",
        description="Fine-tune large language models for sequential recommendation (MME-SID).\n\n"
        "A command runs one stage of the pipeline, or uses what stages made; recipes/ run all of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"llmrec {__version__}")
    verbs = made.add_subparsers(dest="stage", metavar="COMMAND", required=True)
    for stage in COMMANDS.values():
        add_arguments(verbs.add_parser(stage.name, help=stage.summary, **help_of(stage)), stage)
    command.add_parsers(verbs)
    costs = verbs.add_parser("estimate", help="what fine-tuning a recipe will cost, from the real data")
    costs.add_argument("recipe", metavar="RECIPE", help="a recipe's file")
    costs.add_argument(
        "--run-dir", metavar="DIR", help="use the stages that are finished there (runs/NAME, if it fits)"
    )
    costs.add_argument("--gpu", default="H100", choices=GPU_NAMES, help="for memory and time (H100)")
    check = verbs.add_parser("doctor", help="is this machine ready, and what to do where it is not")
    check.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="also look for this recipe's data and models"
    )
    check.add_argument("--all", action="store_true", help="also show what is in order")
    for one in (costs, check):
        one.add_argument("--preset", choices=PRESETS, help="as in the paper, or the published code")
        one.add_argument(
            "--set",
            metavar="STAGE.FIELD=VALUE",
            action="extend",
            nargs="+",
            default=[],
            help="change settings",
        )
    return made


def help_of(stage: Stage) -> dict:
    """What a stage's help begins with."""
    return {
        "description": stage.summary[0].upper() + stage.summary[1:] + ".",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "add_help": False,
    }


def settings_help(config: type, word: str | None) -> str:
    """Every setting of a config, or those with a word in their name or meaning; groups of settings last."""
    wanted = (word or "").lower()
    found = [one for one in describe(config) if wanted in one[0].lower() or wanted in one[3].lower()]
    named = f" with {word!r} in their name or meaning" if word else ""
    if not found:
        return f"there are no settings{named}; --help alone lists all"
    lines = [f"settings{named} (--set FIELD=VALUE):"]
    for path, kind, default, meaning in sorted(found, key=lambda one: "." in one[0]):
        lines.append(f"  {path}: {kind} = {default}")
        lines.append(f"      {meaning}")
    return "\n".join(lines)


class Help(argparse.Action):
    """Help with all settings, or with those that have a word in them."""

    def __init__(
        self, option_strings: list[str], dest: str, *, settings: type, metavar: str, help: str
    ) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", metavar=metavar, help=help)
        self.settings = settings

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        parser.epilog = settings_help(self.settings, values)
        parser.print_help()
        parser.exit()


def add_arguments(made: argparse.ArgumentParser, stage: Stage) -> None:
    made.add_argument(
        "-h", "--help", metavar="WORD", action=Help, settings=stage.config,
        help="show this, and all settings or those with WORD in their name or meaning",
    )  # fmt: skip
    for name in stage.inputs:
        made.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="DIR", required=True,
            help=f"output folder of {name}",
        )  # fmt: skip
    for name in stage.optional:
        made.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="DIR",
            help=f"output folder of {name}, for settings that ask for it",
        )  # fmt: skip
    made.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="where to put the output; one that exists is never overwritten",
    )
    if stage.name in tracking.STAGES:
        tracking.add_argument(made)
    if stage.presets:
        made.add_argument(
            "--preset", choices=list(stage.presets), help="settings to begin with, changed by --set"
        )
    made.add_argument(
        "--set", metavar="FIELD=VALUE", action="extend", nargs="+", default=[], help="change settings"
    )
