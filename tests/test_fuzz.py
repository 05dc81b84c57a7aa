"""What nobody would give on purpose: a short form of tools/fuzz.py, and laws that always hold."""

from __future__ import annotations

import dataclasses
import logging
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tool import load

from llmrec.config import as_dict, flatten, from_dict
from llmrec.console import HIDDEN, redact
from llmrec.errors import ConfigError, DataError, LlmrecError
from llmrec.finetune.prompt import SLOT, read_template, tokenize_words
from llmrec.inference.recommender import Recommender
from llmrec.recipe import Recipe, apply_overrides, format_value

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def alarm():
    """The tool sets the signal's handler."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")
def test_everything_is_taken_or_refused(finished, packaged, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    fuzz = load("fuzz")
    targets = fuzz.all_targets(tmp_path / "files", finished, packaged)
    results, faults = fuzz.fuzz(targets, 10, 20.0, 0)
    assert len(results) >= 30 and not faults, "\n".join(faults)
    for name, counts in results:
        assert counts["taken"] >= 1, f"{name}: what is good is taken"
        assert counts["taken"] + counts["refused"] == 10
    refused = {name for name, counts in results if counts["refused"]}
    assert len(refused) >= len(results) - 3, "what is bad is refused"


def test_the_server_has_the_places_that_are_asked_for(packaged):
    from llmrec.inference.server import application

    app = application({"first": Recommender.from_pretrained(packaged)})
    places = {place.partition("?")[0] for place in load("fuzz").calls.PLACES}
    assert places <= {route.path for route in app.routes}


def test_the_tool_sees_faults(tmp_path):
    fuzz = load("fuzz")

    def fails(change) -> None:
        if not change.nothing:
            raise KeyError("x")

    def refuses(change) -> None:
        raise LlmrecError("never")

    def hangs(change) -> None:
        while not change.nothing:
            pass

    targets = [fuzz.Target(name=case.__name__, case=case) for case in (fails, refuses, hangs)]
    results, faults = fuzz.fuzz(targets, 2, 0.2, 0)
    assert [counts["faults"] for _, counts in results] == [1, 0, 1]
    said = "\n".join(faults)
    assert "KeyError" in said and "refuses refuses what is good: never" in said and "SlowError" in said
    assert "6" in fuzz.report(results, faults)


@pytest.fixture
def two_targets(monkeypatch):
    """The tool with two targets that take everything, and no model."""
    fuzz = load("fuzz")
    before = logging.getLogger("llmrec").level
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(fuzz, "tiny_run", lambda root: (root, root))
    targets = [fuzz.Target(name=name, case=lambda change: None) for name in ("settings", "prompt file")]
    monkeypatch.setattr(fuzz, "all_targets", lambda *_: targets)
    yield fuzz
    logging.getLogger("llmrec").setLevel(before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nosuchthing"], "is in no target's name; give a part of one of: settings; prompt file"),
        (["--cases", "0"], "at least 1, got '0'"),
        (["--seconds", "0"], "above 0, got '0'"),
        (["--seed", "-1"], "at least 0, got '-1'"),
    ],
)  # fmt: skip
def test_nothing_tried_is_no_pass(arguments, said, two_targets, capsys):
    with pytest.raises(SystemExit) as left:
        two_targets.main(arguments)
    shown = capsys.readouterr()
    assert left.value.code == 2 and said in shown.err and not shown.out


def test_targets_are_chosen_by_a_part_of_their_names(two_targets, capsys):
    with pytest.raises(SystemExit) as left:
        two_targets.main(["--cases", "3", "--only", "prompt"])
    lines = capsys.readouterr().out.splitlines()
    assert not left.value.code and [line.split()[0] for line in lines] == ["target", "prompt", "all"]


def test_nothing_is_said_of_a_report_that_will_be_gone(tmp_path, capsys):
    fuzz = load("fuzz")
    finished, packaged = fuzz.tiny_run(tmp_path)
    assert (finished / "evaluate" / "manifest.json").is_file() and packaged.is_dir()
    assert not capsys.readouterr().out


@FEW
@given(st.data())
def test_settings_that_are_taken_survive_being_written_and_read(data):
    fields = dict(flatten(Recipe()))
    path = data.draw(st.sampled_from(sorted(fields)))
    default = st.just(format_value(fields[path]))
    text = data.draw(st.one_of(default, st.text(max_size=12), st.integers().map(str), st.floats().map(str)))
    try:
        made = apply_overrides(Recipe(), [f"{path}={text}"])
    except ConfigError as error:
        assert str(error)
        return
    for field in dataclasses.fields(made):
        config = getattr(made, field.name)
        assert from_dict(type(config), as_dict(config)) == config


@FEW
@given(before=st.text(max_size=40), after=st.text(max_size=40), junk=st.text(max_size=10))
def test_prompts_are_refused_or_have_something_to_read_out(before, after, junk, tmp_path):
    path = tmp_path / "prompt.toml"
    quoted = (before + SLOT + after).replace("\\", "").replace('"', "'").replace("\n", " ").replace("\r", " ")
    path.write_text(f'text = "{quoted}"\n{junk}', encoding="utf-8")
    try:
        made = tokenize_words(str(path))
        shown = read_template(str(path))
    except ConfigError:
        return
    assert shown[1].strip() and len(made.response) >= 1
    assert max([*made.instruction, *made.response]) < made.vocab_size


ODD = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def model(packaged) -> Recommender:
    return Recommender.from_pretrained(packaged)


@FEW
@given(histories=ODD, k=st.one_of(st.integers(), ODD), candidates=ODD, unknown=ODD)
def test_a_recommender_answers_or_refuses(histories, k, candidates, unknown, model):
    try:
        model.recommend(histories, k=k, candidates=candidates, unknown=unknown)
    except DataError as error:
        assert str(error)


@FEW
@given(data=st.data())
def test_recommendations_keep_their_promises(data, model):
    ids = st.sampled_from(model.raw_ids)
    histories = data.draw(st.lists(st.lists(ids, max_size=6), max_size=4))
    candidates = data.draw(st.one_of(st.none(), st.lists(ids, min_size=1, max_size=8)))
    k = data.draw(st.integers(1, 200))
    seen = data.draw(st.booleans())
    found = model.recommend(histories, k=k, candidates=candidates, exclude_seen=seen)
    assert len(found) == len(histories)
    for history, own in zip(histories, found):
        names = [one.item_id for one in own]
        left = set(candidates or model.raw_ids) - (set(history) if seen else set())
        assert len(names) == len(set(names)) == min(k, len(left)) and set(names) <= left
        scores = [one.score for one in own]
        assert scores == sorted(scores, reverse=True)


@FEW
@given(st.text(max_size=200))
def test_hiding_secrets_twice_hides_no_more(text):
    once = redact(text)
    assert redact(once) == once or HIDDEN in once
