"""Kinds of arguments that command lines share."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from llmrec.errors import ConfigError
from llmrec.stages import STAGES

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r:.40}")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0, as an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r:.40}")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0, such as seconds, as an argument."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r:.40}")


class Ascending(argparse.Action):
    """Numbers of which each is larger than the one before."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if list(values) != sorted(set(values)):
            raise argparse.ArgumentError(self, f"must ascend, got {' '.join(map(str, values))}")
        setattr(namespace, self.dest, tuple(values))


def add_count(
    parser: argparse.ArgumentParser, name: str, count: int, text: str, kind: Callable[[str], int] = positive
) -> None:
    """A number that has a default, which its help states."""
    parser.add_argument(name, type=kind, default=count, metavar="N", help=f"{text} ({count:,})")


def settings_of(stage: str, given: Iterable[str]) -> list[str]:
    """Settings of one stage as typed, without its name: messages, and recipes, name settings with it.

    Raises:
        ConfigError: a setting of another stage.
    """
    for setting in given:
        path = setting.partition("=")[0].strip()
        if (other := path.partition(".")[0]) != stage and other in STAGES:
            raise ConfigError(f"{path!r} is a setting of {other}; here stand those of {stage} alone")
    return [setting.removeprefix(f"{stage}.") for setting in given]


def own_rows(given: list[list[str]], stage: str, taken: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Rows that a user made up: their names, and settings of a stage as typed, without its name.

    Args:
        given: what ``--row`` was given, each time.
        stage: whose settings.
        taken: names of other rows.

    Raises:
        ConfigError: a name that is no folder's or that there is already, no settings, or among them a seed
            or one of another stage.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, *settings in given:
        if not NAME.fullmatch(name):
            raise ConfigError(f"--row {name!r}: a name has letters, digits, dots, dashes and underscores")
        if name in found or name in taken:
            raise ConfigError(f"--row {name}: there is a row of this name already")
        typed = tuple(settings_of(stage, settings))
        if any(setting.partition("=")[0].strip() == "seed" for setting in typed):
            raise ConfigError(f"--row {name}: seeds are given by --seeds, to all rows")
        if not typed:
            raise ConfigError(f"--row {name}: give it settings of {stage}, such as learning_rate=2e-3")
        found[name] = typed
    return found


def with_verbs(
    description: str | None,
) -> tuple[argparse.ArgumentParser, Callable[[str, str], argparse.ArgumentParser]]:
    """A parser of commands with several verbs, such as ``tool.py packing --users 5``.

    Args:
        description: help text.

    Returns:
        The parser, whose result names the verb as ``verb``; and a function that adds a verb by its name and
        help text. Options of verbs must be written in full.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    return made, lambda name, text: verbs.add_parser(name, help=text, description=text, allow_abbrev=False)


def new_file(text: str) -> Path:
    """An argument: a file that does not exist yet, in a folder that may be written. It is checked before the
    work begins, so that hours of it are not lost in the end, nor written over other results."""
    path = Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists; give another file, or delete it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder; make it, or give another file")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path.parent} may not be written; give a file somewhere else")
    return path
