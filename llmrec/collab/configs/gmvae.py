"""Settings of SIGMA-GMVAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout, check_heads, check_negatives
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class GmvaeConfig(Settings, path="train_collab.gmvae"):
    """SIGMA: a sequence VAE whose prior is a mixture of a user's interests (Li et al. 2025)."""

    embed_dim: int = 128
    """Width D of the item vectors and of every latent variable."""

    num_interests: int = 4
    """Interests K: hyper-categories of items and components of the prior (the paper: 4 for Amazon, 8 for
    MovieLens)."""

    num_heads: int = 4
    """Attention heads of the three transformer layers; divides embed_dim."""

    dropout_rate: float = 0.3
    """Dropout on input vectors and in every layer."""

    attention_dropout_rate: float = 0.0
    """Dropout on attention weights (released: 0 for Beauty, 0.3 for Office, Tools and Toys)."""

    prior: Literal["mixture", "standard"] = "mixture"
    """mixture: of the extracted interests; standard: N(0, I), without any interests."""

    prior_scope: Literal["sequence", "prefix"] = "sequence"
    """Items that the prior at a position is made of: the whole training row, or those up to the position."""

    kl: Literal["lse", "convex", "monte_carlo"] = "lse"
    """How the divergence from the mixture is estimated: -log sum alpha exp(-KL), a bound; sum alpha KL, a
    looser bound; or one sample."""

    kl_weight: float = 1e-4
    """Lambda, weight of the divergence from the prior; annealing multiplies it, by kl_cap in the end."""

    kl_cap: float = 0.2
    """Most of the weight that annealing gives to divergences."""

    kl_steps: int = 10_000
    """Optimiser steps in which the annealing weight would rise from 0 to 1."""

    interest_weight: float = 1e-3
    """Weight of the interest loss; times 200 in the first epoch, 199 in the second and so on down to 1, as
    released."""

    interest_negatives: int = 256
    """Random items that a row's interests tell its last target from, drawn once for all rows of a forward
    pass (published: one for each row of a batch of 256, shared by all)."""

    orthogonal_weight: float = 1.0
    """Weight of the term that keeps hyper-categories apart, inside the interest loss; 0 switches it off."""

    assignment_temperature: float = 0.1
    """Cosines of items and hyper-categories are divided by it."""

    gumbel_temperature: float = 1.0
    """Temperature of the random soft assignment while training."""

    temporal_from_epoch: int = 32
    """First epoch, from 1, in which hard interests, read in order by a GRU, are half of every interest; 0:
    never. Give patience enough to get there. (Released: those after the 31st.)"""

    eval_add_std: bool = False
    """Score with the mean plus one standard deviation, as the released code does."""

    max_history: int = 50
    """Most recent items the model sees, in items."""

    loss: Literal["ce", "bce", "sampled_ce"] = "ce"
    """Reconstruction. ce: softmax over all items; bce: one random negative per position, as published;
    sampled_ce: softmax over the target and num_negatives random items."""

    num_negatives: int = 256
    """Negatives per position for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "embed_dim num_interests num_heads kl_steps interest_negatives max_history num_negatives"
        check_at_least_one("gmvae", self, counts)
        check_dropout("gmvae", self)
        check_heads("gmvae", self)
        check_negatives("gmvae", self)
        rate = self.attention_dropout_rate
        require(0 <= rate < 1, f"train_collab.gmvae.attention_dropout_rate must lie in [0, 1), got {rate}")
        for name in ("kl_weight", "kl_cap", "interest_weight", "orthogonal_weight", "temporal_from_epoch"):
            value = getattr(self, name)
            require(value >= 0, f"train_collab.gmvae.{name} must be at least 0, got {value}")
        for name in ("assignment_temperature", "gumbel_temperature"):
            value = getattr(self, name)
            require(value > 0, f"train_collab.gmvae.{name} must be greater than 0, got {value}")
        if self.prior == "standard":
            idle = [*("num_interests", "prior_scope", "kl", "interest_weight", "orthogonal_weight")]
            idle += ["assignment_temperature", "gumbel_temperature", "temporal_from_epoch"]
            self.refuse_changed([*idle, "interest_negatives"], "prior='standard'")
        if self.num_interests == 1:  # every item belongs to it
            alone = ["orthogonal_weight", "assignment_temperature", "gumbel_temperature"]
            self.refuse_changed(alone, "num_interests=1")
        if not self.interest_weight:
            self.refuse_changed(["orthogonal_weight"], "interest_weight=0")
        if not self.kl_cap:
            self.refuse_changed(["kl_weight", "kl_steps"], "kl_cap=0")
        require(
            self.prior_scope == "sequence" or self.temporal_from_epoch == 0,
            "train_collab.gmvae.temporal_from_epoch must be 0 with prior_scope='prefix' (hard interests read "
            f"a whole row), got {self.temporal_from_epoch}",
        )
