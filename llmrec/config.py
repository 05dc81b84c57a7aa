"""Settings: frozen dataclasses, checked, written down and compared. Imports no torch.

A stage's config is a frozen, keyword-only dataclass whose fields are each followed by one string that gives
meaning and unit; that string is the help text. `llmrec.assignments` reads what is typed on a command line.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import json
import os
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import pydantic

from llmrec.annotations import (
    adapter_of,
    dataclass_of,
    in_words,
    meant_choice,
    nearest,
    type_hints,
    with_article,
)
from llmrec.errors import ConfigError

C = TypeVar("C")
T = TypeVar("T")

MOST_SEED = 2**32 - 1
"""What NumPy takes at most."""

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
        wanted = in_words(hint) + meant_choice(str(value), hint)
        before = getattr(cls, "prefix", "") or f"{cls.__name__}."
        raise ConfigError(f"{before}{name}={value!r}: expected {wanted}") from None


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
            hint = nearest(name, hints, stage=stage_of(cls))
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


def default_of(field: dataclasses.Field) -> Any:
    """What a field holds if nothing is given; MISSING if something must be."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` unless condition holds; for ``__post_init__`` checks."""
    if not condition:
        raise ConfigError(message)


def given(value: T | None) -> T:
    """A setting that may be None, where the config's own checks have made sure that it is not."""
    assert value is not None
    return value


def unhandled(choice: NoReturn) -> NoReturn:
    """Ends a chain of branches over the choices of a setting: mypy refuses the call where one is missing, so
    that a new choice cannot pass for another."""
    raise AssertionError(f"there is no branch for {choice!r}")


def stage_of(config: Any) -> str:
    """Whose settings a config or its class holds; empty if no stage's."""
    return getattr(config, "prefix", "").partition(".")[0]
