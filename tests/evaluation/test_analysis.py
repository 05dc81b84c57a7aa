"""Groups, lengths, differences and the page, on cases small enough to count by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from worlds import interactions

from llmrec.config import as_dict
from llmrec.errors import ConfigError
from llmrec.evaluation import analysis, evaluate, report
from llmrec.evaluation.config import EvaluateConfig
from llmrec.evaluation.metrics import ndcg_at_k
from llmrec.evaluation.rank import Ranking, popularity
from llmrec.evaluation.table import format_table, html_table
from llmrec.finetune.config import FinetuneConfig
from llmrec.runs import Run


def ranking(rank: list[float], top: list[list[int]] | None = None) -> Ranking:
    values = np.array(rank, dtype=np.float64)
    return Ranking(rank=values, rank_seen_kept=values + 1, top=np.array(top or [[1]] * len(rank)))


def test_items_are_grouped_by_popularity_and_cold_ones_stand_apart():
    count = np.array([0, 5, 50, 0, 7, 7, 1, 0, 2, 3, 1])
    group = analysis.item_groups(count, head_rate=0.1, mid_rate=0.4)
    names = [analysis.GROUPS[number] for number in group[1:]]
    assert names == ["mid", "head", "cold", "mid", "mid", "tail", "cold", "tail", "mid", "tail"]


def test_slices_are_means_over_the_users_they_name():
    data = interactions([[1, 2, 3], [2, 3, 1], [1, 3, 2], [3, 1, 2]], 3)
    targets = data.targets("test")
    rankings = {"a": ranking([0, 20, 3, 4])}
    found = analysis.by_group(rankings, targets, np.array([0, 0, 1, 3]), (10,))
    assert {name: part["num_users"] for name, part in found.items()} == {"head": 1, "mid": 2, "cold": 1}
    assert found["head"]["rows"]["a"]["recall@10"] == 0 and found["mid"]["rows"]["a"]["recall@10"] == 1
    lengths = analysis.by_length(rankings, targets, (10,), (5, 10))
    assert list(lengths) == ["0-5"] and lengths["0-5"]["rows"]["a"]["recall@10"] == 0.75


def test_users_are_parted_by_the_longest_history_of_each_group():
    length = np.array([0, 9, 10, 50, 51, 900])
    found = analysis.parts_by_length(length, (9, 50))
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "0-9": [True, True, False, False, False, False],
        "10-50": [False, False, True, True, False, False],
        "51+": [False, False, False, False, True, True],
    }
    assert list(analysis.parts_by_length(length[:2], (9, 50))) == ["0-9"]


def test_every_number_of_the_metrics_is_of_the_method_and_the_ranks_it_names():
    """Where the history's items are ranked, too, all targets are out of the first ten here."""
    data = interactions([[1, 2, 3], [2, 3, 1], [1, 3, 2], [3, 1, 2]], 3)
    targets = data.targets("test")
    better, worse = ranking([0, 3, 9, 4]), ranking([0, 12, 40, 30])
    rankings = {
        "ours": dataclasses.replace(better, rank_seen_kept=better.rank + 15),
        "theirs": dataclasses.replace(worse, rank_seen_kept=worse.rank + 15),
    }
    found = evaluate.summarise_all(EvaluateConfig(bootstrap_samples=50), data, targets, rankings)
    assert {name: row["recall@10"] for name, row in found["rows"].items()} == {"ours": 1, "theirs": 0.25}
    assert {name: row["recall@10"] for name, row in found["seen_kept"].items()} == {"ours": 0, "theirs": 0}
    assert {name: row["recall@20"] for name, row in found["seen_kept"].items()} == {
        "ours": 0.75,
        "theirs": 0.25,
    }
    difference = found["paired"]["ours - theirs"]["recall@10"]
    assert difference["difference"] == 0.75 and difference["high"] >= 0.75 >= difference["low"]
    shares = found["history_length"]["0-5"]["rows"]
    assert {name: row["recall@10"] for name, row in shares.items()} == {"ours": 1, "theirs": 0.25}
    groups = found["groups"].values()
    for name, share in (("ours", 1.0), ("theirs", 0.25)):
        weighted = sum(part["rows"][name]["recall@10"] * part["num_users"] for part in groups) / 4
        assert weighted == share


