"""The README's commands must be ones the software accepts."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from llmrec import cli
from llmrec.recipe import main
from llmrec.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    command.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if command.strip() and not command.strip().startswith("#")
]
LAUNCHED = [command for command in COMMANDS if "recipes/" in command]


def test_two_commands_come_first():
    assert COMMANDS[0] == "pip install -e ." and "recipes/mme_sid_sample.py" in COMMANDS[1]
    assert COMMANDS[2:4] == ['pip install -e ".[test]"', "pytest"]
    assert 'pip install -e ".[test]" && ' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", LAUNCHED)
def test_recipe_commands_are_accepted(command, capsys):
    words = shlex.split(command)
    named = [number for number, word in enumerate(words) if word.startswith("recipes/")]
    assert all((ROOT / words[number]).is_file() for number in named)
    place = next(number for number in named if words[number].endswith(".py"))
    spec = importlib.util.spec_from_file_location("recipe", ROOT / words[place])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as left:
        main(module.recipe, [*words[place + 1 :], "--print-config"])
    assert left.value.code == 0, capsys.readouterr().err


def test_every_stage_and_every_file_named_exists():
    for name in STAGES:
        assert f"`{name}`" in TEXT
    for path in re.findall(r"`((?:llmrec|recipes|tools|tests)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_inline_stage_commands_are_accepted():
    inline = re.findall(r"`llmrec ([a-z_]+ --[^`]+)`", TEXT.replace("\n", " "))
    assert inline
    for command in inline:
        if "--help" not in command:
            assert cli.parser().parse_args(shlex.split(command)).stage in STAGES
