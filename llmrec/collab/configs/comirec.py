"""Settings of ComiRec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_negatives
from llmrec.config import Settings


@dataclass(frozen=True, kw_only=True)
class ComirecConfig(Settings, path="train_collab.comirec"):
    """ComiRec: several interest vectors per user, by attention or by routing (Cen et al. 2020)."""

    embed_dim: int = 64
    """Width D of the item vectors and interests."""

    num_interests: int = 4
    """Interests K of a user."""

    routing: Literal["attention", "capsule"] = "attention"
    """attention: ComiRec-SA; capsule: ComiRec-DR, dynamic routing with a map per place and interest."""

    num_routings: int = 3
    """Iterations of dynamic routing."""

    dropout_rate: float = 0.0
    """Dropout on the history's item vectors (published: none)."""

    max_history: int = 50
    """Most recent items the model sees, in items (published: 20 and 50)."""

    loss: Literal["ce", "sampled_ce"] = "ce"
    """ce: softmax over all items; sampled_ce: over the target and num_negatives random items; both for the
    interest that suits the target best."""

    num_negatives: int = 256
    """Negatives per row for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "embed_dim num_interests num_routings max_history num_negatives"
        check_at_least_one("comirec", self, names)
        check_dropout("comirec", self)
        check_negatives("comirec", self)
        if self.routing != "capsule":
            self.refuse_changed(["num_routings"], f"routing={self.routing!r}")
