"""Settings as they are typed on a command line: read, written and explained. Imports no torch."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

import pydantic

from llmrec.annotations import (
    MOST_HINTS,
    adapter_of,
    dataclass_of,
    in_words,
    is_union,
    meant_choice,
    nearest,
    type_hints,
    type_name,
)
from llmrec.config import default_of, flatten, stage_of
from llmrec.errors import ConfigError

C = TypeVar("C")
J = TypeVar("J", list, dict)


def override(config: C, assignments: dict[str, str], *, prefix: str = "") -> C:
    """A copy of config with fields replaced, all at once, so that checks see the final values.

    Args:
        config: a config dataclass, possibly holding others.
        assignments: dotted field paths, such as ``lora_rank`` or ``sasrec.dropout_rate``, and the new
            values as typed on a command line; ``none`` clears an optional field, and a tuple or
            mapping of its entries, which commas separate. Entries that hold commas are given as JSON.
        prefix: what stands before the paths in messages.

    Raises:
        ConfigError: unknown field (with the nearest name), wrong type, or impossible value.
    """
    hints = type_hints(type(config))
    changes: dict[str, Any] = {}
    inner: dict[str, dict[str, str]] = {}
    for path, text in assignments.items():
        name, _, rest = path.partition(".")
        full = f"{prefix}{name}"
        if name not in hints:
            meant = _meant(path, config, assignments, prefix)
            raise ConfigError(f"unknown setting {f'{prefix}{path}'!r}{meant}")
        group = dataclasses.is_dataclass(getattr(config, name))
        if rest and not group:
            raise ConfigError(f"{full!r} is a single value, so {full}.{rest} does not exist")
        if group and not rest:
            names = ", ".join(field.name for field in dataclasses.fields(getattr(config, name)))
            raise ConfigError(f"{full!r} is a group; set one of its fields: {names}")
        if group:
            inner.setdefault(name, {})[rest] = text
        else:
            changes[name] = parse_value(hints[name], text, full)
    for name, below in inner.items():
        changes[name] = override(getattr(config, name), below, prefix=f"{prefix}{name}.")
    return dataclasses.replace(typing.cast(Any, config), **changes)


def parse_value(hint: Any, text: str, name: str) -> Any:
    """Turn command-line text into a value of the annotated type."""
    members = typing.get_args(hint) if is_union(hint) else (hint,)
    kinds = set(map(typing.get_origin, members))
    if text.lower() in ("none", "null"):
        if type(None) in members:
            return None
        text = "" if kinds & {tuple, dict} else text
    if dict in kinds:
        return parse_pairs(hint, text, name)
    adapter = adapter_of(hint)
    try:
        if tuple in kinds:
            return adapter.validate_python(parts_in(text))
        return adapter.validate_strings(text)
    except pydantic.ValidationError:
        raise ConfigError(f"{name}={text!r}: expected {in_words(hint)}{meant_choice(text, hint)}") from None


def parse_pairs(hint: Any, text: str, name: str) -> Any:
    """NAME=VALUE pairs, numbers and true or false as such."""
    found = pairs_in(text)
    if found is None:
        raise ConfigError(f"{name}={text!r}: expected NAME=VALUE pairs separated by commas")
    try:
        return adapter_of(hint).validate_python(found)
    except pydantic.ValidationError:
        raise ConfigError(f"{name}={text!r}: values must be numbers, texts, true or false") from None


def parts_in(text: str) -> list[Any]:
    """What commas separate, or a list as JSON."""
    listed = as_json(text, list)
    return [part.strip() for part in text.split(",") if part.strip()] if listed is None else listed


def pairs_in(text: str) -> dict[str, Any] | None:
    """NAME=VALUE pairs that commas separate, or a mapping as JSON; None: it is neither."""
    mapping = as_json(text, dict)
    if mapping is not None:
        return mapping
    split = [[side.strip() for side in str(part).partition("=")] for part in parts_in(text)]
    if not all(key and equals for key, equals, _ in split):
        return None
    return {key: plain_value(value) for key, _, value in split}


def as_json(text: str, kind: type[J]) -> J | None:
    """The list or mapping that a text has as JSON; None: it has none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, kind) else None
    return None


def plain_value(text: str) -> Any:
    """What a text stands for whose type nothing says, as JSON or Python write it. False as a text would count
    as true."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return read(text)
    return text


def _meant(path: str, config: Any, assignments: dict[str, str], prefix: str) -> str:
    """What a path that does not exist may stand for: the same name elsewhere, or one like it.

    Many models have settings of one name; that of the model that is chosen is meant.
    """
    name = path.rpartition(".")[2]
    values = dict(flatten(config)) | assignments
    same = [known for known in values if known.rpartition(".")[2] == name and known not in assignments]
    chosen = {value for value in values.values() if isinstance(value, str)}
    same = [known for known in same if chosen.intersection(known.split(".")[:-1])] or same
    if 0 < len(same) <= MOST_HINTS:
        return f"; did you mean {' or '.join(prefix + known for known in same)}?"
    return nearest(path.partition(".")[0], type_hints(type(config)), prefix, stage_of(config))


def format_value(value: Any) -> str:
    """A setting as it is typed after ``--set``."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        plain = ",".join(f"{name}={json.dumps(part)}" for name, part in value.items())
        return plain if pairs_in(plain) == value else json.dumps(value)
    if isinstance(value, (tuple, list)):
        plain = ",".join(map(str, value))
        return plain if parts_in(plain) == [str(part) for part in value] else json.dumps(value)
    return value if isinstance(value, str) else json.dumps(value)


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, by field name."""
    found = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(found, ast.ClassDef)
    docs = {}
    for field, doc in itertools.pairwise(found.body):
        text = doc.value.value if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
            docs[field.target.id] = " ".join(text.split())
    return docs


def describe(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(path, type, default as it is typed, meaning) of every leaf field, for help texts."""
    docs, hints = field_docs(cls), type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = dataclass_of(hints[field.name])
        if inner is not None:
            yield from describe(inner, f"{prefix}{field.name}.")
            continue
        value = default_of(field)
        empty = isinstance(value, (tuple, dict)) and not value
        default = "required" if value is dataclasses.MISSING else "none" if empty else format_value(value)
        kind = type_name(hints[field.name])
        yield f"{prefix}{field.name}", kind, default, docs.get(field.name, "")
