"""Every provider with small settings, for the contract tests: one case per loss and variant worth it; and
batches to try models on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llmrec.collab.config import TrainCollabConfig
from llmrec.data.batches import Batch


def batch(*sequences: list[int]) -> Batch:
    """Train sequences padded with 0, every next item a target."""
    item = torch.tensor(sequences)
    shown = torch.where(item[:, 1:] != 0, item[:, :-1], 0)
    time = torch.zeros_like(shown)
    return Batch(item=shown, target=item[:, 1:], time=time, next_time=time)


@dataclass(frozen=True)
class Case:
    """A provider as the contract tests train it."""

    provider: str
    settings: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    by_design: dict[str, str] = field(default_factory=dict)
    """Contract tests that it must fail, by the test's name, and why."""
    cycle: dict[str, Any] = field(default_factory=dict)
    """Of the trainer, where it must learn a cycle by heart."""
    start: int = 0
    """Seed of fresh weights from which no choice is between equals, which rounding would decide."""

    def config(self, **trainer: Any) -> TrainCollabConfig:
        """Small enough for a second; keyword arguments replace the trainer's settings."""
        defaults = getattr(TrainCollabConfig(), self.provider)
        trainer = {"epochs": 15, "batch_size": 16, "learning_rate": 1e-2} | self.trainer | trainer
        if trainer.get("select") == "last":
            trainer.pop("patience", None)  # it would have no effect
        model = {self.provider: replace(defaults, **self.settings)}
        return TrainCollabConfig(provider=self.provider, **model, **trainer)


