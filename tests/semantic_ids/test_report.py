"""The page on which semantic IDs are judged: figures by hand, and what it says."""

import dataclasses
import re

import numpy as np
import pytest
from test_learn import SMALL, artefacts, clustered
from test_mm_rqvae import SETTINGS
from worlds import interactions

from llmrec.config import as_dict
from llmrec.errors import ConfigError
from llmrec.semantic_ids import diagnostics
from llmrec.semantic_ids.config import PRESETS, LearnSemanticIdsConfig, ReportSemanticIdsConfig
from llmrec.semantic_ids.diagnostics import (
    Coded,
    Pairs,
    behaviour_target_pairs,
    group_sizes,
    kendall_tau,
    spectrum,
    tau_per_user,
)
from llmrec.semantic_ids.learn import learn_semantic_ids
from llmrec.semantic_ids.mm_rqvae import MMRQVAE
from llmrec.semantic_ids.report import (
    SemanticIdsReport,
    findings,
    report_semantic_ids,
    settings_of,
    training_chart,
)


@pytest.mark.parametrize(("rows", "columns"), [(50, 8), (6, 20)])
def test_the_spectrum_is_that_of_the_singular_value_decomposition(rows, columns):
    table = np.random.default_rng(0).normal(size=(rows, columns)) + 1
    found = spectrum(lambda items: table[items], np.arange(rows))
    values = np.linalg.svd(table, compute_uv=False)
    np.testing.assert_allclose(found["log10_ratio"], np.log10(values / values[0]), atol=1e-6)
    assert found["numerical_rank"] == min(rows, columns)
    assert found["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2)
    assert found["rank_me"] == pytest.approx(exp_of_entropy(values), rel=1e-5)
    assert found["entropy_rank"] == pytest.approx(exp_of_entropy(values**2), rel=1e-5)


def exp_of_entropy(parts):
    shares = parts / parts.sum()
    return np.exp(-(shares * np.log(shares)).sum())


def test_figures_of_a_spectrum_that_is_known(monkeypatch):
    """What is lost in rounding is shown as 1e-16, and what is below a millionth does not count."""
    monkeypatch.setattr(diagnostics, "BLOCK", 16)
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, 7)))[0] for size in (60, 7))
    values = 4 * np.array([1, 0.5, 0.1, 2e-5, 2e-6, 2e-7, 1e-12])
    table = (left * values) @ right.T
    found = spectrum(lambda items: table[items], np.arange(60))
    expected = [0, *np.log10([0.5, 0.1, 2e-5, 2e-6, 2e-7]), -16]
    np.testing.assert_allclose(found["log10_ratio"], expected, atol=0.05)
    assert found["numerical_rank"] == 5
    assert found["entropy_rank"] == pytest.approx(exp_of_entropy(values**2), rel=1e-6)
    assert found["rank_me"] == pytest.approx(exp_of_entropy(values), rel=1e-4)
    assert found["stable_rank"] == pytest.approx(1 + 0.5**2 + 0.1**2, rel=1e-6)


