"""Settings of Fuxi-MME."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.fuxi import check_fuxi
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class MoeConfig(Settings, path="train_collab.moe"):
    """Fuxi-MME: several small item tables through shared FuXi blocks with experts (Pan et al. 2025)."""

    embed_dim: int = 64
    """Width D of the item vectors: all tables together."""

    num_tables: int = 2
    """Item tables M, each of width embed_dim / num_tables; 1 with one expert is FuXi-alpha."""

    num_experts: int = 4
    """Experts of every replaced part; 1 switches the mixture off."""

    top_k: int = 2
    """Experts that a token goes to."""

    moe_targets: tuple[Literal["ffn", "out", "uvqk"], ...] = ("ffn",)
    """Parts of a block that become mixtures: the gated feed-forward part, the output map, the input map."""

    router_noise: float = 1.0
    """Scale of the trained noise on routing scores while training; 0 routes without."""

    balance: Literal["switch", "cv2", "none"] = "switch"
    """Loss that spreads tokens: share of tokens times mean probability, or the squared coefficient of
    variation of the weights."""

    balance_weight: float = 0.01
    """Weight of the balance loss, per target and mixture."""

    num_layers: int = 2
    """Blocks."""

    num_heads: int = 2
    """Heads of every channel."""

    head_dim: int | None = None
    """Width of a head's queries, keys and values; none: embed_dim / num_tables / num_heads."""

    inner_multiplier: int = 2
    """Width inside the gated feed-forward part, per unit of a block's width."""

    semantic: bool = True
    """Whether the channel that compares items is there."""

    positional: bool = True
    """Whether the channel of distances in places is there."""

    temporal: bool = True
    """Whether the channel of distances in time is there; needs timestamps in seconds to mean something."""

    use_request_time: bool = False
    """Count times from the request (in training and evaluation the time of the item to predict), as released,
    in place of the last item seen. A server knows it; but in data whose times are days, or whose ties are
    listed in an order, it says much about the target: not for comparisons with models that do not read it."""

    single_stage: bool = False
    """Leave out the gated feed-forward part."""

    dropout_rate: float = 0.3
    """Dropout on input vectors, before the output map and in the feed-forward part."""

    temperature: float = 0.05
    """Cosines are divided by it before the softmax."""

    max_history: int = 50
    """Most recent items the model sees, in items; the content channel is divided by it."""

    loss: Literal["ce", "sampled_ce"] = "ce"
    """ce: softmax over all items; sampled_ce: over the target and num_negatives random items."""

    num_negatives: int = 128
    """Negatives per row for loss='sampled_ce', in items, outside the row's items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_tables", "num_experts", "top_k"):
            value = getattr(self, name)
            require(value >= 1, f"train_collab.moe.{name} must be at least 1, got {value}")
        require(
            self.embed_dim % self.num_tables == 0,
            "train_collab.moe.embed_dim must be divisible by num_tables, got "
            f"{self.embed_dim} and {self.num_tables}",
        )
        check_fuxi("moe", self, self.embed_dim // self.num_tables)
        if self.num_experts > 1:
            require(
                self.top_k <= self.num_experts,
                "train_collab.moe.top_k must be at most num_experts, got "
                f"{self.top_k} and {self.num_experts}",
            )
            require(bool(self.moe_targets), "train_collab.moe.moe_targets must name a part, got none")
        else:
            idle = ["top_k", "moe_targets", "router_noise", "balance", "balance_weight"]
            self.refuse_changed(idle, "num_experts=1")
        if self.balance == "none":
            self.refuse_changed(["balance_weight"], "balance='none'")
        require(
            len(set(self.moe_targets)) == len(self.moe_targets),
            f"train_collab.moe.moe_targets must be different, got {','.join(self.moe_targets)}",
        )
        require(
            not (self.single_stage and "ffn" in self.moe_targets and self.num_experts > 1),
            "train_collab.moe.moe_targets must be without ffn with single_stage=true, which has no such part",
        )
        for name in ("router_noise", "balance_weight"):
            value = getattr(self, name)
            require(value >= 0, f"train_collab.moe.{name} must be at least 0, got {value}")
