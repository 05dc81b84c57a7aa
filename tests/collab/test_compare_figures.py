"""What a comparison of sequence models makes of figures: tests of differences, and which column is which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import ttest_1samp
from worlds import interactions

from llmrec.collab import compare, compare_cli, compare_report
from llmrec.collab.compare_cli import chosen_rows, every_provider
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.configs.sasrec import SASRecConfig
from llmrec.collab.provider import provider_scorer
from llmrec.collab.train import train_collab
from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.errors import ConfigError
from llmrec.evaluation.metrics import ndcg_at_k, summarise
from llmrec.evaluation.rank import popularity, rank_users
from llmrec.files import read_json
from llmrec.pipeline import run_stage


def test_differences_are_to_the_reference_and_corrected_for_the_rows_that_can_be_tested():
    """By Holm's method, metric by metric; a row that differs for nobody has no p and corrects no other."""
    rng = np.random.default_rng(0)
    reference = {metric: rng.random(200) for metric in compare.SHOWN}
    users = {"b": {}, "reference": reference, "same": dict(reference), "a": {}}
    for name, shift in (("a", 0.07), ("b", 0.05)):
        users[name] = {
            metric: values + shift + rng.normal(0, 0.3, 200) for metric, values in reference.items()
        }
    found = {name: {} for name in users}
    compare.add_differences(found, users, "reference", 300)
    assert "difference" not in found["reference"]
    for metric in compare.SHOWN:
        same = found["same"]["difference"][metric]
        assert same == {"difference": 0, "low": 0, "high": 0, "p_value": None}
        plain = {name: ttest_1samp(users[name][metric] - reference[metric], 0).pvalue for name in "ab"}
        first, second = sorted("ab", key=plain.get)
        expected = {first: 2 * plain[first], second: max(2 * plain[first], plain[second])}
        for name in "ab":
            row = found[name]["difference"][metric]
            assert row["difference"] == pytest.approx((users[name][metric] - reference[metric]).mean())
            assert row["low"] < row["difference"] < row["high"]
            assert row["p_value"] == pytest.approx(plain[name])
            assert row["holm_p"] == pytest.approx(min(1, expected[name]))


def test_a_cell_writes_how_its_model_ranks_and_what_it_cost(tmp_path):
    market = SampleMarketConfig(num_users=60, num_items=48, num_interests=4, max_length=10)
    data = run_stage(prepare_data, PrepareDataConfig(market=market), (), tmp_path / "prepare_data")
    config = TrainCollabConfig(sasrec=SASRecConfig(embed_dim=8, inner_dim=16), epochs=3)
    collab = run_stage(train_collab, config, (data,), tmp_path / "cell" / "train_collab")
    compare.rank_cell(tmp_path / "cell", collab, data)
    written = read_json(tmp_path / "cell" / "metrics.json")
    ranking = rank_users(provider_scorer(collab), data, data.targets("test"))
    ranks = load_file(tmp_path / "cell" / "ranks.safetensors")
    for name, ks in (("rank", "test"), ("rank_seen_kept", "test_seen_kept")):
        assert np.array_equal(ranks[name], getattr(ranking, name))
        assert written[ks] == summarise(getattr(ranking, name), (5, 10, 20))
    assert written["test"] != written["test_seen_kept"]
    assert written["valid"] == {name: collab.metrics[f"valid_{name}"] for name in ("ndcg@10", "recall@10")}
    for name in ("num_parameters", "best_epoch", "epochs"):
        assert written[name] == collab.metrics[name]
    middle = sorted(row["train_seconds"] for row in collab.log)[1]
    assert written["seconds_per_epoch"] == middle
    assert written["targets_per_second"] == pytest.approx(collab.metrics["num_targets"] / middle)
    assert (written["provider"], written["loss"]) == ("sasrec", "ce")
    users = compare.mean_by_user([tmp_path / "cell"] * 2)
    assert users["ndcg@10"].tolist() == ndcg_at_k(ranking.rank, 10).tolist()


def a_row(start: float) -> dict:
    """Figures of a finished row, each another one."""
    numbers = iter(np.arange(start, start + 0.05, 0.0001))
    metrics = [f"{kind}@{k}" for kind in ("recall", "ndcg", "mrr") for k in (5, 10, 20)]

    def figures(names: list[str]) -> dict:
        return {name: {"mean": float(next(numbers)), "sd": None} for name in names}

    return {
        "num_seeds": 2,
        "num_wanted": 3,
        "test": figures(metrics),
        "test_seen_kept": figures(metrics),
        "valid": figures(["ndcg@10", "recall@10"]),
        "loss": "ce",
        "num_parameters": 1234,
        "seconds_per_epoch": 2.5,
        "targets_per_second": 5678.0,
        "epochs": 31.0,
        "best_epoch": 21.0,
        "seconds": 90.0,
        "peak_memory_bytes": 7 * 2**20,
    }


