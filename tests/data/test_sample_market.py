"""The sample market: its true probabilities are true, and it looks as its settings say."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.data.sample_market import (
    LAUNCH,
    draw_catalogue,
    draw_sequences,
    next_interest,
    sample_market,
    true_scores,
)
from llmrec.data.sample_pictures import COLOURS, NOUNS, PATTERNS, silhouette
from llmrec.interactions import Interactions

TINY = SampleMarketConfig(num_users=60, num_items=60, num_interests=5, max_length=9)


@pytest.fixture(scope="module")
def market() -> Interactions:
    """The world of the default settings."""
    return prepare_data(PrepareDataConfig())


def enumerate_next_item(config, catalogue, history):
    """P(next item | history) by going through every set of interests and every step, (N + 1,)."""
    total, mass = np.zeros(len(catalogue) + 1), 0.0
    for size in (2, 3, 4):
        sets = list(itertools.combinations(range(config.num_interests), size))
        for chosen in sets:
            prior = 1 / 3 / len(sets)
            probability, seen = prior, []
            for step, item in enumerate(history):
                options = next_items(config, catalogue, chosen, seen, launch=False)
                probability *= options[item]
                seen = history[: step + 1]
            mass += probability
            if probability:
                total += probability * next_items(config, catalogue, chosen, list(history), launch=True)
    return total / mass


def next_items(config, catalogue, chosen, seen, *, launch):
    """One step of the story, given the set of interests: probability of every item, (N + 1,)."""
    result = np.zeros(len(catalogue) + 1)
    for interest in chosen:
        if not seen:
            move = 1 / len(chosen)
        elif catalogue.interest[seen[-1]] not in chosen:
            move = 0.0
        elif catalogue.interest[seen[-1]] == interest:
            move = config.stay_rate
        else:
            move = (1 - config.stay_rate) / (len(chosen) - 1)
        weights = {}
        for item in range(1, len(catalogue) + 1):
            if (
                catalogue.interest[item] == interest
                and item not in seen
                and (launch or not catalogue.cold[item])
            ):
                same = bool(seen) and catalogue.colour[item] == catalogue.colour[seen[-1]]
                weights[item] = catalogue.weight[item] * (1 + config.colour_affinity * same)
        for item, weight in weights.items():
            result[item] += move * weight / sum(weights.values())
    return result


def test_true_scores_equal_the_sum_over_all_sets_of_interests():
    rng = np.random.default_rng(0)
    catalogue = draw_catalogue(TINY, rng)
    length = rng.integers(5, 10, 60)
    sequences = draw_sequences(TINY, catalogue, length, rng)
    scores = true_scores(TINY, catalogue, sequences, length - 1)
    visited = set()
    for user in range(0, 60, 3):
        history = sequences[user, : length[user] - 1].tolist()
        visited.add(len(set(catalogue.interest[history])))
        expected = enumerate_next_item(TINY, catalogue, history)
        np.testing.assert_allclose(scores[user], expected, rtol=1e-10, atol=1e-15)
    assert len(visited) >= 3


def test_next_interest_is_a_distribution_for_every_history():
    for num_visited in (1, 2, 3, 4):
        visited = np.zeros((6, 6), dtype=bool)
        visited[:, :num_visited] = True
        switches = np.arange(num_visited - 1, num_visited + 5)
        found = next_interest(visited, np.zeros(6, dtype=np.int64), switches, 0.7)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
        assert (found >= 0).all()
        np.testing.assert_allclose(found[:, 0], 0.7)
        assert (found[:, num_visited:] == 0).all() == (num_visited == 4)


def test_true_scores_are_calibrated_and_the_best_ranking_reaches_what_is_promised():
    data = sample_market(SampleMarketConfig(num_users=8000), 3)
    scores, target = data.true_scores.astype(np.float64), data.targets("test").item
    given = scores[np.arange(data.num_users), target]
    # Over all (user, item) pairs of one band of probability, as many happen as the sum says.
    for low, high in ((0, 0.003), (0.003, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 1)):
        inside = (scores >= low) & (scores < high)
        expected = scores[inside].sum()
        deviation = np.sqrt((scores[inside] * (1 - scores[inside])).sum())
        happened = ((given >= low) & (given < high)).sum()
        assert abs(happened - expected) < 4 * deviation
    rank = (scores > given[:, None]).sum(axis=1)
    for k in (5, 10, 20):
        promised = data.summary["market"]["best_reachable"]
        assert (rank < k).mean() == pytest.approx(promised[f"recall@{k}"], abs=0.02)
        ndcg = np.where(rank < k, 1 / np.log2(rank + 2), 0).mean()
        assert ndcg == pytest.approx(promised[f"ndcg@{k}"], abs=0.02)


def test_no_other_ranking_beats_the_true_one(market):
    target = market.targets("test").item
    truth = market.true_scores

    def recall(scores):
        given = scores[np.arange(len(target)), target]
        return ((scores > given[:, None]).sum(axis=1) < 10).mean()

    seen = np.where(truth > 0, 0, -np.inf)
    popularity = market.train_count + seen
    assert 0.02 < recall(popularity) < 0.08
    assert 0.5 < recall(truth) < 0.75
    noise = np.random.default_rng(0).normal(0, 0.5, truth.shape)
    assert recall(np.log(np.maximum(truth, 1e-30)) + noise) < recall(truth)


def test_scores_have_a_zero_row_sums_of_one_and_no_seen_items(market):
    scores = market.true_scores
    assert scores.shape == (market.num_users, market.num_items + 1)
    assert scores.dtype == np.float32
    assert not scores[:, 0].any()
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    targets = market.targets("test")
    for user in range(0, market.num_users, 97):
        history = market.item[targets.start[user] : targets.stop[user]]
        assert not scores[user, history].any()
        assert (scores[user] > 0).sum() <= market.num_items - len(history)
    assert (scores[np.arange(market.num_users), targets.item] > 0).all()


def test_nobody_takes_an_item_twice_and_times_have_no_ties(market):
    length = np.diff(market.offset)
    assert (length.min(), length.max()) == (5, 20)
    for begin, end in itertools.pairwise(market.offset):
        assert len(set(market.item[begin:end])) == end - begin
        assert (np.diff(market.timestamp[begin:end]) > 0).all()
    assert market.summary["ties"]["tied_pair_rate"] == 0


def test_cold_items_come_only_as_test_targets_in_the_launch_week(market):
    counts = {
        name: np.bincount(market.item[market.split == code], minlength=601)
        for name, code in (("train", 0), ("valid", 1), ("test", 2))
    }
    cold = (counts["train"] + counts["valid"] == 0) & (counts["test"] > 0)
    assert 25 <= cold.sum() <= 30
    assert market.summary["market"]["num_cold_items"] == 30
    assert market.summary["market"]["cold_test_rate"] > 0.03
    assert ((market.timestamp >= LAUNCH) == (market.split == 2)).all()


def test_popularity_has_a_long_tail(market):
    count = np.sort(market.train_count[1:])[::-1]
    assert count[:120].sum() > 0.35 * count.sum()
    assert count[0] > 5 * np.median(count)


def test_titles_and_pictures_tell_what_an_item_is(market):
    assert len(set(market.titles)) == 600
    assert {title.split()[-1].lower() for title in market.titles} == set(NOUNS)
    assert {title.split()[-2].lower() for title in market.titles} == set(COLOURS)
    assert {word for title in market.titles for word in PATTERNS if word in title.lower()} == set(PATTERNS)
    for item in range(0, 600, 25):
        picture = Image.open(io.BytesIO(market.images[market.items["image_path"][item].as_py()]))
        assert (picture.format, picture.size, picture.mode) == ("PNG", (64, 64), "RGB")
        # Lighter shades of a colour lie on the line from white through it.
        ink = 255 - np.asarray(picture).reshape(-1, 3).astype(float)
        ink = ink[ink.max(axis=1) > 60].sum(axis=0)
        colours = 255 - np.array(list(COLOURS.values()), dtype=float)
        likeness = colours @ ink / np.linalg.norm(colours, axis=1)
        assert list(COLOURS)[likeness.argmax()] == market.titles[item].split()[-2].lower()


def test_shapes_differ_from_each_other():
    shapes = {noun: np.asarray(silhouette(noun), dtype=float) / 255 for noun in NOUNS}
    assert len(shapes) == 24
    for one, other in itertools.combinations(NOUNS, 2):
        both = np.minimum(shapes[one], shapes[other]).sum()
        either = np.maximum(shapes[one], shapes[other]).sum()
        assert both / either < 0.85, (one, other)


def test_the_seed_decides_everything(tmp_path):
    def files(seed: int, name: str) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        sample_market(TINY, seed).save(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}

    one, again, other = files(1, "one"), files(1, "again"), files(2, "other")
    assert len(one) == 60 + 5
    assert one == again
    assert one["interactions.parquet"] != other["interactions.parquet"]


def test_the_market_survives_saving_and_loading(tmp_path):
    data = sample_market(TINY, 0)
    data.save(tmp_path)
    loaded = Interactions.load(tmp_path)
    assert np.array_equal(loaded.true_scores, data.true_scores)
    assert loaded.summary == data.summary
    assert Image.open(loaded.image_file(60)).size == (64, 64)
