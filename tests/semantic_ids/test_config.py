"""Settings that are impossible, or that could not take effect, are refused by name."""

import pytest

from llmrec.assignments import describe, override
from llmrec.config import as_dict, from_dict
from llmrec.errors import ConfigError
from llmrec.semantic_ids.config import PRESETS, LearnSemanticIdsConfig, cluster_bounds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 0}, r"num_levels must be at least 1, got 0"),
        ({"num_codes": 1}, r"num_codes must be at least 2, got 1"),
        ({"batch_size": 1}, r"batch_size must be at least 2, got 1"),
        ({"sinkhorn_eps": 1e-4}, r"sinkhorn_eps must be at least 0\.003, got 0\.0001"),
        ({"learning_rate": 0.0}, r"learning_rate must be greater than 0, got 0\.0"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan: expected a \(finite\) number"),
        ({"commitment_weight": -1.0}, r"commitment_weight must be at least 0, got -1\.0"),
        ({"hidden_dims": (64, 0)}, r"hidden_dims must be widths of at least 1, got \(64, 0\)"),
        ({"min_utilisation": 1.5}, r"min_utilisation must lie in \[0, 1\], got 1\.5"),
        ({"modalities": ()}, r"modalities must be different names"),
        ({"modalities": ("text", "text")}, r"modalities must be different names"),
        ({"reconstruction": "mmd", "mse_weight": 2.0}, r"mse_weight has no effect with reconstruction='mmd'"),
        ({"reconstruction": "mse", "mmd_weight": 2.0}, r"mmd_weight has no effect with reconstruction='mse'"),
        ({"reconstruction": "mse", "mmd_estimator": "unbiased"}, r"mmd_estimator has no effect"),
        ({"alignment": "none", "alignment_weight": 0.1}, r"alignment_weight has no effect"),
        ({"alignment": "mmd", "alignment_temperature": 0.2}, r"alignment_temperature has no effect"),
        ({"sinkhorn": "none", "sinkhorn_iterations": 5}, r"sinkhorn_iterations has no effect"),
        ({"init": "random", "kmeans_iterations": 5}, r"kmeans_iterations has no effect with init='random'"),
        ({"init": "random", "kmeans_restarts": 5}, r"kmeans_restarts has no effect with init='random'"),
        ({"kmeans_rows": 100}, r"kmeans_rows must be at least learn_semantic_ids.num_codes \(256\), got 100"),
        ({"codebook_update": "gradient", "ema_decay": 0.9}, r"ema_decay has no effect with codebook_update"),
        ({"codebook_update": "ema", "ema_decay": 1.0}, r"ema_decay must lie between 0 and 1, got 1\.0"),
        ({"collaborative_weight": -0.1}, r"collaborative_weight must be at least 0, got -0\.1"),
        (
            {"collaborative_weight": 0.1, "modalities": ("collab",)},
            r"collaborative_weight ties codes of texts and images .*modalities has neither",
        ),
        ({"diversity_weight": 0.1}, r"diversity_weight moves codes by gradients; set .*gradient, got ema"),
        (
            {"diversity_weight": 0.1, "codebook_update": "gradient", "num_codes": 32},
            r"diversity_clusters must be at most a fourth of learn_semantic_ids\.num_codes \(32\), got 10",
        ),
        (
            {"diversity_weight": 0.1, "codebook_update": "gradient", "num_codes": 7},
            r"num_codes must be at least 8 with diversity_weight, got 7",
        ),
        ({"diversity_clusters": 5}, r"diversity_clusters has no effect with diversity_weight=0"),
        ({"diversity_clusters": 1}, r"diversity_clusters must be at least 2, got 1"),
        ({"method": "rkmeans", "collaborative_weight": 0.1}, r"collaborative_weight has no effect"),
        ({"method": "rkmeans", "epochs": 7}, r"epochs has no effect with method='rkmeans'"),
        ({"method": "rkmeans", "init": "random"}, r"init must be kmeans or kmeans_constrained"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=rf"^learn_semantic_ids\.{message}"):
        LearnSemanticIdsConfig(**changes)


def test_settings_survive_json_and_the_command_line():
    config = override(
        LearnSemanticIdsConfig(),
        {"modalities": "text,image", "hidden_dims": "64,32", "reconstruction": "mse", "epochs": "7"},
    )
    assert (config.modalities, config.hidden_dims, config.epochs) == (("text", "image"), (64, 32), 7)
    assert from_dict(LearnSemanticIdsConfig, as_dict(config)) == config
    with pytest.raises(ConfigError, match="modalities"):
        override(LearnSemanticIdsConfig(), {"modalities": "sound"})


def test_every_setting_says_what_it_means():
    assert all(meaning for _, _, _, meaning in describe(LearnSemanticIdsConfig))


def test_presets_are_complete_and_differ_where_paper_and_code_do():
    assert PRESETS["default"] == LearnSemanticIdsConfig()
    paper, official = PRESETS["paper"], PRESETS["official"]
    assert (paper.alignment, official.alignment) == ("infonce", "mmd")
    assert (paper.rq_reduce, official.rq_reduce) == ("sum", "mean")
    assert paper.reconstruction == official.reconstruction == "mmd"
    assert (paper.include_pad, official.include_pad) == (False, True)
    assert official.commitment == "first" and official.init == "kmeans_constrained"
    assert changed(paper) == PUBLISHED_ALIKE | {"rq_reduce": "sum", "sinkhorn": "none"}
    assert changed(official) == PUBLISHED_ALIKE | {
        **{"alignment": "mmd", "commitment": "first", "commitment_weight": 0.01, "include_pad": True},
        **{"init": "kmeans_constrained", "kmeans_restarts": 10},
    }


def test_the_tokenizer_of_letter_is_that_of_its_code():
    assert changed(PRESETS["letter"]) == {
        **{"modalities": ("text",), "code_dim": 32, "hidden_dims": (2048, 1024, 512, 256, 128, 64)},
        **{"normalise": "none", "alignment": "none", "codebook_update": "gradient", "commitment": "first"},
        **{"collaborative_weight": 0.02, "diversity_weight": 1e-4, "epochs": 10_000, "log_every_epochs": 50},
        **{"init": "kmeans_constrained", "kmeans_restarts": 10, "restart_dead_codes": False},
        **{"min_utilisation": 0.0, "repair_collisions": True},
    }


@pytest.mark.parametrize(
    ("num_codes", "num_clusters", "bounds"),
    [(256, 10, (10, 60)), (32, 8, (2, 32)), (1024, 10, (10, 205)), (8, 2, (2, 8))],
)
def test_bounds_of_clusters_of_codes_leave_room_for_all(num_codes, num_clusters, bounds):
    least, most = cluster_bounds(num_codes, num_clusters)
    assert (least, most) == bounds and least * num_clusters <= num_codes <= most * num_clusters


PUBLISHED_ALIKE = {
    **{"code_dim": 4096, "hidden_dims": (4096, 4096, 4096), "normalise": "none", "reconstruction": "mmd"},
    **{"codebook_update": "gradient", "epochs": 2000, "learning_rate": 2e-4, "log_every_epochs": 50},
    **{"restart_dead_codes": False, "min_utilisation": 0.0},
}
"""What paper and published code have in common and differ from our defaults in."""


def changed(config: LearnSemanticIdsConfig) -> dict[str, object]:
    """Fields that are not the default's."""
    usual = vars(LearnSemanticIdsConfig())
    return {name: value for name, value in vars(config).items() if value != usual[name]}
