"""Settings of train_collab."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from llmrec.config import require


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
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

    max_history: int = 50
    """Most recent items the model sees, in items (200 suits MovieLens-1M)."""

    loss: Literal["ce", "bce", "sampled_ce"] = "ce"
    """ce: softmax over all items; bce: one random negative per position, as published; sampled_ce:
    softmax over the target and num_negatives random items."""

    num_negatives: int = 256
    """Negatives per position for loss='sampled_ce', in items, outside the user's training items."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_layers", "num_heads", "inner_dim", "max_history", "num_negatives"):
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
        require(
            self.loss == "sampled_ce" or self.num_negatives == default_of(SASRecConfig, "num_negatives"),
            f"train_collab.sasrec.num_negatives has no effect with loss={self.loss!r}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainCollabConfig:
    """Collaborative item vectors: a sequence model trained on item ids, or vectors from a file."""

    provider: Literal["sasrec", "precomputed"] = "sasrec"
    """Where the vectors come from: the model to train, or the file `vectors`."""

    vectors: str | None = None
    """File of ready-made item vectors (.parquet or .safetensors) for provider='precomputed'."""

    sasrec: SASRecConfig = field(default_factory=SASRecConfig)

    epochs: int = 200
    """Most passes over the training users."""

    batch_size: int = 256
    """Users per optimiser step."""

    learning_rate: float = 1e-3
    """Step size of Adam, constant."""

    clip_norm: float = 5.0
    """Largest norm of the gradient; it is scaled down to this."""

    select: Literal["valid", "last"] = "valid"
    """Weights to keep: of the best validation ndcg@10, or of the last epoch (no validation at all)."""

    eval_every_epochs: int = 1
    """Epochs between rankings of the validation items."""

    patience: int = 10
    """Stop after so many validations in a row without a better ndcg@10."""

    seed: int = 0
    """Seed of initial weights, user order, dropout and negatives."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_every_epochs", "patience"):
            value = getattr(self, name)
            require(value >= 1, f"train_collab.{name} must be at least 1, got {value}")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            require(value > 0, f"train_collab.{name} must be greater than 0, got {value}")
        require(self.seed >= 0, f"train_collab.seed must be at least 0, got {self.seed}")
        require(
            self.eval_every_epochs <= self.epochs or self.select == "last",
            "train_collab.eval_every_epochs must be at most train_collab.epochs with select='valid' (no "
            f"epoch would be ranked), got {self.eval_every_epochs} and {self.epochs}",
        )
        self._refuse_settings_without_effect()

    def source_files(self) -> dict[str, str]:
        """The users' own files that the result depends on, by setting."""
        return {} if self.vectors is None else {"vectors": self.vectors}

    def _refuse_settings_without_effect(self) -> None:
        """A setting that cannot change the result is a mistake of whoever set it."""
        precomputed = self.provider == "precomputed"
        require(
            not precomputed or self.vectors is not None,
            "train_collab.vectors must be a file of item vectors with provider='precomputed', got none",
        )
        idle = [name for name in PROVIDER_FIELDS if name != self.provider]
        reason = f"provider={self.provider!r}"
        if precomputed:
            idle += [name for name in names(self) if name not in ("provider", "vectors", *idle)]
        else:
            idle += ["vectors"]
        refuse_changed(self, idle, reason)
        if self.select == "last":
            refuse_changed(self, ["eval_every_epochs", "patience"], "select='last'")


PROVIDER_FIELDS = ("sasrec",)
"""Fields of TrainCollabConfig that hold one model's settings; named like the provider."""


def names(config: TrainCollabConfig) -> list[str]:
    return [spec.name for spec in fields(config)]


def default_of(cls: type, name: str) -> object:
    spec = cls.__dataclass_fields__[name]
    return spec.default_factory() if callable(spec.default_factory) else spec.default


def refuse_changed(config: TrainCollabConfig, idle: list[str], reason: str) -> None:
    """Raise ConfigError if a setting that has no effect was given a value."""
    for name in idle:
        require(
            getattr(config, name) == default_of(TrainCollabConfig, name),
            f"train_collab.{name} has no effect with {reason}",
        )
