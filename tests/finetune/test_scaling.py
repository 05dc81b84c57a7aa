"""Scaling of frozen item vectors: against NumPy, and fitted once for all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_train import TINY, fit

from llmrec.errors import ArtifactMismatchError
from llmrec.finetune.adapter import Adapter, per_item
from llmrec.finetune.scaling import SHRINKAGE, fit_scaling, scale
from llmrec.finetune.scoring import load_scorer


def skewed(rows: int = 400, width: int = 6) -> np.ndarray:
    """Vectors far from the origin that vary mostly along one direction; row 0 and row 5 are zero."""
    rng = np.random.default_rng(0)
    made = (
        rng.normal(size=(rows, width)) * np.array([30, 3, 1, 1, 0.3, 0.1]) @ rng.normal(size=(width, width))
    )
    made = (made + 100).astype(np.float32)
    made[[0, 5]] = 0
    return made


def scaled(table: np.ndarray, how: str) -> np.ndarray:
    vectors = {"text": table}
    return scale(vectors, how, fit_scaling(vectors, how))["text"]


def present(table: np.ndarray) -> np.ndarray:
    return table[table.any(axis=1)].astype(np.float64)


@pytest.mark.parametrize("how", ["raw", "standardise", "whiten", "l2"])
def test_rows_without_a_vector_stay_zero_and_types_stay(how):
    found = scaled(skewed(), how)
    assert found.dtype == np.float32 and found.shape == (400, 6)
    assert not found[[0, 5]].any() and np.isfinite(found).all()


def test_standardise_has_one_factor_for_all_columns():
    table = skewed()
    rows = present(table)
    expected = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0).mean())
    np.testing.assert_allclose(present(scaled(table, "standardise")), expected, rtol=2e-3, atol=1e-4)


def test_whitened_directions_have_the_variance_that_shrinking_leaves_them():
    table = skewed()
    found = np.cov(present(scaled(table, "whiten")).T, bias=True)
    before = np.cov(present(table).T, bias=True)
    spread, directions = np.linalg.eigh(before)
    share = spread / (spread + SHRINKAGE * np.trace(before) / len(before))
    np.testing.assert_allclose(found, directions * share @ directions.T, atol=2e-3)


def test_the_root_is_the_same_however_columns_are_turned():
    """ZCA commutes with rotations: what is whitened after a rotation is the rotated whitened."""
    table = skewed()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0].astype(np.float32)
    np.testing.assert_allclose(
        present(scaled(table @ turn, "whiten")), present(scaled(table, "whiten")) @ turn, atol=2e-2
    )


def test_l2_rows_have_length_one():
    np.testing.assert_allclose(np.linalg.norm(present(scaled(skewed(), "l2")), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("how", ["standardise", "whiten"])
def test_equal_vectors_and_none_at_all_do_no_harm(how):
    for table in (np.ones((4, 3), np.float32), np.zeros((4, 3), np.float32)):
        assert not scaled(table, how).any()


@pytest.mark.parametrize("how", ["standardise", "whiten", "l2"])
def test_saved_and_loaded_scores_are_equal_and_later_items_change_none(how, tmp_path):
    adapter, (collab, content, ids) = fit(dataclasses.replace(TINY, vectors=how))
    assert bool(adapter.scaling) == (how != "l2")
    (tmp_path / "a").mkdir()
    adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    history = torch.tensor([[1, 2, 3]])
    before = load_scorer(loaded, collab, content, ids).score(history)
    # One more item with vectors far from all others.
    more = {name: np.concatenate([table, 50 + table[:1]]) for name, table in content.vectors.items()}
    heads = {
        name: torch.cat([value, value[-1:]]) if per_item(name) else value
        for name, value in adapter.heads.items()
    }
    after = load_scorer(
        dataclasses.replace(loaded, heads=heads),
        dataclasses.replace(collab, vectors=np.concatenate([collab.vectors, 50 + collab.vectors[:1]])),
        dataclasses.replace(content, vectors=more, missing={"text": np.zeros(len(more["text"]), dtype=bool)}),
        dataclasses.replace(
            ids, codes={name: np.concatenate([codes, codes[-1:]]) for name, codes in ids.codes.items()}
        ),
    ).score(history)
    torch.testing.assert_close(after[:, :-1], before, rtol=1e-5, atol=1e-5)


def test_weights_without_their_scaling_are_refused():
    adapter, made = fit(dataclasses.replace(TINY, vectors="whiten"))
    with pytest.raises(
        ArtifactMismatchError, match=r"no scaling of collab vectors with 6 numbers; recompute"
    ):
        load_scorer(dataclasses.replace(adapter, scaling={}), *made)
