"""Finished runs side by side: figures of each run, differences user by user, nothing unlike compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import ttest_rel
from tool import load as load_tool

from llmrec.artifacts import Report
from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.evaluation import compare_runs as module
from llmrec.evaluation.compare_runs import Entry, compare_runs, markdown
from llmrec.evaluation.metrics import ndcg_at_k, summarise


def report(rank: np.ndarray, **changes) -> Report:
    """An evaluation in which one method gave these ranks."""
    columns = {
        "user": [f"u{number}" for number in range(len(rank))],
        "target": [f"i{number % 7}" for number in range(len(rank))],
        "history_length": [3] * len(rank),
        "rank_mme_sid": np.asarray(rank) + 1,
    }
    metrics = {
        "rows": {"mme_sid": summarise(rank)},
        "split": "leave_one_out",
        "mask_seen": True,
        "trained_on": {"mme_sid": changes.pop("trained_on", "train")},
    }
    columns |= {name: changes.pop(name) for name in list(changes) if name in columns}
    catalog = changes.pop("catalog", "c")
    return Report(catalog=catalog, metrics=metrics | changes, rankings=pa.table(columns), html="")


def ranks(seed: int, shift: float = 0.0) -> np.ndarray:
    return np.maximum(0, np.random.default_rng(seed).normal(12 + shift, 8, 300)).astype(np.float64)


@pytest.fixture
def runs(monkeypatch) -> dict[str, Report]:
    known: dict[str, Report] = {}
    monkeypatch.setattr(module, "load", lambda kind, folder: known[str(folder)])
    return known


def test_seeds_are_averaged_and_users_are_paired(runs):
    tables = {"a": ranks(0), "b0": ranks(0, -3), "b1": ranks(1, -3)}
    runs |= {name: report(rank) for name, rank in tables.items()}
    first, second = compare_runs([Entry("a", Path("a")), Entry("b", Path("b0")), Entry("b", Path("b1"))])
    assert (first["runs"], second["runs"]) == (1, 2) and first["ndcg@10"]["sd"] is None
    both = [summarise(tables[name])["ndcg@10"] for name in ("b0", "b1")]
    assert second["ndcg@10"]["mean"] == pytest.approx(np.mean(both))
    assert second["ndcg@10"]["sd"] == pytest.approx(np.std(both, ddof=1))
    ours = (ndcg_at_k(tables["b0"], 10) + ndcg_at_k(tables["b1"], 10)) / 2
    difference = ours - ndcg_at_k(tables["a"], 10)
    assert second["difference"] == pytest.approx(difference.mean())
    assert second["low"] < second["difference"] < second["high"]
    assert second["p"] == pytest.approx(ttest_rel(ours, ndcg_at_k(tables["a"], 10)).pvalue)
    assert "difference" not in first
    text = markdown([first, second])
    assert f"{second['difference']:+.4f}" in text and "minus a" in text and "±" in text


def test_p_is_corrected_for_the_number_of_rows(runs):
    runs |= {name: report(ranks(place, -place)) for place, name in enumerate("abc")}
    rows = compare_runs([Entry(name, Path(name)) for name in "abc"])
    alone = [compare_runs([Entry("a", Path("a")), Entry(name, Path(name))])[1]["p"] for name in "bc"]
    assert min(row["p"] for row in rows[1:]) == pytest.approx(2 * min(alone))


@pytest.mark.parametrize("again", [Entry("b", Path("b")), Entry("b", Path("x/../b"), "mme_sid")], ids=str)
def test_a_run_counts_once_whatever_it_is_called(again, runs):
    runs |= {name: report(ranks(0)) for name in ("a", "b", "x/../b")}
    with pytest.raises(ConfigError, match=f"b={again.folder}:mme_sid is given twice"):
        compare_runs([Entry("a", Path("a")), Entry("b", Path("b")), again])


def test_a_training_that_runs_share_counts_once(runs):
    """A run made of another one's folders has its sequence model, whose spread would be one of nothing."""
    for number, name in enumerate("ab"):
        made = report(ranks(number), fine_tuned="mme_sid")
        made.metrics["rows"]["sasrec"] = summarise(ranks(2))
        made.metrics["trained_on"]["sasrec"] = "train"
        table = made.rankings.append_column("rank_sasrec", [ranks(2) + 1])
        runs[name] = dataclasses.replace(made, rankings=table)
        made_from = {"train_collab": "one", "finetune": name}
        object.__setattr__(runs[name], "_manifest", {"inputs": made_from})
    ours = [Entry("ours", Path("a")), Entry("ours", Path("b"))]
    sasrec = [Entry("sasrec", Path(name), "sasrec") for name in "ab"]
    assert [row["runs"] for row in compare_runs([sasrec[0], *ours])] == [1, 2]
    with pytest.raises(ConfigError, match=r"sasrec=b:sasrec and a:sasrec are one training, .* their train_c"):
        compare_runs([*sasrec, *ours])


