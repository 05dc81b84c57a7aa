"""Classes of the user's own, called ``package.module:Class``. Imports no torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic

from llmrec.errors import ConfigError

OwnName = Annotated[
    str, pydantic.Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="package.module:Class")
]
"""How something is called that is not ours."""

OwnSettings = dict[
    str,
    Annotated[
        bool | int | float | str,
        pydantic.BeforeValidator(lambda value: value.item() if hasattr(value, "item") else value),
    ],
]
"""Its settings, by argument of its constructor; numbers of NumPy are taken as Python's of their kind."""


BESIDE_RECIPES: set[Path] = set()
"""Folders of the recipes that this process has loaded, where classes may lie that their settings name."""


def beside(folder: Path, name: str) -> Path | None:
    """The file of a module, or of a package, that lies in a folder; None if there is none."""
    files = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def is_own(name: str) -> bool:
    """Whether a name is that of something of the user's own."""
    return ":" in name


def own_class(name: str, setting: str) -> Any:
    """The class of that name, which may lie in the current folder.

    Args:
        name: package.module:Class.
        setting: where it was named, for messages.

    Raises:
        ConfigError: it cannot be imported, or is no class; or it is not clear which one is meant.
    """
    module, _, attribute = name.partition(":")
    holders = [folder for folder in BESIDE_RECIPES if beside(folder, module.partition(".")[0])]
    if len(holders) > 1:
        raise ConfigError(
            f"{setting}={name}: recipes that this process has loaded have such a module beside them each, in "
            f"{' and in '.join(sorted(map(str, holders)))}; give them names of their own, or start a process "
            "for each recipe"
        )
    look_in_current_folder()
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting}={name} cannot be imported ({error}); install its package, or start from the folder "
            "it is in"
        ) from None
    if not isinstance(found, type):
        raise ConfigError(f"{setting}={name} must be a class, got {type(found).__name__}")
    return found


def look_in_current_folder() -> None:
    """Let imports find what lies where this process was started."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def code_file(name: str) -> Path | None:
    """The file that defines a class of that name, found without running it; None if there is none."""
    look_in_current_folder()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (
        ImportError,
        ValueError,
    ):  # a package that is not there; a module that was not imported from a file
        return None
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    return file if file is not None and file.is_file() else None


def imported_files(name: str) -> dict[str, Path]:
    """The user's own files that the file of a class of that name imports, and those that these import, by
    their path from the folder where imports start; found without running any of them.

    Own is what lies in that folder, or, where it is one of installed packages, in the class's package. Not
    found is what is imported by a name made while running. A package's __init__.py is not looked at for a
    module in it: what it imports for others would make their files look like the class's.
    """
    main = code_file(name)
    if main is None:
        return {}
    module = name.partition(":")[0]
    root = main.parents[module.count(".") + (main.stem == "__init__")]
    top = module.partition(".")[0]
    installed = root.name in ("site-packages", "dist-packages")

    def file_of(module: str) -> Path | None:
        first = module.partition(".")[0]
        if first in (*sys.stdlib_module_names, "llmrec") or (installed and first != top):
            return None
        folder, _, last = module.rpartition(".")
        return beside(root / folder.replace(".", "/"), last)

    found: set[Path] = set()
    waiting = [(main, module)]
    while waiting:
        file, module = waiting.pop()
        if file in found:
            continue
        found.add(file)
        package = module if file.stem == "__init__" else module.rpartition(".")[0]
        for asked, part in _imports_of(file, package):
            # Of `from a import b`, b may be a module.
            inner = f"{asked}.{part}" if asked else part
            for one in (inner, asked) if part else (asked,):
                if (imported := file_of(one)) is not None:
                    waiting.append((imported, one))
                    break
    return {file.relative_to(root).as_posix(): file for file in sorted(found - {main})}


def _imports_of(file: Path, package: str) -> Iterator[tuple[str, str]]:
    """Modules that a file in that package imports, and of each the part that is taken from it, or "";
    nothing, if the file is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    parts = package.split(".") if package else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parts[: max(len(parts) - node.level + 1, 0)] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def check_takes(kind: Any, name: str, setting: str, *first: object, **settings: object) -> None:
    """Raise ConfigError unless a class takes these arguments; those by name come from `setting`."""
    signature = inspect.signature(kind)
    try:
        signature.bind(*first, **settings)
    except TypeError as error:
        what = misfit(list(signature.parameters.values())[len(first) :], list(settings))
        raise ConfigError(f"{setting}: {name} {what or f'cannot be made ({error})'}") from None


def misfit(parameters: list[inspect.Parameter], given: list[str]) -> str:
    """What names have no parameter, and what parameters have no name; empty if neither is the matter."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = {one.name: one for one in parameters if one.kind in by_name}
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    unknown = [] if takes_all else [name for name in given if name not in takes]
    lacks = [name for name, one in takes.items() if one.default is one.empty and name not in given]
    said = [f"does not take {', '.join(unknown)}"] if unknown else []
    said += [f"needs {', '.join(lacks)}"] if lacks else []
    if not said:
        return ""
    return f"{' and '.join(said)}; its constructor takes {', '.join(takes) or 'no settings'}"