def test_every_figure_stands_under_its_heading():
    rows = {"sasrec": a_row(0.1), "mind": a_row(0.2)}
    rows["mind"]["difference"] = {
        "ndcg@10": {"difference": 0.0123, "low": 0.0012, "high": 0.0234, "p_value": 0.02, "holm_p": 0.04},
        "recall@10": {"difference": 0.9, "low": 0.8, "high": 1.0, "p_value": 0.5, "holm_p": 0.6},
    }
    values = {name: number / 100 for number, name in enumerate(rows["mind"]["test"])}
    results = {"reference": "sasrec", "popularity": {"test": values, "test_seen_kept": {
        name: value + 0.5 for name, value in values.items()}}}  # fmt: skip
    table = compare_report.quality_table(compare_report.ordered(rows), results)
    mind, sasrec, popular = (dict(zip(table.head, line)) for line in table.rows)
    assert mind["method"] == "mind (ce)" and mind["seeds"] == "2 of 3"
    assert mind["ndcg@10 minus sasrec (95 % interval)"] == "+0.0123 (+0.0012 to +0.0234)"
    assert mind["p"] == "0.040" and sasrec["p"] == ""
    for shown, row in ((mind, rows["mind"]), (sasrec, rows["sasrec"])):
        for metric in compare_report.METRICS:
            assert shown[metric] == f"{row['test'][metric]['mean']:.4f}"
        for metric in ("recall@10", "ndcg@10"):
            assert shown[f"seen kept: {metric}"] == f"{row['test_seen_kept'][metric]['mean']:.4f}"
        assert shown["valid ndcg@10"] == f"{row['valid']['ndcg@10']['mean']:.4f}"
    for metric in compare_report.METRICS:
        assert popular[metric] == f"{values[metric]:.4f}"
    assert popular["seen kept: ndcg@10"] == f"{values['ndcg@10'] + 0.5:.4f}"
    costs = compare_report.cost_table({"mind": rows["mind"]})
    assert dict(zip(costs.head, costs.rows[0])) == {
        "method": "mind (ce)",
        "parameters": "1,234",
        "s / epoch": "2.5",
        "targets / s": "5,678",
        "epochs": "31",
        "best epoch": "21",
        "minutes in all": "1.5",
        "peak MiB": "7",
    }


def test_a_row_names_its_loss_unless_its_name_has_it():
    assert compare_report.label("sasrec-bce", {"loss": "bce"}) == "sasrec-bce"
    assert compare_report.label("diffurec-distance", {"loss": "ce"}) == "diffurec-distance (ce)"
    assert compare_report.label("bag", {"loss": None}) == "bag"


def test_popularity_at_validation_is_ranked_as_each_row_ranks():
    lists = [[1, 2, 3 + user, 1, 2] if user % 2 else [2, 1, 3 + user, 2, 1] for user in range(20)]
    data = interactions(lists, 22)
    ranking = rank_users(popularity(data), data, data.targets("valid"))
    ways = {True: ndcg_at_k(ranking.rank, 10).mean(), False: ndcg_at_k(ranking.rank_seen_kept, 10).mean()}
    assert ways[True] != ways[False]
    rows = {"a": TrainCollabConfig(), "b": TrainCollabConfig(mask_seen=False)}
    assert compare.popular_ndcg(rows, data) == ways
    rows["b"] = replace(rows["b"], mask_seen=True, select="last")
    assert compare.popular_ndcg(rows, data) == {True: ways[True]}
    assert compare.popular_ndcg({"b": rows["b"]}, data) == {}


def test_seeds_and_models_are_not_set_as_settings():
    for name, told in {
        "seed": "seeds are given by --seeds",
        "provider": "models are chosen by --rows",
    }.items():
        with pytest.raises(ConfigError, match=rf"--set train_collab\.{name}: {told}"):
            chosen_rows(every_provider(), ["sasrec"], {name: "5"})


def test_settings_of_data_that_are_already_there_are_refused(tmp_path, capsys):
    command = ["--prepare-data", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as left:
        compare_cli.main(
            every_provider, PrepareDataConfig, arguments=[*command, "--set", "prepare_data.k_core=10"]
        )
    assert left.value.code == 2
    assert "--set prepare_data.k_core has no effect with --prepare-data" in capsys.readouterr().err
