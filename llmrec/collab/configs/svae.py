"""Settings of SVAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_dropout
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class SvaeConfig(Settings, path="train_collab.svae"):
    """SVAE: a recurrent variational autoencoder over item ids (Sachdeva et al. 2019)."""

    embed_dim: int = 256
    """Width of the input item vectors."""

    hidden_dim: int = 200
    """Units of the recurrent network."""

    inner_dim: int = 150
    """Width of the layers around the latent state, and of the output item vectors."""

    latent_dim: int = 64
    """Width of the latent state."""

    num_next: int = 1
    """Next items k that each position predicts (published: 4)."""

    kl_cap: float = 0.2
    """Most of the weight that annealing gives to the divergence from N(0, I)."""

    kl_steps: int = 10_000
    """Optimiser steps in which the annealing weight would rise from 0 to 1."""

    kl_scope: Literal["user", "target"] = "user"
    """What one divergence weighs. user: a user's positions are averaged, while their likelihoods are summed,
    as in the published code; target: every position's counts in full (at weight 1, the evidence bound)."""

    variance: Literal["consistent", "released"] = "consistent"
    """released: the second output is a log standard deviation when sampling and a log variance in the
    divergence; consistent: a log variance in both."""

    vectors: Literal["output", "input"] = "output"
    """Table that is handed on as item vectors: the one scores are made with, or that of the input."""

    dropout_rate: float = 0.0
    """Dropout on the input vectors (published: none)."""

    max_history: int = 50
    """Most recent items the model sees, in items."""

    loss: Literal["ce"] = "ce"
    """ce: softmax over all items, as published; with k targets their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(
            "svae", self, "embed_dim hidden_dim inner_dim latent_dim num_next kl_steps max_history"
        )
        check_dropout("svae", self)
        require(self.kl_cap >= 0, f"train_collab.svae.kl_cap must be at least 0, got {self.kl_cap}")
        if not self.kl_cap:
            self.refuse_changed(["kl_steps"], "kl_cap=0")
