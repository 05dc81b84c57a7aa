"""A run folder in Python: the stages' outputs under guessable names, ranks that count from 1."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe

import llmrec
from llmrec.data.config import PrepareDataConfig
from llmrec.errors import ConfigError, DataError, MissingArtifactError
from llmrec.evaluation.config import EvaluateConfig
from llmrec.evaluation.rankings import key_of
from llmrec.evaluation.table import format_table
from llmrec.inference.recommender import Recommender
from llmrec.interactions import Interactions
from llmrec.recipe import main
from llmrec.runs import Run


def test_a_run_holds_what_its_stages_made(finished):
    run = Run(str(finished))
    assert run.data is run.data and run.data.num_users == 120
    assert run.collab.vectors.shape == (97, 16) and set(run.content.vectors) == {"text", "image"}
    assert set(run.ids.codes) == {"collab", "text", "image"} and run.adapter.log
    assert len(repr(run.data)) < 1000 and "num" not in repr(run) and str(finished) in repr(run)
    assert "user_raw_ids=list of 120" in repr(run.data) and "vectors=float32 (97, 16)" in repr(run.collab)
    assert str(run.report) == format_table(run.report.metrics) and "<table>" in run.report._repr_html_()
    assert repr(run.recommender()) == "Recommender(mme_sid, 96 items, device='cpu')"
    assert Interactions.load(str(finished / "prepare_data")).raw_ids == run.data.raw_ids


def test_artefacts_can_be_compared_and_collected(finished):
    """As objects: arrays have no one truth."""
    run, again = llmrec.Run(finished), llmrec.Run(finished)
    for name in ("data", "collab", "content", "ids", "adapter", "report"):
        one, other = getattr(run, name), getattr(again, name)
        assert one == one and one != other and len({one, other}) == 2
    assert run.data.targets("test") != run.data.targets("test")


def test_ranks_begin_with_1_and_their_means_are_the_metrics(finished):
    run = Run(finished)
    for method, row in run.report.metrics["rows"].items():
        rank = run.ranks(method)
        assert rank.min() >= 1 and len(rank) == 120
        assert (rank <= 10).mean() == row["recall@10"]
        assert np.where(rank <= 10, 1 / rank, 0).mean() == pytest.approx(row["mrr@10"])
        for name, values in run.per_user(method).items():
            assert values.mean() == pytest.approx(row[name])
        column = run.report.rankings[f"rank_{method}"].to_numpy()
        assert np.array_equal(column, rank), "the file counts as people do"
    top = run.report.rankings["top_mme_sid"].to_pylist()
    target = run.report.rankings["target"].to_pylist()
    for one, best, wanted in zip(run.ranks(), top, target):
        assert (best[int(one) - 1] == wanted) if one <= len(best) and one == int(one) else True


def test_methods_have_the_names_of_the_table_too(finished):
    report = Run(finished).report
    assert key_of(report, "sasrec (ce)") == key_of(report, "sasrec") == "sasrec"
    assert key_of(report, None) == report.metrics["fine_tuned"] == "mme_sid"
    older = {name: value for name, value in report.metrics.items() if name != "fine_tuned"}
    older["labels"] = {**report.metrics["labels"], "mme_sid": "e4srec (fusion=sum)"}
    other = dataclasses.replace(report, metrics=older)
    assert key_of(other, "e4srec") == key_of(other, "e4srec (fusion=sum)") == key_of(other, None) == "mme_sid"
    with pytest.raises(ConfigError, match=r"no method 'me', but mme_sid \(e4srec \(fusion=sum\)\), sasrec"):
        key_of(other, "me")


def test_a_device_that_is_not_there_is_named(finished):
    with pytest.raises(ConfigError, match="device='gpu': expected cpu, cuda or a GPU by its number"):
        Run(finished).recommender(device="gpu")


def test_a_run_recommends_as_its_package_does(finished, packaged):
    mine, theirs = Run(finished).recommender(device="cpu"), Recommender.from_pretrained(packaged)
    histories = [mine.raw_ids[:3], []]
    assert np.array_equal(mine.score(histories), theirs.score(histories))


def test_what_is_no_run_is_said_to_be_none(finished, tmp_path):
    with pytest.raises(MissingArtifactError, match="is no folder; give a recipe's run folder"):
        Run(tmp_path / "far")
    with pytest.raises(MissingArtifactError, match="give the run folder"):
        Run(finished / "finetune")
    (tmp_path / "prepare_data").symlink_to(finished / "prepare_data")
    with pytest.raises(MissingArtifactError, match="evaluate"):
        Run(tmp_path).report  # noqa: B018


def test_a_users_history_is_what_the_data_say(finished):
    run = llmrec.Run(finished)
    sequences = run.data.sequences("train", "valid", "test")
    for place in (0, 7, 119):
        user = run.data.user_raw_ids[place]
        items = sequences.item[sequences.offset[place] : sequences.offset[place + 1]]
        assert run.history(user) == [run.data.raw_ids[item - 1] for item in items] != []
    with pytest.raises(DataError, match="'nobody' is none of this run's 120 users"):
        run.history("nobody")


def test_the_histories_of_all_users_read_the_item_table_once(finished, monkeypatch):
    run, reads = llmrec.Run(finished), []
    ids = run.data.raw_ids
    monkeypatch.setattr(Interactions, "raw_ids", property(lambda _: reads.append(1) or ids))
    assert all(run.history(user) for user in run.data.user_raw_ids) and reads == [1]


def test_a_run_is_made_in_python_by_names_and_paths_as_text(finished, tmp_path):
    recipe = tiny_recipe.tiny()
    with pytest.raises(ConfigError, match=r"until must be one of prepare_data, .*, got 'tune'"):
        llmrec.run(recipe, str(tmp_path / "run"), until="tune")
    assert llmrec.run(recipe, str(tmp_path / "run"), until="prepare_data") is None
    data = llmrec.Run(str(tmp_path / "run")).data
    again = llmrec.run_stage("prepare_data", recipe.prepare_data, (), str(tmp_path / "run" / "prepare_data"))
    assert again.catalog == data.catalog
    collab = llmrec.run_stage("train_collab", recipe.train_collab, (data,), str(tmp_path / "collab"))
    assert collab.vectors.shape[0] == data.num_items + 1
    with pytest.raises(
        ConfigError, match=r"reads a tuple of artefacts, got Interactions; one alone is \(art"
    ):
        llmrec.run_stage("train_collab", recipe.train_collab, data, str(tmp_path / "other"))
    text = len(repr(llmrec.Run(finished).adapter))
    assert text < 2000


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        (
            "finetune_all",
            PrepareDataConfig(),
            "there is no stage 'finetune_all', but prepare_data",
        ),
        ("prepare_data", EvaluateConfig(), "prepare_data takes a PrepareDataConfig, got EvaluateConfig"),
        (
            "evaluate",
            EvaluateConfig(),
            r"evaluate reads \(Interactions, .*Adapter\), in this order, got",
        ),
    ],
)
def test_what_belongs_to_another_stage_is_refused(stage, config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        llmrec.run_stage(stage, config, (), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_no_recipe_is_told_what_is(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"run takes a Recipe, got <function tiny .*; call it for the one"):
        llmrec.run(tiny_recipe.tiny, tmp_path / "x")
    with pytest.raises(ConfigError, match=r"run takes a Recipe, got 'recipes/mme_sid_sample.py'$"):
        llmrec.run("recipes/mme_sid_sample.py", tmp_path / "x")
    with pytest.raises(SystemExit):
        main(llmrec.Recipe(), [])
    assert "main takes the function that returns a Recipe, got the Recipe" in capsys.readouterr().err


def test_inputs_that_no_stage_wrote_are_refused(finished, tmp_path):
    run, config = Run(finished), tiny_recipe.tiny().learn_semantic_ids
    read = Interactions.load(finished / "prepare_data")
    with pytest.raises(ConfigError, match=r"this Interactions was made or .* or read by Interactions\.load"):
        llmrec.run_stage("learn_semantic_ids", config, (read, run.collab, run.content), tmp_path / "x")
    scaled = dataclasses.replace(run.collab, vectors=2 * run.collab.vectors)
    with pytest.raises(ConfigError, match=r"this CollabEmbeddings .*train_collab\.provider=precomputed"):
        llmrec.run_stage("learn_semantic_ids", config, (run.data, scaled, run.content), tmp_path / "x")


def test_a_name_that_is_not_there_is_answered_by_those_that_are():
    with pytest.raises(AttributeError, match="it has Recipe, Recommender, Run, recipe_of, run, run_stage"):
        llmrec.fit  # noqa: B018
    for name in llmrec.PUBLIC:
        assert getattr(llmrec, name).__name__ == name


def test_types_are_told_to_whoever_checks_code_that_uses_the_package():
    assert (Path(llmrec.__file__).parent / "py.typed").is_file()