def test_coverage_and_popularity_of_recommendations():
    found = analysis.recommendations(np.array([[1, 2, 0], [2, 3, 1]]), np.array([0, 10, 4, 1, 9]))
    assert found["coverage@10"] == 3 / 4
    assert found["mean_train_count@10"] == pytest.approx((10 + 4 + 4 + 1 + 10) / 5)
    longer = analysis.recommendations(np.arange(1, 21)[None], np.array([0, *[1] * 10, *[5] * 10]))
    assert (longer["coverage@10"], longer["mean_train_count@10"]) == (0.5, 1)


def test_paired_differences_find_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    second = np.where(rng.random(2000) < 0.3, 0.0, 50.0)
    better = np.where(rng.random(2000) < 0.4, 0.0, 50.0)
    found = analysis.paired(better, second, samples=500, seed=0)["recall@10"]
    assert found["difference"] == pytest.approx((better < 10).mean() - (second < 10).mean())
    assert found["low"] < 0.1 < found["high"] and found["low"] > 0 and found["p_value"] < 1e-6
    same = analysis.paired(second, second, samples=50, seed=0)["ndcg@10"]
    assert same["difference"] == same["low"] == same["high"] == 0 and same["p_value"] is None


def test_the_interval_is_that_of_drawing_users_again_and_again():
    rng = np.random.default_rng(1)
    difference = ndcg_at_k(rng.integers(0, 30, 3000), 10) - ndcg_at_k(rng.integers(0, 40, 3000), 10)
    found = analysis.difference_of(difference, samples=4000, seed=0)
    means = [difference[rng.integers(0, 3000, 3000)].mean() for _ in range(4000)]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=6e-4)


def test_one_user_alone_has_a_difference_and_no_p():
    found = analysis.difference_of(np.array([0.5]), samples=20, seed=0)
    assert found == {"difference": 0.5, "low": 0.5, "high": 0.5, "p_value": None}


def test_corrected_p_values_are_at_most_1_and_in_the_order_given():
    assert analysis.holm([0.6, 0.01, 0.9]) == [1, pytest.approx(0.03), 1]
    assert analysis.holm([0.03, 0.02]) == [pytest.approx(0.04)] * 2 and analysis.holm([]) == []


def test_rounding_of_a_mean_over_seeds_is_no_difference():
    """Three runs of what has no seed, such as popularity, against one: the last bit differs for all alike."""
    single = ndcg_at_k(np.tile(np.arange(0, 12, 0.5), 20), 10)
    rounded = np.stack([single] * 3).mean(axis=0) - single
    assert rounded.any()
    found = analysis.difference_of(rounded, samples=20)
    assert found == {"difference": 0, "low": 0, "high": 0, "p_value": None}


@pytest.mark.parametrize("number", [2, 50])
def test_the_same_difference_for_all_users_has_no_p(number):
    found = analysis.difference_of(np.full(number, 0.3), samples=20)
    assert found["p_value"] is None and found["difference"] == pytest.approx(0.3)


def test_a_mean_of_runs_and_a_single_one_that_are_equally_good_seldom_differ():
    """In about 5 of 100 comparisons at p < 0.05, and then the interval leaves 0 out too."""
    rng = np.random.default_rng(0)
    alarms, agree = [], []
    for _ in range(150):
        place = rng.normal(4.5, 2, 8000) + rng.normal(0, 1, (4, 8000))
        runs = ndcg_at_k(np.floor(np.exp(np.maximum(place, 0))), 10)
        found = analysis.difference_of(runs[:3].mean(axis=0) - runs[3], samples=100, seed=0)
        alarms.append(found["p_value"] < 0.05)
        agree.append(alarms[-1] == (not found["low"] <= 0 <= found["high"]))
    assert 0.02 <= np.mean(alarms) <= 0.08 and np.mean(agree) > 0.9


def metrics_of(data, rankings, config=None):
    config = config or EvaluateConfig(bootstrap_samples=20)
    return evaluate.summarise_all(config, data, data.targets("test"), rankings)


