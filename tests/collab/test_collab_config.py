"""Settings of train_collab: what is refused, and how."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from llmrec.assignments import describe, override
from llmrec.collab.config import PROVIDER_FIELDS, SASRecConfig, TrainCollabConfig
from llmrec.config import as_dict, from_dict
from llmrec.errors import ConfigError

REFUSED = [
    ({"epochs": "0"}, "train_collab.epochs must be at least 1, got 0"),
    ({"batch_size": "-1"}, "train_collab.batch_size must be at least 1"),
    ({"decay_every_epochs": "0"}, "decay_every_epochs must be none or at least 1"),
    ({"decay_rate": "0.5"}, "decay_rate has no effect without decay_every_epochs"),
    ({"decay_rate": "2", "decay_every_epochs": "5"}, r"decay_rate must lie in \(0, 1\]"),
    ({"provider": "mamba", "mamba.ssm": "false"}, "ssm=false leaves the GRU alone"),
    ({"provider": "diffusion", "diffusion.valid_reverse_steps": "33"}, "valid_reverse_steps must be at most"),
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
    ({"weight_decay": "-1"}, "train_collab.weight_decay must be at least 0"),
    ({"gru4rec.hidden_dim": "32"}, "train_collab.gru4rec has no effect with provider='sasrec'"),
    ({"provider": "gru4rec", "gru4rec.hidden_dim": "0"}, "gru4rec.hidden_dim must be at least 1, got 0"),
    ({"provider": "gru4rec", "gru4rec.num_negatives": "9"}, "num_negatives has no effect with loss='ce'"),
    ({"provider": "bert4rec", "bert4rec.mask_rate": "0"}, r"mask_rate must lie in \(0, 1\], got 0.0"),
    ({"provider": "svae", "svae.kl_cap": "-1"}, "svae.kl_cap must be at least 0"),
    ({"provider": "gmvae", "gmvae.num_heads": "3"}, "divisible by num_heads, got 128 and 3"),
    (
        {"provider": "gmvae", "gmvae.prior": "standard", "gmvae.num_interests": "8"},
        "num_interests has no effect with prior='standard'",
    ),
    ({"provider": "gmvae", "gmvae.prior_scope": "prefix"}, "temporal_from_epoch must be 0 with prior_scope"),
    (
        {"provider": "gmvae", "gmvae.prior": "standard", "gmvae.interest_negatives": "8"},
        "interest_negatives has no effect with prior='standard'",
    ),
    ({"provider": "gmvae", "gmvae.interest_negatives": "0"}, "interest_negatives must be at least 1, got 0"),
    (
        {"provider": "gmvae", "gmvae.num_interests": "1", "gmvae.gumbel_temperature": "2"},
        "gumbel_temperature has no effect with num_interests=1",
    ),
    (
        {"provider": "gmvae", "gmvae.interest_weight": "0", "gmvae.orthogonal_weight": "2"},
        "orthogonal_weight has no effect with interest_weight=0",
    ),
    (
        {"provider": "gmvae", "gmvae.kl_cap": "0", "gmvae.kl_weight": "1"},
        "kl_weight has no effect with kl_cap=0",
    ),
    ({"provider": "svae", "svae.kl_cap": "0", "svae.kl_steps": "9"}, "kl_steps has no effect with kl_cap=0"),
    (
        {"provider": "mamba", "mamba.flip": "none", "mamba.gru": "false", "mamba.mixing": "gated"},
        "mixing has no effect with one path",
    ),
    ({"provider": "bert4rec", "layout": "prefixes"}, "layout must be auto with provider='bert4rec'"),
    ({"provider": "gmvae", "layout": "prefixes"}, "layout must be auto with gmvae.prior='mixture'"),
    ({"provider": "svae", "layout": "prefixes"}, "layout must be auto with svae.kl_scope='user'"),
    (
        {"provider": "svae", "layout": "prefixes", "svae.kl_scope": "target", "svae.num_next": "3"},
        "layout must be auto with svae.num_next=3",
    ),
    ({"provider": "mamba", "mamba.mixing": "none"}, "mixing must not be none while there is more"),
    ({"provider": "mamba", "mamba.flip": "none", "mamba.kept_items": "2"}, "kept_items has no effect"),
    ({"provider": "mamba", "mamba.kept_rate": "1.5"}, "kept_rate must be none or lie between 0 and 1"),
    ({"provider": "mamba", "mamba.kept_rate": "0.5", "mamba.kept_items": "2"}, "no effect with kept_rate"),
    ({"provider": "mamba", "mamba.kept_rate": "0.5", "mamba.flip": "none"}, "kept_rate needs flip"),
    ({"provider": "mamba", "mamba.mixing": "gated", "mamba.variant": "released"}, "set variant=corrected"),
    ({"provider": "mamba", "mamba.mixing_weights": "1,0,1"}, "mixing_weights must be greater than 0"),
    ({"provider": "diffurec", "diffurec.reverse_steps": "33"}, "at most num_steps, got 33 and 32"),
    ({"provider": "diffurec", "diffurec.init_std": "0"}, "init_std must be greater than 0"),
    (
        {"provider": "diffusion", "diffusion.offset": "0", "diffusion.offset_kind": "constant"},
        "offset_kind has no effect with offset=0",
    ),
    (
        {"provider": "diffusion", "diffusion.variant": "released", "diffusion.injection": "add"},
        "injection must be cross_attention with variant='released'",
    ),
    (
        {"provider": "diffusion", "diffusion.cross_heads": "3"},
        "cross_heads must be at least 1 and divide embed_dim, got 3 and 128",
    ),
    (
        {"provider": "diffusion", "diffusion.injection": "add", "diffusion.cross_heads": "8"},
        "cross_heads has no effect with injection='add'",
    ),
    ({"provider": "fuxi", "fuxi.num_heads": "3"}, "fuxi.head_dim must be given where num_heads does not"),
    (
        {"provider": "fuxi", "fuxi.semantic": "false", "fuxi.positional": "false", "fuxi.temporal": "false"},
        "one channel at least",
    ),
    ({"provider": "moe", "moe.num_tables": "3"}, "divisible by num_tables, got 64 and 3"),
    ({"provider": "moe", "moe.top_k": "5"}, "top_k must be at most num_experts, got 5 and 4"),
    ({"provider": "moe", "moe.single_stage": "true"}, "moe_targets must be without ffn"),
    ({"provider": "comirec", "comirec.num_routings": "5"}, "has no effect with routing='attention'"),
    ({"provider": "mind", "mind.num_interests": "0"}, "mind.num_interests must be at least 1"),
    ({"provider": "tiger", "tiger.content": "text,text"}, "tiger.content names a modality twice: text, text"),
    ({"provider": "tiger", "tiger.beams": "0"}, "tiger.beams must be at least 1, got 0"),
    (
        {"provider": "motor", "motor.content": "none", "motor.quantizer": "residual"},
        "quantizer has no effect with content none",
    ),
    ({"provider": "motor", "motor.num_heads": "3"}, "motor.embed_dim must be divisible by num_heads"),
    ({"provider": "svae", "windows": "all"}, "must be auto or last with svae.kl_scope='user'"),
    (
        {"provider": "svae", "windows": "all", "svae.num_next": "2", "svae.kl_scope": "target"},
        "must be auto or last with svae.num_next=2",
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
        {"provider": "moe", "moe.moe_targets": "ffn,uvqk", "moe.num_tables": "4"},
        {"provider": "mamba", "mamba.flip": "none", "mamba.gru": "false", "mamba.mixing": "none"},
        {"provider": "gmvae", "gmvae.prior": "standard"},
        {"layout": "prefixes"},
        {"provider": "gmvae", "gmvae.prior": "standard", "layout": "prefixes"},
        {"provider": "svae", "svae.kl_scope": "target", "layout": "prefixes"},
        {"provider": "fuxi", "fuxi.head_dim": "20"},
    ],
    ids=str,
)
def test_possible_settings_survive_json(settings):
    config = override(TrainCollabConfig(), settings)
    assert from_dict(TrainCollabConfig, as_dict(config)) == config


NOUGHT_IS_FINE = {"gmvae.temporal_from_epoch", "mamba.kept_items"}


def test_numbers_of_things_are_at_least_one_and_dropout_below_it():
    """Of every model, whatever else is needed for the setting to count."""
    needed = {
        "num_negatives": {"loss": "sampled_ce"},
        "content_dim": {"content": "text"},
        "num_routings": {"routing": "capsule"},
    }
    tried = 0
    for provider in PROVIDER_FIELDS:
        of_model = getattr(TrainCollabConfig(), provider)
        for spec in dataclasses.fields(of_model):
            path, of_type = f"{provider}.{spec.name}", str(spec.type).removesuffix(" | None")
            if of_type not in ("int", "float") or path in NOUGHT_IS_FINE:
                continue
            if of_type == "float" and "dropout_rate" not in spec.name:
                continue
            others = needed.get(spec.name, {}) if hasattr(of_model, "loss") else {}
            others = {name: text for name, text in others.items() if hasattr(of_model, name)}
            settings = {f"{provider}.{name}": text for name, text in others.items()}
            for bad in ("0", "-1") if of_type == "int" else ("1", "-0.1"):
                tried += 1
                with pytest.raises(ConfigError, match=f"train_collab.{provider}.{spec.name} must"):
                    override(TrainCollabConfig(), {"provider": provider, **settings, path: bad})
    assert tried > 150


def test_every_setting_says_what_it_means():
    for path, _, _, meaning in describe(TrainCollabConfig):
        assert meaning, path


def test_settings_that_no_provider_shares_are_found_in_the_nested_config():
    assert as_dict(TrainCollabConfig())["sasrec"] == as_dict(SASRecConfig())


def test_settings_of_models_that_are_not_trained_are_not_written_down():
    written = as_dict(TrainCollabConfig(provider="gru4rec"))
    assert "gru4rec" in written and not set(PROVIDER_FIELDS) - {"gru4rec"} & set(written)


def test_reading_the_settings_imports_no_torch():
    code = "import sys, llmrec.collab.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
