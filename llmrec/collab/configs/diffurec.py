"""Settings of DiffuRec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_heads
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class DiffurecConfig(Settings, path="train_collab.diffurec"):
    """DiffuRec: the next item's vector recovered from noise (Li et al. 2023)."""

    embed_dim: int = 128
    """Width D of the item vectors, which are also what is diffused; even."""

    num_layers: int = 4
    """Transformer blocks."""

    num_heads: int = 4
    """Attention heads; divides embed_dim."""

    dropout_rate: float = 0.1
    """Dropout in the blocks."""

    embed_dropout_rate: float = 0.3
    """Dropout on the history's item vectors."""

    schedule: Literal["trunc_lin", "linear", "cosine", "sqrt"] = "trunc_lin"
    """How noise grows over the steps; see llmrec/collab/noise.py."""

    num_steps: int = 32
    """Diffusion steps T."""

    reverse_steps: int = 32
    """Steps walked back when scoring, the last ones; 1 is a single pass."""

    valid_reverse_steps: int = 1
    """Steps walked back when validation items are ranked to choose the epoch."""

    eval_samples: int = 1
    """Fixed start vectors that scores are averaged over."""

    strength: float = 0.001
    """Mean and standard deviation lambda of the strength with which the noisy target is injected."""

    rounding: Literal["inner", "distance"] = "inner"
    """Items for the recovered vector: by inner product, or by Euclidean distance."""

    init_std: float = 0.1
    """Standard deviation of the initial item vectors (published code: 1, with hundreds of epochs)."""

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    loss: Literal["ce"] = "ce"
    """ce: softmax over all items, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_diffusion("diffurec", self)


def check_diffusion(provider: str, config: Any) -> None:
    """What the settings of both diffusion models must be."""
    names = (
        "embed_dim num_layers num_heads num_steps reverse_steps valid_reverse_steps eval_samples max_history"
    )
    check_at_least_one(provider, config, names)
    check_dropout(provider, config)
    check_heads(provider, config)
    where = f"train_collab.{provider}"
    rate = config.embed_dropout_rate
    require(0 <= rate < 1, f"{where}.embed_dropout_rate must lie in [0, 1), got {rate}")
    require(config.embed_dim % 2 == 0, f"{where}.embed_dim must be even, got {config.embed_dim}")
    for name in ("reverse_steps", "valid_reverse_steps"):
        value = getattr(config, name)
        require(
            value <= config.num_steps,
            f"{where}.{name} must be at most num_steps, got {value} and {config.num_steps}",
        )
    require(
        config.schedule != "trunc_lin" or config.num_steps >= 3,
        f"{where}.num_steps must be at least 3 with schedule='trunc_lin', got {config.num_steps}",
    )
    require(config.strength >= 0, f"{where}.strength must be at least 0, got {config.strength}")
    require(config.init_std > 0, f"{where}.init_std must be greater than 0, got {config.init_std}")