def test_ratios_and_table_say_what_the_rows_say():
    data = interactions([[1, 2, 3], [2, 3, 1], [1, 3, 2], [3, 1, 2]], 3)
    rankings = {
        "mme_sid": ranking([0, 0, 0, 30]), "popularity": ranking([0, 30, 30, 30]),
        "best_possible": ranking([0, 0, 0, 0]),
    }  # fmt: skip
    metrics = metrics_of(data, rankings)
    assert metrics["ratios"] == {"mme_sid": {"over_popularity": 3.0, "over_best_possible": 0.75}}
    assert metrics["seen_kept"]["mme_sid"]["recall@10"] == 0.75
    table = format_table(metrics)
    assert "3.0 x popularity, 75.0% of the best possible" in table
    assert table.splitlines()[1].split()[:3] == ["mme_sid", "0.7500", "0.7500"]
    shown = html_table(metrics | {"labels": {"mme_sid": "<own>"}})
    assert "<tr><td>&lt;own&gt;</td><td>0.7500</td><td>0.7500</td>" in shown
    assert shown.count("<tr>") == 4 and "recall@10 of &lt;own&gt;: 3.0 x popularity" in shown


def test_methods_are_ranked_with_the_truth_where_it_is_known(caplog):
    caplog.set_level("INFO")
    data = interactions([[1, 2, 3], [2, 3, 1]], 4)
    truth = np.zeros((2, 5), dtype=np.float32)
    truth[0, [3, 4]], truth[1, [1, 4]] = (0.9, 0.1), (0.2, 0.8)
    data = dataclasses.replace(data, true_scores=truth)
    rankings = evaluate.rank_methods(
        EvaluateConfig(),
        data,
        data.targets("test"),
        [popularity(data)],
        {"popularity": "shown"},
    )
    assert "evaluate: shown, recall@10" in caplog.text
    assert rankings["best_possible"].rank.tolist() == [0, 1]
    assert rankings["best_possible"].top[:, :2].tolist() == [[3, 4], [4, 1]]


