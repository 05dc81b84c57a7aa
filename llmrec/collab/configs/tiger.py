"""Settings of TIGER."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec.collab.configs.common import check_at_least_one, check_content, check_dropout
from llmrec.config import Settings, require


@dataclass(frozen=True, kw_only=True)
class TigerConfig(Settings, path="train_collab.tiger"):
    """TIGER: an encoder-decoder writes the next item code by code (Rajput et al. 2023)."""

    content: tuple[Literal["collab", "text", "image"], ...] = ("text",)
    """What an item's codes are made of, one after the other: modalities of encode_items; and collab, the item
    vectors of another model, trained on the same split, in the file train_collab.vectors (TIGER-MM has
    collab,text,image); empty: random codes, the paper's ablation."""

    num_levels: int = 3
    """Codes of a modality."""

    tell_apart: bool = True
    """One code more numbers the items of equal codes; without it these share their places in rankings."""

    num_codes: int = 256
    """Codes to choose from at every place; fewer suit catalogues of some hundred items."""

    embed_dim: int = 128
    """Width D of the code vectors and of the transformer."""

    num_layers: int = 4
    """Blocks of the encoder, and of the decoder."""

    num_heads: int = 6
    """Attention heads."""

    head_dim: int = 64
    """Width of a head."""

    inner_dim: int = 1024
    """Width inside the feed-forward part."""

    dropout_rate: float = 0.1
    """Dropout, wherever T5 has it."""

    max_history: int = 20
    """Most recent items the model sees, in items."""

    beams: int = 50
    """Strings of codes that the search follows when items are ranked. Items of the history that are left out
    of a ranking take some, so more than the length of the list that is looked at."""

    valid_beams: int = 20
    """The same where validation items are ranked to choose the epoch."""

    loss: Literal["ce", "tree_ce"] = "ce"
    """ce: each code among those of all places, as published; tree_ce: among those that go on to an item."""

    temperature: float = 1.0
    """Divides the logits in the loss, not in the search (LETTER: 0.7 to 1); lower values weigh hard negatives
    more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "num_levels num_codes embed_dim num_layers num_heads head_dim inner_dim max_history"
        check_at_least_one("tiger", self, f"{names} beams valid_beams")
        require(
            self.temperature > 0,
            f"train_collab.tiger.temperature must be greater than 0, got {self.temperature}",
        )
        check_dropout("tiger", self)
        check_content("tiger", self)
