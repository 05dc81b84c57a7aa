"""A run folder in Python: the stages' outputs under guessable names, ranks that count from 1."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmrec.errors import ConfigError, MissingArtifactError
from llmrec.evaluation.rankings import key_of
from llmrec.inference.recommender import Recommender
from llmrec.interactions import Interactions
from llmrec.runs import Run


def test_a_run_holds_what_its_stages_made(finished):
    run = Run(str(finished))
    assert run.data is run.data and run.data.num_users == 120
    assert run.collab.vectors.shape == (97, 16) and set(run.content.vectors) == {"text", "image"}
    assert set(run.ids.codes) == {"collab", "text", "image"} and run.adapter.log
    assert len(repr(run.data)) < 1000 and "num" not in repr(run) and str(finished) in repr(run)
    assert "user_raw_ids=list of 120" in repr(run.data) and "vectors=float32 (97, 16)" in repr(run.collab)
    assert Interactions.load(str(finished / "prepare_data")).raw_ids == run.data.raw_ids


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
