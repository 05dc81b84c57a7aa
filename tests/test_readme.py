"""The READMEs' commands must be ones the software accepts, and what they point to must be there."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmrec import cli
from llmrec.recipe import main
from llmrec.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "recipes/README.md", "tools/README.md")
}
TEXT = PAGES["README.md"]
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    command.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if command.strip() and not command.strip().startswith("#")
]
LAUNCHED = [
    command
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if "accelerate launch" in command
]


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
    for page, text in PAGES.items():
        for path in re.findall(r"`((?:llmrec|recipes|tools|tests|prompts)/[\w/.]*)`", text):
            assert (ROOT / path).exists(), (page, path)


def anchors(text: str) -> set[str]:
    """What a page's headings can be linked by."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    assert links or page != "README.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.resolve().is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_recipe_and_every_tool_is_in_its_folders_page():
    for folder in ("recipes", "tools"):
        for path in (ROOT / folder).glob("*.py"):
            assert f"`{folder}/{path.name}`" in PAGES[f"{folder}/README.md"], path


def commands_of_tools() -> list[str]:
    """Inline and in blocks, of all pages."""
    found = set()
    for text in PAGES.values():
        found |= set(re.findall(r"`python (tools/\w+\.py[^`]*)`", text.replace("\n", " ")))
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found |= {line.removeprefix("python ") for line in lines if line.startswith("python tools/")}
    return sorted(found)


@pytest.mark.parametrize("command", commands_of_tools())
def test_tools_take_the_options_they_are_named_with(command, capsys, monkeypatch):
    script, *words = shlex.split(command)
    verb = [word for word in words[:1] if re.fullmatch("[a-z]+", word)]
    monkeypatch.setattr(sys, "argv", [script, *verb, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # as Python does for a script
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for option in (word for word in words if word.startswith("--")):
        assert option in shown


def test_inline_stage_commands_are_accepted():
    inline = re.findall(r"`llmrec ([a-z_]+ --[^`]+)`", TEXT.replace("\n", " "))
    assert inline
    for command in inline:
        if "--help" not in command:
            assert cli.parser().parse_args(shlex.split(command)).stage in STAGES


def test_commands_for_a_trained_recommender_are_accepted():
    commands = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("llmrec ")]
    assert {"package", "recommend", "serve"} <= {words[0] for words in commands}
    for words in commands:
        cli.parser().parse_args(words)


def test_the_python_example_runs(packaged, finished, tmp_path):
    """As it stands, with the tiny recipe, its package and ids."""
    examples = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(examples) == 3
    example = "".join(examples)
    from llmrec.finished import load
    from llmrec.interactions import Interactions

    data = load(Interactions, finished / "prepare_data")
    recipe = tmp_path / "small.py"
    recipe.write_text("from tiny_recipe import tiny as recipe\n")
    for old, new in (
        ("runs/mme_sid_sample", str(finished)),
        ('"market"', repr(str(packaged))),
        ("market_and_more", str(tmp_path / "more")),
        ("P001", data.raw_ids[0]),
        ("P002", data.raw_ids[1]),
        ("recipes/mme_sid_sample.py", str(recipe)),
        ('"runs/py', f'"{tmp_path}/py'),
    ):
        assert old in example
        example = example.replace(old, new)
    script = tmp_path / "example.py"
    script.write_text(example)
    known = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": known},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
