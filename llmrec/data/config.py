"""Settings of prepare_data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec.config import require


@dataclass(frozen=True, kw_only=True)
class SampleMarketConfig:
    """The built-in world whose true next-item probabilities are known."""

    num_users: int = 2000
    """Users drawn."""

    num_items: int = 600
    """Items, spread evenly over the interests."""

    num_interests: int = 24
    """Kinds of things (a noun each); at most 24."""

    mean_length: float = 14.0
    """Mean interactions per user; lengths lie in 5..24."""

    stay_rate: float = 0.75
    """Probability of staying in the current interest at each step."""

    colour_affinity: float = 8.0
    """Items of the previous item's colour are 1 + this times as likely."""

    cold_rate: float = 0.05
    """Share of items that become available only in the last week."""

    def __post_init__(self) -> None:
        require(
            4 <= self.num_interests <= 24,
            f"prepare_data.market.num_interests must lie in 4..24, got {self.num_interests}",
        )
        require(
            self.num_items >= 8 * self.num_interests,
            "prepare_data.market.num_items must be at least 8 per interest "
            f"({8 * self.num_interests}), got {self.num_items}",
        )
        require(self.num_users >= 1, f"prepare_data.market.num_users must be >= 1, got {self.num_users}")
        for name in ("stay_rate", "cold_rate"):
            value = getattr(self, name)
            require(0 <= value < 1, f"prepare_data.market.{name} must lie in [0, 1), got {value}")
        require(
            5 <= self.mean_length <= 24,
            f"prepare_data.market.mean_length must lie in 5..24, got {self.mean_length}",
        )


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig:
    """Where interactions and items come from, and how they are filtered and split."""

    source: Literal["sample_market", "table", "sequences"] = "sample_market"
    """sample_market: the built-in world; table: CSV or parquet files; sequences: text lines
    `user item item ...`, oldest item first."""

    interactions: str | None = None
    """File of interactions (source=table: .csv or .parquet; source=sequences: text)."""

    items: str | None = None
    """File of items, .csv or .parquet; none: items are known by their id alone."""

    user_column: str = "user_id"
    """Column of the user in the interactions file."""

    item_column: str = "item_id"
    """Column of the item, in both files."""

    timestamp_column: str = "timestamp"
    """Column of the time in the interactions file; integers or decimal numbers."""

    rating_column: str | None = None
    """Column of the rating, if min_rating is used."""

    title_column: str = "title"
    """Column of the title in the items file; missing titles become ''."""

    text_columns: tuple[str, ...] = ()
    """Further text columns of the items file to keep, such as brand, categories."""

    image_column: str | None = None
    """Column of the picture's path in the items file, relative to that file's folder."""

    min_rating: float | None = None
    """Drop interactions with a lower rating; none: keep all."""

    k_core: int = 5
    """Drop users and items with fewer interactions, again and again until none is left; 0: keep all."""

    unknown_items: Literal["error", "drop"] = "error"
    """Interactions with an item that the items file lacks: refuse, or drop and count."""

    split: Literal["leave_one_out", "global_time"] = "leave_one_out"
    """leave_one_out: last item of a user is test, the one before valid; global_time: two points in
    time, the same for all users."""

    valid_rate: float = 0.1
    """global_time: share of interactions between the two points in time."""

    test_rate: float = 0.1
    """global_time: share of interactions after the second point."""

    ties: Literal["file", "shuffle"] = "file"
    """Order of a user's interactions with equal timestamps: as in the file, or shuffled."""

    seed: int = 0
    """Seed of the sample market and of shuffled ties."""

    market: SampleMarketConfig = field(default_factory=SampleMarketConfig)

    def __post_init__(self) -> None:
        for name in ("valid_rate", "test_rate"):
            value = getattr(self, name)
            require(0 < value < 0.5, f"prepare_data.{name} must lie between 0 and 0.5, got {value}")
        require(self.k_core >= 0, f"prepare_data.k_core must be >= 0, got {self.k_core}")
        require(
            (self.rating_column is None) == (self.min_rating is None),
            "prepare_data.rating_column and prepare_data.min_rating go together, got "
            f"{self.rating_column!r} and {self.min_rating}",
        )
        if self.source == "sample_market":
            self._refuse(
                set(self.__dataclass_fields__) - {"source", "seed", "market"}, "source='sample_market'"
            )
            return
        require(
            self.interactions is not None,
            f"prepare_data.source={self.source!r} needs prepare_data.interactions, the path of a file",
        )
        self._refuse({"market"}, f"source={self.source!r}")
        if self.source == "sequences":
            self._refuse(
                {"user_column", "timestamp_column", "rating_column", "ties"},
                "source='sequences', whose lines hold users and items in order and nothing else",
            )
            require(
                self.split == "leave_one_out",
                "prepare_data.split='global_time' needs timestamps, which source='sequences' lacks",
            )
        if self.items is None:
            self._refuse({"title_column", "text_columns", "image_column", "unknown_items"}, "no items file")
        if self.split == "leave_one_out":
            self._refuse({"valid_rate", "test_rate"}, "split='leave_one_out'")

    def _refuse(self, names: set[str], reason: str) -> None:
        """Settings that cannot take effect are an error."""
        for name in sorted(names):
            spec = self.__dataclass_fields__[name]
            default = SampleMarketConfig() if name == "market" else spec.default
            require(
                getattr(self, name) == default,
                f"prepare_data.{name} has no effect with {reason}; leave it out",
            )
