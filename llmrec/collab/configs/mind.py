"""Settings of MIND."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_negatives
from llmrec.config import Settings


@dataclass(frozen=True, kw_only=True)
class MindConfig(Settings, path="train_collab.mind"):
    """MIND: several interest vectors per user by dynamic routing with one shared map (Li et al. 2019)."""

    embed_dim: int = 64
    """Width D of the item vectors and interests."""

    num_interests: int = 4
    """Interests K of a user."""

    num_routings: int = 3
    """Iterations of dynamic routing."""

    relu_layer: bool = False
    """A dense layer with ReLU after the routing, as in the paper and in ComiRec's code for one of its two
    data sets: interests are then no longer shorter than 1, and never negative."""

    dropout_rate: float = 0.0
    """Dropout on the history's item vectors (published: none)."""

    max_history: int = 50
    """Most recent items the model sees, in items."""

    loss: Literal["ce", "sampled_ce"] = "ce"
    """ce: softmax over all items; sampled_ce: over the target and num_negatives random items; both for the
    interest that suits the target best."""

    num_negatives: int = 256
    """Negatives per row for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "embed_dim num_interests num_routings max_history num_negatives"
        check_at_least_one("mind", self, names)
        check_dropout("mind", self)
        check_negatives("mind", self)
