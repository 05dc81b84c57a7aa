"""Settings of BERT4Rec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_heads
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class Bert4RecConfig(Settings, path="train_collab.bert4rec"):
    """BERT4Rec: a bidirectional transformer that fills in masked items (Sun et al. 2019)."""

    embed_dim: int = 64
    """Width D of the item vectors and of the transformer."""

    num_layers: int = 2
    """Transformer blocks."""

    num_heads: int = 2
    """Attention heads; divides embed_dim."""

    inner_dim: int = 256
    """Width inside the feed-forward part."""

    dropout_rate: float = 0.2
    """Dropout on input vectors, attention weights and both residual branches."""

    mask_rate: float = 0.2
    """Share of a sequence's items that is masked, at least one (published for Beauty: 0.6)."""

    last_rate: float = 0.1
    """Share of sequences in which only the last item is masked, as it is when scoring."""

    num_masks: int = 1
    """Times that every sequence enters a step, each time masked anew."""

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    loss: Literal["ce"] = "ce"
    """ce: softmax over all items, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "embed_dim num_layers num_heads inner_dim num_masks max_history"
        check_at_least_one("bert4rec", self, names)
        check_dropout("bert4rec", self)
        check_heads("bert4rec", self)
        rate = self.mask_rate
        require(0 < rate <= 1, f"train_collab.bert4rec.mask_rate must lie in (0, 1], got {rate}")
        rate = self.last_rate
        require(0 <= rate <= 1, f"train_collab.bert4rec.last_rate must lie in [0, 1], got {rate}")
