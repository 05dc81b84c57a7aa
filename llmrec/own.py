"""Classes of the user's own, called ``package.module:Class``. Imports no torch."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Annotated, Any

import pydantic

from llmrec.errors import ConfigError

OwnName = Annotated[
    str, pydantic.Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="package.module:Class")
]
"""How something is called that is not ours."""

OwnSettings = dict[str, bool | int | float | str]
"""Its settings, by argument of its constructor."""


def is_own(name: str) -> bool:
    """Whether a name is that of something of the user's own."""
    return ":" in name


def own_class(name: str, setting: str) -> Any:
    """The class of that name, which may lie in the current folder.

    Args:
        name: package.module:Class.
        setting: where it was named, for messages.

    Raises:
        ConfigError: it cannot be imported, or is no class.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
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


def check_takes(kind: Any, name: str, setting: str, *first: object, **settings: object) -> None:
    """Raise ConfigError unless a class takes these arguments; those by name come from `setting`."""
    try:
        inspect.signature(kind).bind(*first, **settings)
    except TypeError as error:
        what = f"does not take {', '.join(settings)}" if settings else "needs settings"
        raise ConfigError(f"{setting}: {name} {what} ({error})") from None
