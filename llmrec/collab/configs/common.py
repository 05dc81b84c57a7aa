"""Checks that settings of several models share."""

from __future__ import annotations

from typing import Any

from llmrec.config import require


def check_at_least_one(provider: str, config: Any, names: str) -> None:
    """The named settings are numbers of at least 1."""
    for name in names.split():
        value = getattr(config, name)
        require(value >= 1, f"train_collab.{provider}.{name} must be at least 1, got {value}")


def check_dropout(provider: str, config: Any) -> None:
    rate = config.dropout_rate
    require(0 <= rate < 1, f"train_collab.{provider}.dropout_rate must lie in [0, 1), got {rate}")


def check_heads(provider: str, config: Any) -> None:
    require(
        config.embed_dim % config.num_heads == 0,
        f"train_collab.{provider}.embed_dim must be divisible by num_heads, got "
        f"{config.embed_dim} and {config.num_heads}",
    )


def check_negatives(provider: str, config: Any) -> None:
    """num_negatives is left alone where it cannot take effect."""
    if config.loss != "sampled_ce":
        config.refuse_changed(["num_negatives"], f"loss={config.loss!r}")


def check_content(provider: str, config: Any) -> None:
    """No modality twice."""
    names = config.content
    require(
        len(set(names)) == len(names),
        f"train_collab.{provider}.content names a modality twice: {', '.join(names)}",
    )
