"""Settings of Mamba4Rec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_negatives
from llmrec.config import Settings


@dataclass(frozen=True, kw_only=True)
class Mamba4RecConfig(Settings, path="train_collab.mamba4rec"):
    """Mamba4Rec: selective state-space layers over item ids (Liu et al. 2024)."""

    embed_dim: int = 64
    """Width D of the item vectors and of the layers."""

    num_layers: int = 1
    """Mamba layers; one has no residual connection around it, as published."""

    state_dim: int = 32
    """Numbers of state per inner channel."""

    conv_width: int = 4
    """Items that the convolution in front of the scan sees."""

    expand: int = 2
    """Inner channels of a Mamba layer per unit of embed_dim."""

    dropout_rate: float = 0.2
    """Dropout on input vectors, after the scan and in the feed-forward part."""

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    init: Literal["reference", "released"] = "reference"
    """reference: Mamba's own initial step sizes, 0.001 to 0.1; released: N(0, 0.02) and zero biases
    everywhere, as the released code does, which makes the memory short."""

    loss: Literal["ce", "bce", "sampled_ce"] = "ce"
    """ce: softmax over all items, as published; bce: one random negative per position; sampled_ce:
    softmax over the target and num_negatives random items."""

    num_negatives: int = 256
    """Negatives per position for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "embed_dim num_layers state_dim conv_width expand max_history num_negatives"
        check_at_least_one("mamba4rec", self, names)
        check_dropout("mamba4rec", self)
        check_negatives("mamba4rec", self)