def test_the_page_escapes_titles_and_shows_examples():
    titles = ["<script>alert(1)</script>", "Salt & Pepper", "日本茶"]
    data = interactions([[1, 2, 3], [2, 3, 1], [1, 3, 2]], 3, titles=titles)
    targets = data.targets("test")
    rankings = {"mme_sid": ranking([0, 1, 2], [[3, 2], [2, 1], [1, 3]]), "popularity": ranking([2, 2, 2])}
    metrics = metrics_of(data, rankings)
    for test, p in zip(metrics["paired"]["mme_sid - popularity"].values(), (0.0, None)):
        test["p_value"] = p
    page = report.render(metrics, data, targets, rankings, [data], EvaluateConfig())
    assert page.count('class="hit">rank') == 3
    near = rankings | {"mme_sid": ranking([0, 9.5, 12345], [[3, 2], [2, 1], [1, 3]])}
    shown = report.render(metrics, data, targets, near, [data], EvaluateConfig())
    assert shown.count('class="hit">rank') == 1 and "rank 10.5<" in shown and "rank 12,346<" in shown
    assert "<td>&lt; 0.001</td>" in page and "<td>-</td>" in page
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    assert "Salt &amp; Pepper" in page and "日本茶" in page
    assert (
        "http://www.w3.org/2000/svg" in page and 'src="' not in page and "href=" not in page.split("<svg")[0]
    )
    assert page == report.render(metrics, data, targets, rankings, [data], EvaluateConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": (5, 20)}, "must hold 10"),
        ({"ks": (10, 10)}, "different numbers"),
        ({"head_rate": 0.7}, "must be below 1"),
        ({"length_edges": ()}, "must be ascending"),
        ({"length_edges": (10, 5)}, "must be ascending"),
        ({"length_edges": (5, 5)}, "must be ascending"),
        ({"length_edges": (0, 5)}, "must be ascending"),
        ({"top_k": 9}, "at least 10, got 9"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**settings)


def test_what_a_model_reports_about_itself_is_drawn_one_panel_a_quantity():
    log = [
        {"epoch": epoch, "train_loss": 1.0, "parts": {"kl": 1 / epoch, "load": [0.5, 0.25, 0.25]}}
        for epoch in (1, 2, 3)
    ]
    with_vector = report.part_curves([*log, {"epoch": 4, "train_loss": 0.9}])
    assert len(with_vector) == 2
    assert "kl" in with_vector[0] and with_vector[1].count("<path") > with_vector[0].count("<path")
    assert report.part_curves([{"epoch": 1, "train_loss": 1.0}]) == report.part_curves([]) == []


def test_what_a_model_reports_from_a_later_epoch_on_is_drawn_too():
    """As SIGMA-GMVAE does of its hard interests."""
    log = [
        {"epoch": epoch, "parts": {"kl": 1.0, **({"hard": 0.5} if epoch > 2 else {})}}
        for epoch in range(1, 6)
    ]
    assert ["hard" in drawn for drawn in report.part_curves(log)] == [False, True]


def test_targets_that_are_easy_since_they_repeat_are_told_of_where_the_history_is_masked(
    finished, monkeypatch
):
    run = Run(finished)
    monkeypatch.setattr(evaluate, "repeated_targets", lambda *_: 0.25)
    for masked in (True, False):
        config = EvaluateConfig(bootstrap_samples=2, num_examples=0, mask_seen=masked)
        made = evaluate.evaluate(config, run.data, run.collab, run.content, run.ids, run.adapter)
        told = [note for note in made.metrics["notes"] if note.startswith("25.0% of the targets were in")]
        assert len(told) == masked


def tuned(**settings) -> SimpleNamespace:
    """As much of an adapter as names ask for."""
    return SimpleNamespace(settings={"config": as_dict(FinetuneConfig(**settings))})


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "mme_sid"),
        ({"fusion": "frequency"}, "mme_sid"),
        ({"fusion": "equal", "random_codes": True}, "mme_sid (random_codes=True, fusion=equal)"),
        ({"loss": "bce_full"}, "mme_sid (loss=bce_full)"),
        ({"method": "e4srec"}, "e4srec"),
        ({"method": "me", "me_mode": "sum"}, "me (me_mode=sum)"),
    ],
)
def test_what_makes_a_method_another_one_is_part_of_its_name(settings, label):
    collab = SimpleNamespace(provider="sasrec", model={"loss": "ce"}, metrics={}, knows_valid=False)
    method = settings.get("method", "mme_sid")
    assert evaluate.labels(collab, tuned(**settings), [method, "sasrec"]) == {
        method: label,
        "sasrec": "sasrec (ce)",
    }


def test_tables_say_who_learned_from_what_and_of_whom_it_is_not_known():
    ours = {"mme_sid": None, "sasrec": None, "popularity": None}

    def learned(metrics: dict, **settings) -> dict[str, str]:
        knows = "valid" in metrics.get("trained_on", ())
        collab = SimpleNamespace(provider="sasrec", metrics=metrics, knows_valid=knows)
        return evaluate.trained_on(collab, tuned(**settings), ours)

    names = {"mme_sid": "mme_sid", "sasrec": "sasrec (ce)"}
    found = learned({"trained_on": ["train"]})
    assert found == {"mme_sid": "train", "sasrec": "train"} and evaluate.notes(found, names) == []
    found = learned({"trained_on": ["train", "valid"]})
    assert found == dict.fromkeys(names, "train and valid")
    assert evaluate.notes(found, names) == [
        "mme_sid and sasrec (ce) learned from train and validation items."
    ]
    found = learned({"trained_on": ["train"]}, include_valid=True, eval_every_epochs=0)
    assert found == {"mme_sid": "train and valid", "sasrec": "train"}
    assert evaluate.notes(found, names)[1] == evaluate.UNEQUAL
    found = {"mme_sid": learned({})["mme_sid"]}
    assert found == {"mme_sid": "unknown"}
    (said,) = evaluate.notes(found, names)
    assert said.startswith(
        "mme_sid reads collaborative vectors from a file; what they were learned from is not"
    )
