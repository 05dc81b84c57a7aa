"""Settings of SASRec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_content, check_negatives
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(Settings, path="train_collab.sasrec"):
    """SASRec: a causal transformer over item ids (Kang and McAuley 2018)."""

    embed_dim: int = 64
    """Width D of the item vectors and of the transformer."""

    num_layers: int = 2
    """Transformer blocks."""

    num_heads: int = 2
    """Attention heads; divides embed_dim."""

    inner_dim: int = 256
    """Width inside the feed-forward part."""

    dropout_rate: float = 0.5
    """Dropout on input vectors, attention weights and both residual branches (0.2 suits dense data)."""

    content: tuple[Literal["text", "image"], ...] = ()
    """Modalities of encode_items that item vectors are also made of, see llmrec/collab/content.py; empty:
    item ids alone, as published."""

    content_dim: int = 128
    """Principal components that are kept of each modality."""

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    loss: Literal["ce", "bce", "sampled_ce"] = "ce"
    """ce: softmax over all items; bce: one random negative per position, as published; sampled_ce:
    softmax over the target and num_negatives random items."""

    num_negatives: int = 256
    """Negatives per position for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("embed_dim", "num_layers", "num_heads", "inner_dim", "max_history", "num_negatives")
        for name in (*positive, "content_dim"):
            value = getattr(self, name)
            require(value >= 1, f"train_collab.sasrec.{name} must be at least 1, got {value}")
        require(
            self.embed_dim % self.num_heads == 0,
            "train_collab.sasrec.embed_dim must be divisible by num_heads, got "
            f"{self.embed_dim} and {self.num_heads}",
        )
        require(
            0 <= self.dropout_rate < 1,
            f"train_collab.sasrec.dropout_rate must lie in [0, 1), got {self.dropout_rate}",
        )
        check_content("sasrec", self)
        if not self.content:
            self.refuse_changed(["content_dim"], "content none")
        check_negatives("sasrec", self)
