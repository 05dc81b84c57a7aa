"""Settings: frozen dataclasses, read from and shown to people. Imports no torch.

A stage's config is a frozen, keyword-only dataclass whose fields are each followed by one
string that gives meaning and unit; that string is the help text. Overrides on the command
line (``stage.field=value``) are typed by the field's annotation.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import os
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import pydantic

from llmrec.errors import ConfigError

C = TypeVar("C")
T = TypeVar("T")

MOST_HINTS = 6
"""Settings named in a hint at most."""

MOST_LISTED = 12
"""Settings listed at most where none is like the one that was given."""

MOST_SEED = 2**32 - 1
"""What NumPy takes at most."""

WORDS = {
    type(None): "none",
    int: "a whole number",
    float: "a (finite) number",
    bool: "true or false",
    str: "a text",
}
"""What a value of a type is, as people say it."""


_recorded: contextvars.ContextVar[bool] = contextvars.ContextVar("recorded", default=False)
"""Whether settings are being read that were written down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all configs are: their values have the types that their fields say, also where Python code made
    them, whose mistakes would else be found by whatever stumbles over them, or never.

    Args:
        path: what stands before the fields' names where people set them, for messages.
    """

    prefix = ""

    def __init_subclass__(cls, path: str = "") -> None:
        cls.prefix = f"{path}." if path else cls.prefix

    def __post_init__(self) -> None:
        """Take values as `from_dict` does, so that lists become tuples, and paths as text.

        Raises:
            ConfigError: a value that the field cannot have.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if value is not field.default:
                object.__setattr__(self, field.name, typed(type(self), field.name, value))
        seed = getattr(self, "seed", 0)
        require(seed <= MOST_SEED, f"{self.prefix}seed must be at most {MOST_SEED}, got {seed}")

    def refuse_changed(self, names: Iterable[str], reason: str) -> None:
        """Refuse settings that differ from their defaults and cannot change the result. Where settings are
        read that were written down (`from_dict`), perhaps before that was noticed, they get their defaults.

        Args:
            names: those that have no effect.
            reason: with what they have none, such as ``init='random'``.

        Raises:
            ConfigError: one of them was changed.
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name in names:
            default = default_of(fields[name])
            if getattr(self, name) == default:
                continue
            if not _recorded.get():
                raise ConfigError(f"{self.prefix}{name} has no effect with {reason}; leave it out")
            object.__setattr__(self, name, default)

    def idle_fields(self) -> list[str]:
        """Fields that these settings leave at their defaults, and that are not written down, so that a model
        added later does not make what exists look as if it had been made differently."""
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings(Settings):
    """Settings of a stage, and what they tell the pipeline about themselves."""

    def incidental_fields(self) -> tuple[str, ...]:
        """Dotted paths of those that change how the stage computes, but beyond rounding nothing of what."""
        return ()

    def source_files(self) -> dict[str, str]:
        """The users' own files that the result depends on, by setting."""
        return {}

    def source_folders(self) -> dict[str, str]:
        """Folders of data of the users' that the result depends on, by setting."""
        return {}

    def model_folders(self) -> dict[str, str]:
        """Models that the result depends on and that may lie in folders of the users', by setting."""
        return {}

    def own_classes(self) -> dict[str, str]:
        """Classes of the users' own whose code the result depends on (see `llmrec.own`), by setting."""
        return {}

    def source_digests(self, *inputs: Any) -> dict[str, str]:
        """Hashes of further files of the users' that the result depends on, which the stage's inputs name."""
        return {}

    def optional_inputs(self) -> bool:
        """Whether the stage takes the inputs that are optional."""
        return False

    def check_data(self, data: Any) -> None:
        """Refuse data that these settings cannot work with, before anything is trained.

        Args:
            data: `llmrec.interactions.Interactions` that prepare_data made.

        Raises:
            LlmrecError: says what is missing.
        """


