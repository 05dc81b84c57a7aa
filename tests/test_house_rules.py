"""Rules of the house that a reader would otherwise have to remember."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrec.config import Settings
from llmrec.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("llmrec", "recipes", "tools") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load"}
FORBIDDEN_MODULES = {"pickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_KEYWORDS = {("trust_remote_code", True), ("strict", False), ("allow_pickle", True)}
LOADED_BY_NAME = re.compile(r"Auto\w+\.from_(pretrained|config)")
"""What asks whether to run a model's own code, and waits for an answer, unless told not to"""
CHANGES = {"pop", "popitem", "append", "extend", "add", "remove", "update", "setdefault", "read", "write"}
"""Methods that change what they are called on: none of an assertion, which ``python -O`` leaves out"""
ABSOLUTE = re.compile(r"/(home|root|tmp|work|usr|data|mnt)\b")


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def violations(source: str) -> list[str]:
    """What a file does that no file of ours may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if name_of(node.func) in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name_of(node.func)}()")
            if LOADED_BY_NAME.fullmatch(name_of(node.func)) and "trust_remote_code" not in {
                keyword.arg for keyword in node.keywords
            }:
                found.append(f"{node.lineno}: {name_of(node.func)}() without trust_remote_code=False")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in FORBIDDEN_KEYWORDS:
                    found.append(f"{node.lineno}: {keyword.arg}={value}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [
                f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES
            ]
        elif isinstance(node, ast.ExceptHandler):
            caught = name_of(node.type) if node.type else "everything"
            if caught in ("everything", "Exception", "BaseException"):
                found.append(f"{node.lineno}: except {caught}")
        elif isinstance(node, ast.Assert):
            inner = list(ast.walk(node))
            names = [name_of(one.func) for one in inner if isinstance(one, ast.Call)]
            found += [f"{node.lineno}: assert {name}()" for name in names if name.split(".")[-1] in CHANGES]
            found += [f"{node.lineno}: assert :=" for one in inner if isinstance(one, ast.NamedExpr)]
        elif isinstance(node, ast.Constant) and ABSOLUTE.match(str(node.value)):
            found.append(f"{node.lineno}: absolute path {node.value!r}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_breaks_the_rules(path):
    assert violations(path.read_text()) == []


def test_the_rules_catch_what_they_forbid():
    bad = """
import pickle
from joblib import load
try:
    torch.load("x")
    model.load_state_dict(state, strict=False)
    AutoModel.from_pretrained(name, trust_remote_code=True)
    AutoConfig.from_pretrained(name)
    np.load(path, allow_pickle=True)
    eval("1")
    open("/home/me/x")
except Exception:
    pass
try:
    pass
except:
    pass
assert found.pop("x") == 1
assert (y := 1)
"""
    assert len(violations(bad)) == 14


def test_there_are_files_to_check():
    assert len(SOURCES) > 30
    assert {path.parent.name for path in SOURCES} >= {
        "data",
        "collab",
        "encoders",
        "semantic_ids",
        "finetune",
    }


def test_importing_the_package_and_asking_for_help_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, llmrec, llmrec.cli, llmrec.recipe\n"
        "llmrec.cli.parser().format_help()\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'accelerate', 'datasets', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_module_asks_the_network_or_writes_when_it_is_imported(tmp_path):
    import os
    import subprocess
    import sys

    code = """
import importlib, socket, sys
def refused(*_, **__):
    raise AssertionError("a connection while importing")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    files = [
        path.relative_to(ROOT).with_suffix("") for path in SOURCES if path.is_relative_to(ROOT / "llmrec")
    ]
    names = [".".join(path.parts) for path in files if path.name != "__init__"]
    assert len(names) > 100
    own = {"HOME": tmp_path, "MPLCONFIGDIR": tmp_path.parent / "fonts", "PYTHONPATH": ROOT}
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def groups_of(config: Settings) -> Iterator[Settings]:
    """A config and the groups of settings in it."""
    yield config
    for field in dataclasses.fields(config):
        if isinstance(value := getattr(config, field.name), Settings):
            yield from groups_of(value)


READ_BY_A_PROPERTY = {"cold_rate"}
"""Settings that others read by another name, which a property of their config has."""


def test_every_setting_is_read_outside_of_the_file_that_defines_it():
    """One that nobody reads would be taken, shown, written down, and do nothing. Names are all that is
    compared, so one that several configs have is found too seldom, never wrongly."""
    files = [path for path in SOURCES if path.is_relative_to(ROOT / "llmrec")]
    nodes = {path: list(ast.walk(ast.parse(path.read_text()))) for path in files}
    read = {
        path: {node.attr for node in found if isinstance(node, ast.Attribute)}
        | {node.arg for node in found if isinstance(node, ast.arg)}  # of models, which take theirs by name
        for path, found in nodes.items()
    }
    recipe = Recipe()
    stages = [getattr(recipe, field.name) for field in dataclasses.fields(recipe)]
    unread, looked_at = [], 0
    for group in {type(one): one for stage in stages for one in groups_of(stage)}.values():
        elsewhere = [names for path, names in read.items() if path != Path(inspect.getfile(type(group)))]
        for field in dataclasses.fields(group):
            if isinstance(getattr(group, field.name), Settings) or field.name in READ_BY_A_PROPERTY:
                continue
            looked_at += 1
            if not any(field.name in names for names in elsewhere):
                unread.append(f"{type(group).__name__}.{field.name}")
    assert unread == [] and looked_at > 200


def test_recipes_are_typed():
    """Beside `mypy`, which cannot look at them: as it finds modules, their folder `accelerate` would stand
    for the library of that name."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "mypy", "--no-namespace-packages", "recipes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found in" in done.stdout
