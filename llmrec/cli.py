"""The `llmrec` command: one verb per stage, with explicit input and output folders.

Help is answered without importing torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmrec import __version__
from llmrec.config import describe
from llmrec.recipe import apply_overrides, guarded, set_up_logging
from llmrec.stages import COMMANDS, STAGES, Stage


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the installed command."""
    options = parser().parse_args(arguments)
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
    config = apply_overrides(stage.presets[preset] if preset else stage.config(), options.set)
    set_up_logging()
    from llmrec import pipeline

    inputs = [
        pipeline.load(STAGES[name].artifact_class(), Path(getattr(options, name))) for name in stage.inputs
    ]
    result = pipeline.run_stage(stage.function(), config, tuple(inputs), Path(options.out))
    from llmrec import distributed

    if stage.name == "report_semantic_ids" and distributed.is_main():
        print(f"report: {Path(options.out) / 'report.html'}")
    if stage.name == "evaluate" and distributed.is_main():
        from llmrec.evaluation.evaluate import format_table

        print(format_table(result.metrics))
        print(f"report: {Path(options.out) / 'report.html'}")


def parser() -> argparse.ArgumentParser:
    """The command line of `llmrec`."""
    made = argparse.ArgumentParser(
        prog="llmrec",
        description="Fine-tune large language models for sequential recommendation (MME-SID).\n\n"
        "Each verb runs one stage of the pipeline; recipes/ run all of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"llmrec {__version__}")
    verbs = made.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for stage in COMMANDS.values():
        add_arguments(verbs.add_parser(stage.name, help=stage.summary, **help_of(stage)), stage)
    return made


def help_of(stage: Stage) -> dict:
    """Description and epilog of a stage's help: what it does, and every setting it has."""
    lines = ["settings (--set FIELD=VALUE):"]
    for path, kind, default, meaning in describe(stage.config):
        lines.append(f"  {path}: {kind} = {default}")
        lines.append(f"      {meaning}")
    return {
        "description": stage.summary.capitalize() + ".",
        "epilog": "\n".join(lines),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def add_arguments(made: argparse.ArgumentParser, stage: Stage) -> None:
    for name in stage.inputs:
        made.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="DIR", required=True,
            help=f"output folder of {name}",
        )  # fmt: skip
    made.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="where to put the output; one that exists is never overwritten",
    )
    if stage.presets:
        made.add_argument(
            "--preset", choices=list(stage.presets), help="settings to begin with, changed by --set"
        )
    made.add_argument(
        "--set", metavar="FIELD=VALUE", action="extend", nargs="+", default=[], help="change settings"
    )