def typed(cls: type, name: str, value: Any) -> Any:
    """A value as the field of that name takes it.

    Raises:
        ConfigError: it cannot.
    """
    hint = type_hints(cls)[name]
    group = dataclass_of(hint)
    try:
        if group is None:
            return adapter_of(hint).validate_python(value)
        if isinstance(value, group) or (value is None and type(None) in typing.get_args(hint)):
            return value
        wanted = with_article(group.__name__)
        raise ConfigError(f"{getattr(cls, 'prefix', '')}{name}={value!r:.60}: expected {wanted}")
    except pydantic.ValidationError:
        wanted = in_words(hint) + _meant_choice(str(value), hint)
        before = getattr(cls, "prefix", "") or f"{cls.__name__}."
        raise ConfigError(f"{before}{name}={value!r}: expected {wanted}") from None


def adapter_of(hint: Any) -> pydantic.TypeAdapter:
    """What checks a value of an annotation; no number is infinite, which JSON could not hold."""
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False))


def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return _type_hints(cls)


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def as_dict(config: Settings) -> dict[str, Any]:
    """The config as plain JSON data (tuples become lists), without its `Settings.idle_fields`."""
    idle = config.idle_fields()
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in idle}
    return json.loads(json.dumps(values))


def from_dict(cls: type[C], data: dict[str, Any]) -> C:
    """The config that `as_dict` wrote; an unknown or missing field is an error."""
    values: dict[str, Any] = {}
    hints = type_hints(cls)
    for name, value in data.items():
        if name not in hints:
            hint = _nearest(name, hints, stage=_stage_of(cls))
            raise ConfigError(f"{cls.__name__} has no field {name!r}{hint}")
        inner = dataclass_of(hints[name])
        if inner is not None and value is not None:
            values[name] = from_dict(inner, value)
        else:
            values[name] = typed(cls, name, value)
    token = _recorded.set(True)
    try:
        return cls(**values)
    finally:
        _recorded.reset(token)


