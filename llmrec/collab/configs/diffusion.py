"""Settings of DiffuRecSys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.diffurec import check_diffusion
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Settings, path="train_collab.diffusion"):
    """DiffuRecSys: DiffuRec with offset noise and cross-attention (Zolghadr et al. 2024)."""

    embed_dim: int = 128
    """Width D of the item vectors, which are also what is diffused; even."""

    num_layers: int = 4
    """Transformer blocks."""

    num_heads: int = 4
    """Attention heads; divides embed_dim."""

    cross_heads: int | None = None
    """Heads of the cross-attention alone; divides embed_dim; none: num_heads."""

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
    """Steps walked back when validation items are ranked to choose the epoch. With cross-attention a single
    one asks the history with pure noise; see the head of llmrec/collab/diffusion.py for what that costs."""

    eval_samples: int = 1
    """Fixed start vectors that scores are averaged over."""

    offset: float = 0.1
    """Strength delta_c of offset noise; 0 is plain noise."""

    offset_kind: Literal["row", "element", "constant"] = "row"
    """What the offset multiplies: one random number a row, one per dimension, or 1."""

    injection: Literal["cross_attention", "add"] = "cross_attention"
    """How the noisy target reaches the history: it attends over it, or is added to it as in DiffuRec."""

    strength: float = 0.001
    """Mean and standard deviation lambda of the strength with which the noisy target is injected, for
    injection='add' and variant='released'."""

    rounding: Literal["inner", "distance"] = "inner"
    """Items for the recovered vector: by inner product, or by Euclidean distance."""

    init_std: float = 0.1
    """Standard deviation of the initial item vectors (published code: 1, with hundreds of epochs)."""

    variant: Literal["corrected", "released"] = "corrected"
    """corrected: blocks follow each other, attention over places, padding hidden; released: the published
    code's blocks, of which only the last counts, and row 0 in the softmax (that code has offset=0 and
    init_std=1). Scores of both take the mean strength and noise drawn once."""

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    loss: Literal["ce"] = "ce"
    """ce: softmax over all items, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_diffusion("diffusion", self)
        heads = self.cross_heads
        require(
            heads is None or (heads >= 1 and self.embed_dim % heads == 0),
            "train_collab.diffusion.cross_heads must be at least 1 and divide embed_dim, got "
            f"{heads} and {self.embed_dim}",
        )
        if self.injection == "add":
            self.refuse_changed(["cross_heads"], "injection='add'")
        require(self.offset >= 0, f"train_collab.diffusion.offset must be at least 0, got {self.offset}")
        if not self.offset:
            self.refuse_changed(["offset_kind"], "offset=0")
        if self.variant == "corrected" and self.injection == "cross_attention":
            self.refuse_changed(["strength"], "injection='cross_attention', whose queries are normalised")
        require(
            self.variant == "corrected" or self.injection == "cross_attention",
            "train_collab.diffusion.injection must be cross_attention with variant='released', got "
            f"{self.injection}",
        )
