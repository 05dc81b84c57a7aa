"""Settings of MOTOR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import (
    check_at_least_one,
    check_content,
    check_dropout,
    check_heads,
    check_negatives,
)
from llmrec.config import Settings


@dataclass(frozen=True, kw_only=True)
class MotorConfig(Settings, path="train_collab.motor"):
    """MOTOR: item vectors made of crossed code vectors in place of a table, in SASRec (Zhang et al. 2024)."""

    content: tuple[Literal["text", "image"], ...] = ("text",)
    """Modalities of encode_items that an item's codes are made of (published: both); empty: random codes."""

    quantizer: Literal["product", "residual"] = "product"
    """product: each code of a modality stands for a piece of its vector, as published; residual: for what the
    codes before left over (semantic IDs)."""

    num_levels: int = 4
    """Codes of a modality."""

    num_codes: int = 256
    """Codes to choose from at every place; fewer suit catalogues of some hundred items."""

    num_crosses: int = 2
    """Layers in which an item's code vectors are multiplied with each other, before a linear map."""

    embed_dim: int = 64
    """Width D of the code vectors, of the item vectors and of the transformer."""

    num_layers: int = 2
    """Transformer blocks."""

    num_heads: int = 2
    """Attention heads; divides embed_dim."""

    inner_dim: int = 256
    """Width inside the feed-forward part."""

    dropout_rate: float = 0.5
    """Dropout on input vectors, attention weights and both residual branches (0.2 suits dense data)."""

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    loss: Literal["ce", "bce", "sampled_ce"] = "ce"
    """ce: softmax over all items; bce: one random negative per position, as SASRec was published; sampled_ce:
    softmax over the target and num_negatives random items."""

    num_negatives: int = 256
    """Negatives per position for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "num_levels num_codes num_crosses embed_dim num_layers num_heads inner_dim max_history"
        check_at_least_one("motor", self, f"{names} num_negatives")
        check_dropout("motor", self)
        check_heads("motor", self)
        check_negatives("motor", self)
        check_content("motor", self)
        if not self.content:
            self.refuse_changed(["quantizer"], "content none")
