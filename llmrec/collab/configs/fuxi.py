"""Settings of FuXi-alpha."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_negatives
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class FuxiConfig(Settings, path="train_collab.fuxi"):
    """FuXi-alpha: attention by content, place and time in separate channels (Ye et al. 2025)."""

    embed_dim: int = 64
    """Width D of the item vectors and of the blocks."""

    num_layers: int = 2
    """Blocks."""

    num_heads: int = 2
    """Heads of every channel."""

    head_dim: int | None = None
    """Width of a head's queries, keys and values; none: embed_dim / num_heads."""

    inner_multiplier: int = 2
    """Width inside the gated feed-forward part, per unit of embed_dim."""

    semantic: bool = True
    """Whether the channel that compares items is there."""

    positional: bool = True
    """Whether the channel of distances in places is there."""

    temporal: bool = True
    """Whether the channel of distances in time is there; needs timestamps in seconds to mean something."""

    use_request_time: bool = False
    """Count times from the request (in training and evaluation the time of the item to predict), as released,
    in place of the last item seen. A server knows it; but in data whose times are days, or whose ties are
    listed in an order, it says much about the target: not for comparisons with models that do not read it."""

    single_stage: bool = False
    """Leave out the gated feed-forward part."""

    dropout_rate: float = 0.3
    """Dropout on input vectors, before the output map and in the feed-forward part."""

    temperature: float = 0.05
    """Cosines are divided by it before the softmax."""

    max_history: int = 50
    """Most recent items the model sees, in items; the content channel is divided by it."""

    loss: Literal["ce", "sampled_ce"] = "ce"
    """ce: softmax over all items; sampled_ce: over the target and num_negatives random items, as published
    with 128 (there drawn for every position)."""

    num_negatives: int = 128
    """Negatives per row for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fuxi("fuxi", self, self.embed_dim)


def check_fuxi(provider: str, config: Any, width: int) -> None:
    """What the settings of blocks of the given width must be."""
    names = "embed_dim num_layers num_heads inner_multiplier max_history num_negatives"
    check_at_least_one(provider, config, names)
    check_dropout(provider, config)
    check_negatives(provider, config)
    where = f"train_collab.{provider}"
    require(config.temperature > 0, f"{where}.temperature must be greater than 0, got {config.temperature}")
    require(
        config.head_dim is not None or width % config.num_heads == 0,
        f"{where}.head_dim must be given where num_heads does not divide {width}, the width of a block, "
        f"got num_heads={config.num_heads}",
    )
    require(
        config.head_dim is None or config.head_dim >= 1,
        f"{where}.head_dim must be at least 1, got {config.head_dim}",
    )
    require(
        config.semantic or config.positional or config.temporal,
        f"{where}.semantic, positional or temporal must be true: one channel at least is needed",
    )
    if not config.temporal:
        config.refuse_changed(["use_request_time"], "temporal=false")
    if config.single_stage:
        config.refuse_changed(["inner_multiplier"], "single_stage=true")