def test_what_was_learned_from_is_told(runs):
    runs |= {"a": report(ranks(0)), "b": report(ranks(1), trained_on="train and valid")}
    rows = compare_runs([Entry("a", Path("a")), Entry("b", Path("b"))])
    assert [row["trained_on"] for row in rows] == ["train", "train and valid"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"catalog": "other"}, "ranked other items"),
        ({"split": "global_time"}, "differ in split: global_time and leave_one_out"),
        ({"mask_seen": False}, "differ in masking of the history"),
        ({"user": [f"v{number}" for number in range(300)]}, "other users or targets"),
        ({"target": ["i1"] * 300}, "other users or targets"),
        ({"history_length": [2] * 300}, "other users or targets"),
    ],
)
def test_unlike_runs_are_not_compared(changes, message, runs):
    runs |= {"a": report(ranks(0)), "b": report(ranks(1), **changes)}
    with pytest.raises(ArtifactMismatchError, match=message):
        compare_runs([Entry("a", Path("a")), Entry("b", Path("b"))])


def test_the_tool_reads_finished_runs(finished, capsys, monkeypatch):
    folder = finished / "evaluate"

    def go(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["compare_runs.py", *arguments])
        with pytest.raises(SystemExit) as left:
            load_tool("compare_runs").main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    code, out, _ = go(f"popular={folder}:popularity", f"ours={folder}")
    metrics = json.loads((folder / "metrics.json").read_text())["rows"]
    assert code == 0 and f"{metrics['mme_sid']['ndcg@10']:.4f}" in out
    first, second = ([cell.strip() for cell in line.split("|")] for line in out.splitlines()[2:])
    assert f"{metrics['popularity']['recall@10']:.4f}" in first
    assert (first[3], second[3]) == ("", "train"), "popularity learns nothing"
    assert go(f"popular={finished}:popularity", f"ours={finished}")[:2] == (0, out), "of a run its evaluation"
    for arguments, message in (
        (["nonsense", f"ours={folder}"], "is not of the form NAME=FOLDER"),
        ([f"ours={folder}"], "at least two names"),
        ([f"a={folder}", f"b={folder}:svd"], "there is no method 'svd', but mme_sid, sasrec (sasrec (ce))"),
        ([f"a={folder}", "b=nowhere"], "nowhere is not the output of a finished stage (no such folder)"),
        ([f"a={folder}", f"b={folder / 'metrics.json'}"], "finished stage (a file). Give the folder of"),
    ):
        code, _, error = go(*arguments)
        assert code == 2 and message in error, message


def test_entries_are_read_from_text(tmp_path):
    assert Entry.parse("a=x/y") == Entry("a", Path("x/y"), None)
    assert Entry.parse("a=x/y:sasrec") == Entry("a", Path("x/y"), "sasrec")
    dated = tmp_path / "10:30"
    dated.mkdir()
    assert Entry.parse(f"a={dated}") == Entry("a", dated, None)
    assert Entry.parse(f"a={dated}:mine.models:MyGRU") == Entry("a", dated, "mine.models:MyGRU")
    for text in ("a", "=x", "a=", "a=:b"):
        with pytest.raises(ConfigError, match="not of the form"):
            Entry.parse(text)
