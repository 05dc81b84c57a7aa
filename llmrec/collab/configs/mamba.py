"""Settings of SIGMA-Mamba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_negatives
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class MambaConfig(Settings, path="train_collab.mamba"):
    """SIGMA: selective gated Mamba, which reads a history in two directions (Liu et al. 2024)."""

    embed_dim: int = 64
    """Width D of the item vectors and of the layers."""

    num_layers: int = 1
    """G-Mamba layers; one has no residual connection around it, as published."""

    state_dim: int = 32
    """Numbers of state per inner channel."""

    conv_width: int = 4
    """Items that the convolution in front of the scan sees."""

    expand: int = 2
    """Inner channels of a Mamba layer per unit of embed_dim."""

    ssm: bool = True
    """Keep Mamba; off leaves the GRU's path alone (with flip=none and gate=false)."""

    flip: Literal["partial", "none"] = "partial"
    """partial: a second direction reads the history with all but its last kept_items items reversed;
    none: one direction only."""

    kept_items: int = 5
    """Most recent items that the second direction reads in their own order (0 flips everything)."""

    kept_rate: float | None = None
    """In place of kept_items: share of a history that stays in order, so that r grows with its length (at
    least 1 item; the seed's question whether one r suits all)."""

    gate: bool = True
    """Whether the dense selective gate weighs the directions."""

    gru: bool = True
    """Whether the GRU path for short histories (FE-GRU) is there."""

    mixing: Literal["trainable", "fixed", "gated", "attention", "none"] = "trainable"
    """How the paths are added: with trained weights (published), with mixing_weights as they are, with those
    that a linear map makes of each position's input, with those of that input's attention to what the paths
    say (both ours), or not at all, which needs flip='none' and gru=false."""

    mixing_weights: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Weights of the forward, the flipped and the GRU path at the start, or for good with mixing='fixed';
    corrected normalises the weights of the paths that are there to sum 1."""

    dropout_rate: float = 0.2
    """Dropout on input vectors, gates, mixed paths and in the feed-forward part."""

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    variant: Literal["corrected", "released"] = "corrected"
    """corrected: flips by the length of the history, both gates alike, causal convolution, Mamba's own
    initial step sizes, normalised mixing weights; released: as the published code computes, with row 0 in the
    softmax."""

    loss: Literal["ce", "bce", "sampled_ce"] = "ce"
    """ce: softmax over all items, as published; bce: one random negative per position; sampled_ce:
    softmax over the target and num_negatives random items."""

    num_negatives: int = 256
    """Negatives per position for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "embed_dim num_layers state_dim conv_width expand max_history num_negatives"
        check_at_least_one("mamba", self, names)
        check_dropout("mamba", self)
        check_negatives("mamba", self)
        require(
            self.kept_items >= 0, f"train_collab.mamba.kept_items must be at least 0, got {self.kept_items}"
        )
        require(
            self.ssm or (self.gru and self.flip == "none" and not self.gate),
            "train_collab.mamba.ssm=false leaves the GRU alone; set gru=true, flip=none and gate=false",
        )
        single = (self.flip == "none" and not self.gru) or not self.ssm
        require(
            self.mixing != "none" or single,
            "train_collab.mamba.mixing must not be none while there is more than one path, got "
            f"none with flip={self.flip!r} and gru={self.gru}",
        )
        require(
            self.kept_rate is None or 0 < self.kept_rate < 1,
            f"train_collab.mamba.kept_rate must be none or lie between 0 and 1, got {self.kept_rate}",
        )
        require(
            self.kept_rate is None or (self.flip == "partial" and self.variant == "corrected"),
            "train_collab.mamba.kept_rate needs flip='partial' and variant='corrected'",
        )
        require(
            self.mixing not in ("gated", "attention") or self.variant == "corrected",
            f"train_collab.mamba.mixing={self.mixing!r} is not of the released code; set variant=corrected",
        )
        require(
            min(self.mixing_weights) > 0,
            f"train_collab.mamba.mixing_weights must be greater than 0, got {self.mixing_weights}",
        )
        if not self.ssm:
            self.refuse_changed(["state_dim", "conv_width", "expand"], "ssm=false")
        if self.flip == "none":
            self.refuse_changed(["kept_items"], "flip='none'")
        if self.kept_rate is not None:
            self.refuse_changed(["kept_items"], "kept_rate")
        if self.mixing == "none":
            self.refuse_changed(["mixing_weights"], "mixing='none'")
        elif single and self.variant == "corrected":
            self.refuse_changed(["mixing", "mixing_weights"], "one path, whose weight is 1")
