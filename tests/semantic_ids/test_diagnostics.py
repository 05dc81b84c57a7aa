"""Quality figures against counting by hand and O(n^2) loops."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import kendalltau
from worlds import interactions

from llmrec.semantic_ids import diagnostics
from llmrec.semantic_ids.diagnostics import (
    Coded,
    Pairs,
    behaviour_target_pairs,
    collisions,
    distances,
    kendall_tau,
    level_quality,
    modality_quality,
    nearest_items,
    neighbour_overlap,
    reconstruction_error,
    tau_per_user,
)


def loop_tau(x, y):
    """Concordant minus discordant pairs, over all pairs and over the untied ones."""
    score = ties_x = ties_y = 0
    for i, j in combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        score += a * b
        ties_x += a == 0
        ties_y += b == 0
    pairs = math.comb(len(x), 2)
    return score / math.sqrt((pairs - ties_x) * (pairs - ties_y)), score / pairs


@pytest.mark.parametrize("values", [1000, 5])
def test_tau_equals_the_count_over_all_pairs_with_and_without_ties(values):
    rng = np.random.default_rng(0)
    x = rng.integers(0, values, 80).astype(float)
    y = x + rng.integers(0, values, 80)
    assert kendall_tau(x, y) == pytest.approx(loop_tau(x, y), abs=1e-12)


def test_tau_of_equal_and_of_opposite_orders():
    x = np.arange(10.0)
    assert kendall_tau(x, np.exp(x)) == pytest.approx((1.0, 1.0))
    assert kendall_tau(x, -x) == pytest.approx((-1.0, -1.0))


@pytest.mark.parametrize("x", [np.zeros(0), np.ones(1), np.ones(7)])
def test_tau_is_undefined_where_everything_is_tied(x):
    assert kendall_tau(x, np.arange(float(len(x)))) == (None, None)


@pytest.mark.parametrize("values", [1000, 3, 1])
def test_tau_of_single_users_is_that_of_scipy(values, monkeypatch):
    monkeypatch.setattr(diagnostics, "MAX_PAIRS", 30)
    rng = np.random.default_rng(0)
    length = np.array([1, 4, 2, 3, 4, 1, 9, 3, 2])
    user = np.repeat(np.arange(len(length)), length)
    source, ours = rng.integers(0, values, (2, 41, 1)).astype(np.float32)
    history, target = rng.integers(1, 41, (2, len(user)))
    found = tau_per_user(coded(source, ours, latent=source), Pairs(history, target, user))
    truth = np.abs(source[history, 0] - source[target, 0])
    other = np.abs(ours[history, 0] - ours[target, 0])
    expected = [
        kendalltau(truth[user == one], other[user == one]).statistic for one in np.flatnonzero(length > 1)
    ]
    if values == 1:
        assert found == {"latent": None, "decoded": None}
    else:
        assert found["decoded"] == pytest.approx(np.nanmean(expected), abs=1e-12)
        assert found["latent"] == pytest.approx(1)


def test_neighbours_do_not_depend_on_where_the_origin_is():
    source = np.random.default_rng(0).normal(size=(301, 4)).astype(np.float32)
    assert neighbour_overlap(coded(source, source + 3000, latent=source), seed=0)["decoded"] > 0.95


def test_samples_pair_the_last_train_item_with_those_before_it():
    data = interactions([[1, 2, 3, 4, 5], [6, 7, 8], [2, 4, 6, 1]], 8)
    history, target, _user = behaviour_target_pairs(data, seed=0)
    assert list(zip(history.tolist(), target.tolist())) == [(1, 3), (2, 3), (2, 4)]


def test_users_without_train_items_give_no_sample():
    data = interactions([[1, 2], [3, 4, 5, 6]], 6)
    history, target, _user = behaviour_target_pairs(data, seed=0)
    assert (history.tolist(), target.tolist()) == ([3], [4])
    history, target, _user = behaviour_target_pairs(interactions([[1, 2]], 2), seed=0)
    assert len(history) == len(target) == 0


def test_many_samples_are_thinned_by_a_seeded_draw(monkeypatch):
    data = interactions([list(range(1, 31))] * 20, 30)
    monkeypatch.setattr(diagnostics, "MAX_SAMPLES", 100)
    history, target, _user = behaviour_target_pairs(data, seed=0)
    assert len(history) == 100 and set(target.tolist()) == {28} and 28 not in history
    assert np.array_equal(history, behaviour_target_pairs(data, seed=0)[0])
    assert not np.array_equal(history, behaviour_target_pairs(data, seed=1)[0])


def test_distances_are_euclidean_and_blocks_join(monkeypatch):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, 3)).astype(np.float32)
    a, b = rng.integers(0, 50, (2, 40_000))
    expected = np.sqrt(np.square(table[a].astype(float) - table[b]).sum(axis=1))
    np.testing.assert_allclose(distances(lambda items: table[items], a, b), expected)


def test_use_of_a_level_by_hand():
    codes = np.array([[0, 1], [0, 1], [1, 1], [3, 1]])
    first, second = level_quality(codes, 4)
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert first == pytest.approx({"utilisation": 0.75, "perplexity": math.exp(entropy), "dead_codes": 1})
    assert second == pytest.approx({"utilisation": 0.25, "perplexity": 1.0, "dead_codes": 3})


def test_collisions_by_hand():
    codes = np.array([[0, 1], [0, 1], [1, 0], [2, 2], [0, 1], [2, 2]])
    assert collisions(codes) == {"collision_rate": 0.5, "items_in_collision": 5, "largest_group": 3}
    assert collisions(codes[2:4]) == {"collision_rate": 0.0, "items_in_collision": 0, "largest_group": 1}


class Tables:
    """Stands for `Rebuilt`: tables that are simply given."""

    def __init__(self, latent, decoded):
        self.tables = {"latent": latent, "decoded": decoded}

    def __call__(self, what, items):
        return self.tables[what][items]

    def scaled(self, vectors):
        return vectors


def coded(source, decoded, *, latent=None, present=None, codes=None, codebooks=None):
    rows = len(source)
    return Coded(
        source=source,
        present=np.arange(rows) > 0 if present is None else present,
        codes=np.zeros((rows, 1), np.int64) if codes is None else codes,
        codebooks=np.zeros((1, 1, 1), np.float32) if codebooks is None else codebooks,
        rebuilt=Tables(decoded if latent is None else latent, decoded),
    )


def test_reconstruction_error_is_one_for_the_mean_and_zero_for_a_copy(monkeypatch):
    monkeypatch.setattr(diagnostics, "BLOCK", 7)
    rows = (np.random.default_rng(0).normal(size=(20, 3)) + 5).astype(np.float32)
    mean = np.broadcast_to(rows[1:].mean(axis=0), rows.shape)
    assert reconstruction_error(coded(rows, rows)) == 0
    assert reconstruction_error(coded(rows, mean)) == pytest.approx(1, rel=1e-5)


def test_neighbours_equal_a_sort_of_all_distances(monkeypatch):
    monkeypatch.setattr(diagnostics, "BLOCK", 16)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(61, 4)).astype(np.float32)
    items, queries = np.arange(1, 61), np.array([3, 17, 60])
    found = nearest_items(lambda ids: table[ids], items, queries, 5)
    for query, row in zip(queries, found):
        others = items[items != query]
        order = np.argsort(np.linalg.norm(table[others] - table[query], axis=1))
        assert row.tolist() == others[order[:5]].tolist()


def test_neighbour_overlap_of_a_copy_is_one_and_of_noise_near_chance():
    rng = np.random.default_rng(0)
    source, noise = rng.normal(size=(2, 301, 4)).astype(np.float32)
    found = neighbour_overlap(coded(source, noise, latent=source), seed=0)
    assert found["latent"] == 1 and found["decoded"] == pytest.approx(10 / 299, abs=0.03)
    assert (found["k"], found["num_queries"]) == (10, 300)


def test_fewer_items_are_asked_in_large_catalogues(monkeypatch):
    source = np.random.default_rng(0).normal(size=(501, 4)).astype(np.float32)
    monkeypatch.setattr(diagnostics, "MAX_COMPARISONS", 500 * 150)
    assert neighbour_overlap(coded(source, source), seed=0)["num_queries"] == 150
    monkeypatch.setattr(diagnostics, "MAX_COMPARISONS", 1)
    assert neighbour_overlap(coded(source, source), seed=0)["num_queries"] == 100


def test_items_without_a_vector_count_nowhere_and_random_codes_keep_no_order():
    rng = np.random.default_rng(0)
    num_items, levels, size = 300, 2, 32
    codebooks = rng.normal(size=(levels, size, 4)).astype(np.float32)
    codes = rng.integers(0, size, (num_items + 1, levels))
    table = codebooks[np.arange(levels), codes].sum(axis=1)
    present = np.ones(num_items + 1, dtype=bool)
    present[[0, 5]] = False
    wrong = table.copy()
    wrong[5] = 1e6
    history, target = rng.integers(1, num_items + 1, (2, 3000))
    shown = coded(table, wrong, present=present, codes=codes, codebooks=codebooks)
    found = modality_quality(shown, Pairs(history, target, history), seed=0)
    assert found["num_items"] == 299 and found["reconstruction_error"] == 0
    assert found["neighbour_overlap"]["latent"] == 1
    assert found["tau"]["num_samples"] == int(((history != 5) & (target != 5)).sum())
    assert found["tau"]["latent"] == found["tau"]["decoded"] == pytest.approx(1)
    assert abs(found["tau"]["random_codes"]) < 0.05