SASREC = {"embed_dim": 16, "inner_dim": 32, "max_history": 12, "dropout_rate": 0.1}
GRU = {"embed_dim": 16, "hidden_dim": 24, "max_history": 12, "dropout_rate": 0.1}
GMVAE = {"embed_dim": 16, "num_interests": 2, "max_history": 12, "dropout_rate": 0.1}
SVAE = {"embed_dim": 16, "hidden_dim": 24, "inner_dim": 16, "latent_dim": 8, "max_history": 12}
DIFFUSION = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "max_history": 12, "num_steps": 8}
DIFFUSION |= {"reverse_steps": 8}
NOISY = {"test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone": "the target is noisy in training"}
INTERESTS = {"embed_dim": 32, "num_interests": 2, "max_history": 12}
LONG = {"epochs": 120, "patience": 40}
HARD = {"test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone": "trained by the target's interest"}
FUXI = {"embed_dim": 16, "num_layers": 1, "max_history": 12, "dropout_rate": 0.1}
TIGER = {"content": (), "num_levels": 2, "num_codes": 5, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
TIGER |= {"head_dim": 8, "inner_dim": 32, "max_history": 12, "dropout_rate": 0.0}
MOTOR = SASREC | {"content": (), "num_codes": 16}
MAMBA = {"embed_dim": 16, "state_dim": 4, "max_history": 12, "dropout_rate": 0.1}

CASES: dict[str, Case] = {
    "sasrec-ce": Case("sasrec", SASREC),
    "sasrec-bce": Case("sasrec", SASREC | {"loss": "bce"}),
    "sasrec-sampled_ce": Case("sasrec", SASREC | {"loss": "sampled_ce", "num_negatives": 16}),
    "gmvae-ce": Case("gmvae", GMVAE | {"temporal_from_epoch": 3}, {"epochs": 40}),
    "gmvae-bce": Case(
        "gmvae",
        GMVAE | {"loss": "bce", "kl": "convex", "temporal_from_epoch": 3},
        {"epochs": 40, "learning_rate": 5e-3, "patience": 20},
        cycle={"epochs": 100, "learning_rate": 1e-2},
    ),
    "gmvae-sampled_ce": Case(
        "gmvae",
        GMVAE | {"loss": "sampled_ce", "num_negatives": 16},
        {"epochs": 40, "patience": 20},
        cycle={"epochs": 120, "patience": 40, "select": "valid"},
    ),
    "gmvae-prefix": Case(
        "gmvae",
        GMVAE | {"prior_scope": "prefix", "temporal_from_epoch": 0, "kl": "monte_carlo"},
        {"epochs": 40},
    ),
    "gmvae-standard": Case("gmvae", {"embed_dim": 16, "max_history": 12, "prior": "standard"}),
    "svae-ce": Case("svae", SVAE, {"epochs": 40}),
    "svae-next-3": Case(
        "svae",
        SVAE | {"num_next": 3, "variance": "released", "vectors": "input"},
        {"epochs": 40},
        {
            "test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone": "it names three next items",
            "test_it_learns_a_cycle_by_heart": "it names three next items, none of them first",
        },
    ),
    "bert4rec-ce": Case(
        "bert4rec",
        SASREC | {"num_masks": 4, "last_rate": 0.3},
        {"epochs": 30},
        {
            "test_later_items_never_change_what_is_predicted_before_them": "it reads in both directions",
            "test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone": "it fills in masked items",
        },
        cycle={"epochs": 100},
    ),
    "comirec-ce": Case(
        "comirec",
        INTERESTS,
        LONG,
        HARD,
        cycle={"epochs": 150, "learning_rate": 3e-2, "batch_size": 8},
    ),
    "comirec-capsule": Case("comirec", INTERESTS | {"routing": "capsule"}, LONG, HARD),
    "comirec-sampled_ce": Case(
        "comirec",
        INTERESTS | {"loss": "sampled_ce", "num_negatives": 16},
        LONG,
        cycle={"epochs": 300},
    ),
    "mind-ce": Case("mind", INTERESTS, LONG, HARD, cycle={"epochs": 150}),
    "mind-relu": Case(
        "mind",
        INTERESTS | {"relu_layer": True},
        LONG,
        HARD,
        cycle={"epochs": 150, "learning_rate": 2e-2},
        start=1,
    ),
    "mind-sampled_ce": Case("mind", INTERESTS | {"loss": "sampled_ce", "num_negatives": 16}, LONG),
    "diffurec-ce": Case("diffurec", DIFFUSION, {"epochs": 30}),
    "diffurec-distance": Case(
        "diffurec", DIFFUSION | {"rounding": "distance", "reverse_steps": 1}, {"epochs": 30}, NOISY
    ),
    "diffusion-ce": Case("diffusion", DIFFUSION, {"epochs": 30}, NOISY),
    "diffusion-added": Case(
        "diffusion", DIFFUSION | {"injection": "add", "eval_samples": 2}, {"epochs": 30}, NOISY
    ),
    "diffusion-released": Case(
        "diffusion",
        DIFFUSION | {"variant": "released"},
        {"epochs": 30},
        {
            "test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone": "row 0 is in its softmax",
        },
    ),
    "gru4rec-ce": Case("gru4rec", GRU),
    "gru4rec-bce": Case("gru4rec", GRU | {"loss": "bce"}, cycle={"learning_rate": 2e-2}),
    "gru4rec-sampled_ce": Case(
        "gru4rec",
        GRU | {"loss": "sampled_ce", "num_negatives": 16},
        cycle={"epochs": 120, "learning_rate": 2e-2},
    ),
    "mamba4rec-ce": Case("mamba4rec", MAMBA),
    "mamba4rec-bce": Case("mamba4rec", MAMBA | {"loss": "bce"}),
    "mamba4rec-sampled_ce": Case("mamba4rec", MAMBA | {"loss": "sampled_ce", "num_negatives": 16}),
    "mamba4rec-released-2": Case("mamba4rec", MAMBA | {"init": "released", "num_layers": 2}),
    "mamba-ce": Case("mamba", MAMBA | {"kept_items": 2}),
    "mamba-bce": Case("mamba", MAMBA | {"loss": "bce"}),
    "mamba-sampled_ce": Case("mamba", MAMBA | {"loss": "sampled_ce", "num_negatives": 16}),
    "mamba-2-layers": Case("mamba", MAMBA | {"num_layers": 2, "gate": False}, cycle={"epochs": 30}),
    "mamba-adaptive": Case("mamba", MAMBA | {"kept_rate": 0.5, "mixing": "gated"}),
    "mamba-attention": Case("mamba", MAMBA | {"kept_items": 2, "mixing": "attention"}),
    "mamba-one-direction": Case("mamba", MAMBA | {"flip": "none"}),
    "mamba-gru-alone": Case("mamba", MAMBA | {"flip": "none", "gate": False, "ssm": False, "state_dim": 32}),
    "fuxi-ce": Case("fuxi", FUXI),
    "fuxi-sampled_ce": Case(
        "fuxi", FUXI | {"loss": "sampled_ce", "num_negatives": 16}, cycle={"learning_rate": 2e-2}
    ),
    "fuxi-request": Case("fuxi", FUXI | {"use_request_time": True}),
    "fuxi-one-channel": Case("fuxi", FUXI | {"semantic": False, "temporal": False, "single_stage": True}),
    "moe-ce": Case("moe", FUXI | {"embed_dim": 32}, {"epochs": 40}),
    "moe-sampled_ce": Case(
        "moe", FUXI | {"loss": "sampled_ce", "num_negatives": 16}, cycle={"learning_rate": 2e-2}
    ),
    "moe-request": Case("moe", FUXI | {"embed_dim": 32, "use_request_time": True}, {"epochs": 40}),
    "moe-everywhere": Case(
        "moe",
        FUXI | {"embed_dim": 32, "moe_targets": ("ffn", "out", "uvqk"), "balance": "cv2"},
        {"epochs": 40},
    ),
    "mamba-released": Case(
        "mamba",
        MAMBA | {"variant": "released"},
        {},
        {
            "test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone": "row 0 is in its softmax",
        },
        cycle={"epochs": 40},
    ),
    "tiger-ce": Case(
        "tiger",
        TIGER,
        {"epochs": 30, "patience": 30},
        {"test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone": "strings of no item count"},
        cycle={"epochs": 80, "decay_every_epochs": 50},
    ),
    "tiger-tree_ce": Case(
        "tiger",
        TIGER | {"loss": "tree_ce"},
        {"epochs": 30, "patience": 30},
        cycle={"epochs": 80, "decay_every_epochs": 50, "learning_rate": 5e-3},
    ),
    "motor-ce": Case("motor", MOTOR),
    "motor-bce": Case("motor", MOTOR | {"loss": "bce"}),
    "motor-sampled_ce": Case("motor", MOTOR | {"loss": "sampled_ce", "num_negatives": 16}),
}
"""By name; every provider and every loss it offers is here. embed_dim 16 and max_history 12 where a
model has these."""
