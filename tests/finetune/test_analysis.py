"""Tau, spectra and fusion weights of fine-tuned models: known answers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from test_train import TINY, fit
from tiny_mme_sid import model, vectors
from worlds import cycle

from llmrec.finetune import analysis
from llmrec.semantic_ids.diagnostics import behaviour_target_pairs

DIMS = {"collab": 5, "text": 7}


def tiny(**settings):
    data = cycle()
    return data, model(data.num_items, dims=DIMS, **settings)


def test_tau_is_that_of_the_distances_of_behaviour_and_target():
    data, net = tiny()
    collab = vectors(data.num_items, DIMS)["collab"]
    found = analysis.taus(net, data, collab)
    pairs = behaviour_target_pairs(data, 0)

    def length(table):
        return np.linalg.norm(table[pairs.history] - table[pairs.target], axis=1)

    ids = torch.arange(data.num_items + 1)
    with torch.no_grad():
        tables = {
            "codes_text": (net.item_tokens.parts["codes_text"](ids), vectors(data.num_items, DIMS)["text"]),
            "token": (net.item_tokens(ids), collab),
            "item_matrix": (net.item_scores.folded(), collab),
        }
    for name, (table, reference) in tables.items():
        expected = kendalltau(length(reference), length(table.float().numpy())).statistic
        assert found[name] == pytest.approx(expected, abs=5e-3), name


def test_items_without_a_vector_have_no_part_in_tau():
    data, net = tiny()
    collab = vectors(data.num_items, DIMS)["collab"].copy()
    pairs = behaviour_target_pairs(data, 0)
    collab[pairs.target[0]] = 0
    counted = collab.any(1)[pairs.history] & collab.any(1)[pairs.target]
    assert 0 < counted.sum() < len(counted)
    with torch.no_grad():
        token = net.item_tokens(torch.arange(data.num_items + 1)).float().numpy()
    apart = [
        np.linalg.norm(table[pairs.history] - table[pairs.target], axis=1)[counted]
        for table in (collab, token)
    ]
    found = analysis.taus(net, data, collab)["token"]
    assert found == pytest.approx(kendalltau(*apart).statistic, abs=5e-3)


def test_an_orthogonal_projection_keeps_every_distance():
    data, net = tiny(method="e4srec", fusion_temperature=1e-3)
    part = net.item_tokens.parts["vectors_collab"]
    with torch.no_grad():
        part.linear.weight.copy_(torch.linalg.qr(torch.randn(16, 5, dtype=torch.float64))[0])
    collab = vectors(data.num_items, DIMS)["collab"]
    assert analysis.taus(net, data, collab)["vectors_collab"] == pytest.approx(1.0, abs=1e-6)
    found = analysis.spectra(net, collab)
    # Eq. 7: rank(E W + 1 b) <= rank(W) + 1
    assert found["collab_vectors"]["numerical_rank"] == 5
    assert found["token"]["numerical_rank"] <= 6
    assert "item_matrix" not in found and "token_before_activation" not in found


def test_the_activation_lifts_the_rank_and_is_shown_before_and_after():
    data, net = tiny(method="concat_mlp", fusion_temperature=1e-3)
    found = analysis.spectra(net, vectors(data.num_items, DIMS)["collab"])
    assert {"token", "token_before_activation", "target_table", "vectors_collab"} <= set(found)
    assert found["token_before_activation"]["numerical_rank"] <= 13 + 1 + 16


def test_weights_are_averaged_over_items_of_like_popularity():
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.2, 0.8]])
    found = analysis.weights_by_frequency(weights, ("target", "collab"), np.array([0, 0, 4, 5, 60]))
    assert found == {
        "0": {"target": 1.0, "collab": 0.0},
        "3-5": {"target": 0.25, "collab": 0.75},
        "51+": {"target": pytest.approx(0.2), "collab": pytest.approx(0.8)},
    }


def test_a_source_has_its_part_of_items_that_several_weigh_most():
    counts, names = np.array([0, 0, 1, 2, 3]), ("target", "collab")
    found = analysis.fusion_shares(torch.full((4, 2), 0.5), names, counts)
    assert found["largest_share"] == {"target": 0.5, "collab": 0.5}
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.5, 0.5]])
    found = analysis.fusion_shares(weights, names, counts)
    assert found["largest_share"] == {"target": 0.375, "collab": 0.625}


def test_runs_carry_their_analysis():
    adapter, _ = fit(dataclasses.replace(TINY, epochs=1))
    assert set(adapter.analysis["tau"]["after"]) >= {"codes_collab", "vectors_text", "token", "target_table"}
    assert adapter.analysis["tau"]["before"] != adapter.analysis["tau"]["after"]
    assert "by_frequency" in next(row for row in adapter.log if "fusion" in row)["fusion"]
    assert not fit(dataclasses.replace(TINY, epochs=1, analyse=False))[0].analysis
