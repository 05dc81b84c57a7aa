"""Types of settings as people say them, and what a wrong name or value may stand for. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import types
import typing
from collections.abc import Iterable
from typing import Any

import pydantic

MOST_HINTS = 6
"""Settings named in a hint at most."""

MOST_LISTED = 12
"""Settings listed at most where none is like the one that was given."""

WORDS = {
    type(None): "none",
    int: "a whole number",
    float: "a (finite) number",
    bool: "true or false",
    str: "a text",
}
"""What a value of a type is, as people say it."""


def adapter_of(hint: Any) -> pydantic.TypeAdapter:
    """What checks a value of an annotation; no number is infinite, which JSON could not hold."""
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False))


def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return _type_hints(cls)


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def type_name(hint: Any) -> str:
    """An annotation as people read it: ``int``, ``'a' | 'b'``, ``str | none``."""
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(hint))
    if is_union(hint):
        return " | ".join(type_name(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"{type_name(typing.get_args(hint)[0])}, ..."
    if typing.get_origin(hint) is dict:
        return "NAME=VALUE, ..."
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__metadata__[0].description
    return getattr(hint, "__name__", str(hint))


def in_words(hint: Any) -> str:
    """What a value of an annotation is, as people say it: ``none, or a whole number``."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if is_union(hint):
        members = sorted(typing.get_args(hint), key=lambda member: member is not type(None))
        return ", or ".join(in_words(member) for member in members)
    if typing.get_origin(hint) is tuple:
        return f"entries separated by commas, each {in_words(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "names with values that are numbers, texts, true or false"
    return (
        type_name(hint) if typing.get_origin(hint) is typing.Annotated else WORDS.get(hint, type_name(hint))
    )


def with_article(word: str) -> str:
    """A noun as one of its kind: ``a table``, ``an item``."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def dataclass_of(hint: Any) -> type | None:
    """The dataclass in an annotation (``X`` or ``X | None``), if there is one."""
    members = typing.get_args(hint) if is_union(hint) else (hint,)
    return next((one for one in members if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def meant_choice(text: str, hint: Any) -> str:
    """What the first entry that is no choice of the annotation may stand for, if one is like it."""
    choices = [str(choice) for choice in choices_in(hint)]
    unknown = [part.strip() for part in text.split(",") if part.strip() not in choices]
    close = difflib.get_close_matches(unknown[0], choices, n=1) if unknown else []
    return f"; did you mean {close[0]}?" if close else ""


def choices_in(hint: Any) -> tuple[Any, ...]:
    """Values of the literals in an annotation."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(itertools.chain.from_iterable(map(choices_in, typing.get_args(hint))))


def nearest(name: str, known: Iterable[str], prefix: str = "", stage: str = "") -> str:
    """What a name that does not exist may stand for: by its initials, its letters, or as a part; else those
    that there are, or how to list them if they are many.

    Args:
        name: what was given.
        known: names that there are.
        prefix: what stands before them in messages.
        stage: whose settings they are, if any's.
    """
    known = list(known)
    initials = [one for one in known if "".join(part[:1] for part in one.split("_")) == name]
    parts = [one for one in known if len(name) > 2 and name in one]
    close = initials or difflib.get_close_matches(name, known, n=1, cutoff=0.5) or parts
    if close:
        return f"; did you mean {' or '.join(prefix + one for one in close[:MOST_HINTS])}?"
    if len(known) <= MOST_LISTED or not stage:
        return f"; known: {', '.join(prefix + one for one in known)}"
    return f"; `llmrec {stage} --help` lists those that there are"
