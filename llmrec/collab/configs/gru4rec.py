"""Settings of GRU4Rec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_negatives
from llmrec.config import Settings


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig(Settings, path="train_collab.gru4rec"):
    """GRU4Rec: a gated recurrent network over item ids (Hidasi et al. 2016)."""

    embed_dim: int = 64
    """Width D of the item vectors."""

    hidden_dim: int = 128
    """Units of the recurrent network."""

    num_layers: int = 1
    """Recurrent layers."""

    dropout_rate: float = 0.3
    """Dropout on the input vectors and between recurrent layers."""

    max_history: int = 50
    """Most recent items the model sees, in items."""

    loss: Literal["ce", "bce", "sampled_ce"] = "ce"
    """ce: softmax over all items; bce: one random negative per position; sampled_ce: softmax over the
    target and num_negatives random items."""

    num_negatives: int = 256
    """Negatives per position for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one("gru4rec", self, "embed_dim hidden_dim num_layers max_history num_negatives")
        check_dropout("gru4rec", self)
        check_negatives("gru4rec", self)