def override(config: C, assignments: dict[str, str], *, prefix: str = "") -> C:
    """A copy of config with fields replaced, all at once, so that checks see the final values.

    Args:
        config: a config dataclass, possibly holding others.
        assignments: dotted field paths, such as ``lora_rank`` or ``sasrec.dropout_rate``, and the new
            values as typed on a command line; ``none`` clears an optional field, and a tuple or
            mapping of its entries, which commas separate.
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
            raise ConfigError(f"unknown setting {f'{prefix}{path}'!r}{_meant(path, config, prefix)}")
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
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
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
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return adapter.validate_python(parts)
        return adapter.validate_strings(text)
    except pydantic.ValidationError:
        raise ConfigError(f"{name}={text!r}: expected {in_words(hint)}{_meant_choice(text, hint)}") from None


def parse_pairs(hint: Any, text: str, name: str) -> Any:
    """NAME=VALUE pairs between commas, numbers and true or false as such."""
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, equals, value = map(str.strip, part.partition("="))
        if not equals or not key:
            raise ConfigError(f"{name}={text!r}: expected NAME=VALUE pairs separated by commas")
        found[key] = plain_value(value)
    try:
        return adapter_of(hint).validate_python(found)
    except pydantic.ValidationError:
        raise ConfigError(f"{name}={text!r}: values must be numbers, texts, true or false") from None


def plain_value(text: str) -> Any:
    """What a text stands for whose type nothing says, as JSON or Python write it. False as a text would count
    as true."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            return read(text)
    return text


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field as (dotted path, value)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def changed_fields(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Sentences naming the leaves that differ between two JSON configs.

    A group that only one of them has comes with the choice that asks for it, so the choice is named alone.
    """
    found: list[str] = []
    groups: list[str] = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changed_fields(old, new, f"{prefix}{name}.")
        elif isinstance(old, dict) or isinstance(new, dict):
            groups.append(f"{'other' if isinstance(old, dict) else 'no'} settings of {prefix}{name}")
        elif name not in before:
            found.append(f"no {prefix}{name} (now {json.dumps(new)})")
        elif old != new or name not in after:
            found.append(f"{prefix}{name}={json.dumps(old)} (now {json.dumps(new)})")
    return found or groups


def without_incidental(values: dict[str, Any], config: StageSettings) -> dict[str, Any]:
    """JSON settings without the config's `StageSettings.incidental_fields`."""
    kept = copy.deepcopy(values)
    for path in config.incidental_fields():
        *groups, name = path.split(".")
        group = kept
        for part in groups:
            group = group.get(part, {})
        group.pop(name, None)
    return kept


def changed_settings(before: dict[str, Any], config: StageSettings) -> list[str]:
    """Sentences naming the settings whose change makes of a stage's output another one.

    A setting that an older version did not have counts as its default; what changes results beyond that
    raises `finished.SCHEMA_VERSION`.

    Args:
        before: the JSON settings it was made with.
        config: the settings asked for now.
    """
    before = with_defaults(before, config)
    with contextlib.suppress(ConfigError):  # which another version's settings may give
        before = as_dict(from_dict(type(config), before))  # without those that had no effect
    now = without_incidental(as_dict(config), config)
    return changed_fields(without_incidental(before, config), now)


def with_defaults(values: dict[str, Any], config: Settings) -> dict[str, Any]:
    """JSON settings with defaults where they lack one that the config has; groups that they lack stay out."""
    found = dict(values)
    idle = config.idle_fields()
    for field in dataclasses.fields(config):
        inner, default = getattr(config, field.name), default_of(field)
        if isinstance(inner, Settings) and isinstance(found.get(field.name), dict):
            found[field.name] = with_defaults(found[field.name], inner)
            continue
        known = isinstance(inner, Settings) or field.name in (*found, *idle)
        if not known and default is not dataclasses.MISSING:
            found[field.name] = json.loads(json.dumps(default))
    return found


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


def default_of(field: dataclasses.Field) -> Any:
    """What a field holds if nothing is given; MISSING if something must be."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def format_value(value: Any) -> str:
    """A setting as it is typed after ``--set``."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ",".join(f"{name}={json.dumps(part)}" for name, part in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join(str(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value)


def type_name(hint: Any) -> str:
    """An annotation as people read it: ``int``, ``'a' | 'b'``, ``str | none``."""
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(hint))
    if _is_union(hint):
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
    if _is_union(hint):
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


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` unless condition holds; for ``__post_init__`` checks."""
    if not condition:
        raise ConfigError(message)


def given(value: T | None) -> T:
    """A setting that may be None, where the config's own checks have made sure that it is not."""
    assert value is not None
    return value


def dataclass_of(hint: Any) -> type | None:
    """The dataclass in an annotation (``X`` or ``X | None``), if there is one."""
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((one for one in members if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _meant(path: str, config: Any, prefix: str) -> str:
    """What a path that does not exist may stand for: the same name elsewhere, or one like it."""
    name = path.rpartition(".")[2]
    same = [f"{prefix}{known}" for known, _ in flatten(config) if known.rpartition(".")[2] == name]
    if 0 < len(same) <= MOST_HINTS:
        return f"; did you mean {' or '.join(same)}?"
    return _nearest(path.partition(".")[0], type_hints(type(config)), prefix, _stage_of(config))


def _meant_choice(text: str, hint: Any) -> str:
    """What the first entry that is no choice of the annotation may stand for, if one is like it."""
    choices = [str(choice) for choice in _choices(hint)]
    unknown = [part.strip() for part in text.split(",") if part.strip() not in choices]
    close = difflib.get_close_matches(unknown[0], choices, n=1) if unknown else []
    return f"; did you mean {close[0]}?" if close else ""


def _choices(hint: Any) -> tuple[Any, ...]:
    """Values of the literals in an annotation."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(itertools.chain.from_iterable(map(_choices, typing.get_args(hint))))


def _stage_of(config: Any) -> str:
    """Whose settings a config or its class holds; empty if no stage's."""
    return getattr(config, "prefix", "").partition(".")[0]


def _nearest(name: str, known: Iterable[str], prefix: str = "", stage: str = "") -> str:
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
    return f"; `llmrec {stage} --help` lists the {len(known)} that there are"
