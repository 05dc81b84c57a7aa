"""Scripts in tools/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load(name: str) -> ModuleType:
    """The module of a script, by its name without ending."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    sys.path.insert(0, str(TOOLS))  # where Python looks first while a script runs
    try:
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(TOOLS))
    return found


def ended(main: Callable[[list[str]], None], capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """What a script leaves with, and its output and errors."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return (left.value.code or 0, *capsys.readouterr())
