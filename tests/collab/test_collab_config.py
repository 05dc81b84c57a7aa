"""Settings of train_collab: what is refused, and how."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.config import as_dict, describe, from_dict, override
from llmrec.errors import ConfigError

REFUSED = [
    ({"epochs": "0"}, "train_collab.epochs must be at least 1, got 0"),
    ({"batch_size": "-1"}, "train_collab.batch_size must be at least 1"),
    ({"patience": "0"}, "train_collab.patience must be at least 1"),
    ({"learning_rate": "0"}, "train_collab.learning_rate must be greater than 0"),
    ({"clip_norm": "-2"}, "train_collab.clip_norm must be greater than 0"),
    ({"seed": "-1"}, "train_collab.seed must be at least 0"),
    ({"epochs": "2", "eval_every_epochs": "3"}, "eval_every_epochs must be at most train_collab.epochs"),
    ({"sasrec.embed_dim": "63"}, "embed_dim must be divisible by num_heads, got 63 and 2"),
    ({"sasrec.dropout_rate": "1"}, r"dropout_rate must lie in \[0, 1\), got 1.0"),
    ({"sasrec.max_history": "0"}, "sasrec.max_history must be at least 1"),
    ({"sasrec.num_negatives": "9"}, "num_negatives has no effect with loss='ce'"),
    ({"sasrec.loss": "bpr"}, "sasrec.loss='bpr'"),
    ({"provider": "sasrek"}, "provider='sasrek'"),
    ({"provider": "precomputed"}, "train_collab.vectors must be a file"),
    ({"vectors": "x.parquet"}, "train_collab.vectors has no effect with provider='sasrec'"),
    (
        {"provider": "precomputed", "vectors": "x.parquet", "sasrec.num_layers": "3"},
        "train_collab.sasrec has no effect with provider='precomputed'",
    ),
    (
        {"provider": "precomputed", "vectors": "x.parquet", "epochs": "7"},
        "train_collab.epochs has no effect with provider='precomputed'",
    ),
    ({"select": "last", "patience": "3"}, "train_collab.patience has no effect with select='last'"),
    ({"select": "last", "eval_every_epochs": "3"}, "eval_every_epochs has no effect with select='last'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda entry: str(entry)[:60])
def test_impossible_and_idle_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        override(TrainCollabConfig(), settings, prefix="train_collab.")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"provider": "precomputed", "vectors": "x.parquet"},
        {"sasrec.loss": "sampled_ce", "sasrec.num_negatives": "9"},
        {"select": "last", "epochs": "3"},
    ],
    ids=str,
)
def test_possible_settings_survive_json(settings):
    config = override(TrainCollabConfig(), settings)
    assert from_dict(TrainCollabConfig, as_dict(config)) == config


def test_every_setting_says_what_it_means():
    for path, _, _, meaning in describe(TrainCollabConfig):
        assert meaning, path


def test_settings_that_no_provider_shares_are_found_in_the_nested_config():
    assert as_dict(TrainCollabConfig())["sasrec"] == as_dict(SASRecConfig())


def test_reading_the_settings_imports_no_torch():
    code = "import sys, llmrec.collab.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