def test_a_projection_of_few_numbers_has_few_directions():
    """MME-SID Eq. 7: a linear map of 5 numbers to 40, plus a constant, spans 6 directions."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 40)) + rng.normal(size=40)
    found = spectrum(lambda items: table[items], np.arange(200))
    assert found["numerical_rank"] == 6 and found["entropy_rank"] < 6
    nothing = spectrum(lambda items: 0 * table[items], np.arange(200))
    ranks = dict.fromkeys(("numerical_rank", "entropy_rank", "rank_me", "stable_rank"), 0)
    assert nothing == {"log10_ratio": [], **ranks}


def test_group_sizes_by_hand():
    codes = np.array([[0, 1], [0, 1], [1, 0], [2, 2], [0, 1], [2, 2], [3, 3]])
    assert group_sizes(codes) == {"1": 2, "2": 1, "3": 1}


def test_test_targets_follow_all_items_before_them():
    data = interactions([[1, 2, 3, 4], [3, 4, 5, 6, 2]], 6)
    history, target, user = behaviour_target_pairs(data, 0, "test")
    assert history.tolist() == [1, 2, 3, 3, 4, 5, 6]
    assert target.tolist() == [4, 4, 4, 2, 2, 2, 2] and user.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_tau_by_user_is_the_mean_of_single_ones():
    rng = np.random.default_rng(0)
    source, codes = rng.normal(size=(2, 31, 4)).astype(np.float32)
    pairs = Pairs(rng.integers(1, 31, 40), rng.integers(1, 31, 40), np.sort(rng.integers(0, 6, 40)))

    class Tables:
        def __call__(self, what, items):
            return codes[items]

    coded = Coded(
        source=source,
        present=np.arange(31) > 0,
        codes=np.zeros((31, 1), np.int64),
        codebooks=np.zeros((1, 1, 4), np.float32),
        rebuilt=Tables(),
    )
    expected = []
    for user in np.unique(pairs.user):
        own = pairs.user == user
        a, b = pairs.history[own], pairs.target[own]
        tau, _ = kendall_tau(
            np.linalg.norm(source[a] - source[b], axis=1), np.linalg.norm(codes[a] - codes[b], axis=1)
        )
        expected.append(tau)
    found = tau_per_user(coded, pairs)
    assert found["latent"] == pytest.approx(np.mean([tau for tau in expected if tau is not None]))


@pytest.fixture(scope="module")
def world():
    data, made = clustered()
    config = dataclasses.replace(SMALL, epochs=20, log_every_epochs=2)
    collab, content = artefacts(data, made)
    return data, collab, content, learn_semantic_ids(config, data, collab, content)


def test_the_page_stands_alone_and_tells_what_the_stage_measured(world, tmp_path):
    ids = world[-1]
    report = report_semantic_ids(ReportSemanticIdsConfig(), *world)
    for name, found in report.metrics["modalities"].items():
        for key in ("levels", "collision_rate", "reconstruction_error", "neighbour_overlap", "num_items"):
            assert found[key] == ids.quality["modalities"][name][key]
        assert found["tau"]["latent"] == ids.quality["modalities"][name]["tau"]["latent"]
    html = report.html
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html) and html.count("<svg") == 3 * 4 + 1
    for title in ("Semantic IDs", "Collab", "Text", "Image", "What items of one first code have in common"):
        assert title in html
    report.save(tmp_path)
    loaded = SemanticIdsReport.load(tmp_path)
    assert loaded.html == html and loaded.metrics == report.metrics


def test_what_is_bad_is_said(world):
    data, collab, content, _ = world
    config = LearnSemanticIdsConfig(
        method="rkmeans", num_levels=1, num_codes=4, modalities=("text",), min_utilisation=0.0
    )
    ids = learn_semantic_ids(config, data, collab, content)
    report = report_semantic_ids(ReportSemanticIdsConfig(samples="test"), data, collab, content, ids)
    assert "240 items share all codes with another one" in report.html
    assert "240 of 240 items share the codes of all modalities" in report.metrics["findings"][-1]
    assert "Largest groups that share all codes" in report.html


def poor(dead_codes: int = 1) -> dict:
    """Figures of codes with which everything is wrong."""
    level = {"utilisation": 0.5, "dead_codes": dead_codes}
    shared = {"collision_rate": 0.5, "items_in_collision": 4}
    found = {"levels": [level], "tau": {"latent": 0.1}, "reconstruction_error": 0.5, **shared}
    return {"modalities": {"text": found}, "joined": {"collision_rate": 0.0}, "num_items": 8}


def test_only_what_is_not_set_already_is_advised():
    told = findings(poor(), as_dict(LearnSemanticIdsConfig()))
    assert told[0] == "text, level 1: 1 code is not used by any item (50.0% are); fewer codes help."
    assert told[1].endswith("(tau 0.10); method=rkmeans may keep more.")
    assert told[2].endswith("more codes, more levels or repair_collisions=true tell them apart.")
    told = findings(poor(), as_dict(LearnSemanticIdsConfig(init="random")))
    assert told[0].endswith("; fewer codes or init=kmeans help.")
    told = findings(poor(2), as_dict(PRESETS["official"]))
    assert "2 codes are" in told[0]
    assert told[0].endswith("; fewer codes, restart_dead_codes=true or codebook_update=ema help.")
    assert told[1].endswith("; reconstruction=mse with codebook_update=ema or method=rkmeans may keep more.")
    told = findings(poor(), as_dict(LearnSemanticIdsConfig(method="rkmeans", repair_collisions=True)))
    assert told[0].endswith("; fewer codes help.") and told[1].endswith("(tau 0.10).")
    assert told[2].endswith("; more codes or more levels tell them apart.")


def test_the_settings_are_those_the_codes_were_learned_with(world):
    ids = world[-1]
    config = dataclasses.replace(SMALL, restart_dead_codes=False)
    stored = dataclasses.replace(ids)
    object.__setattr__(stored, "_manifest", {"config": as_dict(config)})
    assert settings_of(stored) == as_dict(config) and settings_of(ids) == {}


def test_epochs_without_a_batch_of_a_modality_leave_a_gap_in_the_chart():
    def row(epoch: int, **parts: float) -> dict:
        return {"epoch": epoch, "parts": {"collab": {"mse": 1.0 / epoch}, "image": parts}}

    whole = training_chart([row(1, mse=2.0), row(2), row(3, mse=1.0)])
    assert whole.startswith("<svg") and whole.count("image: mse") == 1
    assert training_chart([row(1), row(2, mse=2.0)]).count("image: mse") == 1


def test_every_part_of_the_loss_has_its_line():
    """As many as `MMRQVAE` may have."""
    parts = [*MMRQVAE({"text": 3}, **SETTINGS).weights]
    assert len(parts) == 6
    rows = [{"epoch": epoch, "parts": {"text": dict.fromkeys(parts, epoch)}} for epoch in (1, 2)]
    chart = training_chart(rows)
    assert all(f"text: {part}" in chart for part in parts)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"report_semantic_ids\.num_items must be at least 1, got 0"):
        ReportSemanticIdsConfig(num_items=0)
