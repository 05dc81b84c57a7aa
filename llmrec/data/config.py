"""Settings of prepare_data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args

from llmrec.config import Settings, StageSettings, given, require
from llmrec.errors import ConfigError

SourceName = Literal["sample_market", "table", "sequences", "amazon_2014"]
Category = Literal["beauty", "toys_and_games", "sports_and_outdoors"]

NEEDED: dict[str, tuple[str, ...]] = {
    "sample_market": (),
    "table": ("interactions",),
    "sequences": ("interactions",),
    "amazon_2014": ("category", "folder"),
}
"""Settings that must be set, by source."""

assert set(NEEDED) == set(get_args(SourceName)), "NEEDED must name every source"

OWN_COLUMNS = ("raw_id", "title", "train_count", "image_path")
"""Columns of items.parquet that text columns must not be named like."""


READ_OF_MARKET = ("source", "seed", "market")
"""Settings that source=sample_market reads."""

KNOWN_OF_NAMED = (
    "interactions",
    "items",
    "user_column",
    "item_column",
    "items_item_column",
    "timestamp_column",
    "timestamp_format",
    "column_names",
    "rating_column",
    "title_column",
    "text_columns",
    "image_column",
    "image_url_column",
    "unknown_items",
)
"""What is known of a category that is fetched by name."""

LACKING_IN_SEQUENCES = (
    "user_column",
    "timestamp_column",
    "timestamp_format",
    "column_names",
    "rating_column",
    "min_rating",
    "ties",
    "split",
)
"""About what lines of items do not have."""

OF_ITEMS = (
    "title_column",
    "text_columns",
    "image_column",
    "unknown_items",
    "image_url_column",
    "image_folder",
    "incomplete_items",
    "items_item_column",
)
"""About the items file."""


@dataclass(frozen=True, kw_only=True)
class SampleMarketConfig(Settings, path="prepare_data.market"):
    """The built-in world whose true next-item probabilities are known."""

    num_users: int = 2000
    """Users drawn; every one has 2, 3 or 4 interests."""

    num_items: int = 600
    """Items, spread evenly over the interests."""

    num_interests: int = 24
    """Kinds of things, a noun each; 4 to 24."""

    max_length: int = 20
    """Most interactions of a user; lengths are uniform in 5 to this."""

    stay_rate: float = 0.75
    """Probability of staying in the current interest at each step."""

    colour_affinity: float = 6.0
    """Items of the previous item's colour are 1 + this times as likely as others."""

    popularity_exponent: float = 1.0
    """Weight of the r-th most popular item of an interest is r to the power of minus this."""

    cold_rate: float = 0.05
    """Share of items that become available only in the last week."""

    def __post_init__(self) -> None:
        super().__post_init__()

        def check(name: str, condition: bool, expected: str) -> None:
            require(condition, f"prepare_data.market.{name} must {expected}, got {getattr(self, name)}")

        check("num_users", self.num_users >= 1, "be >= 1")
        check("num_interests", 4 <= self.num_interests <= 24, "lie in 4..24")
        most = 144 * self.num_interests
        check("num_items", self.num_items <= most, f"be at most 144 per interest ({most})")
        check("stay_rate", 0 < self.stay_rate < 1, "lie between 0 and 1")
        check("cold_rate", 0 <= self.cold_rate <= 0.5, "lie in [0, 0.5]")
        check("colour_affinity", self.colour_affinity >= 0, "be >= 0")
        check("popularity_exponent", self.popularity_exponent >= 0, "be >= 0")
        # An interest must never run out of items, or the true probabilities would not be exact.
        least = self.num_items // self.num_interests - -(-self.num_cold // self.num_interests)
        check("max_length", self.max_length >= 5, "be >= 5")
        check(
            "max_length",
            self.max_length <= least,
            f"be at most {least}, the items of the smallest interest that are not cold "
            "(fewer interests or more items allow more)",
        )

    @property
    def num_cold(self) -> int:
        """Items that become available only in the last week."""
        return round(self.cold_rate * self.num_items)


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig(StageSettings, path="prepare_data"):
    """Where interactions and items come from, and how they are filtered and split."""

    source: SourceName = "sample_market"
    """sample_market: the built-in world; table: CSV, parquet or raw files; sequences: text lines
    `user item item ...`, oldest item first; amazon_2014: a category by name, fetched where it is absent."""

    category: Category | None = None
    """source=amazon_2014: which 5-core category."""

    folder: str | None = None
    """source=amazon_2014: where its files are, or are fetched to."""

    mirrors: tuple[str, ...] = ()
    """source=amazon_2014: addresses of folders that hold its files, tried before the public one."""

    offline: bool = False
    """Fetch nothing: files of source=amazon_2014, and pictures, must be there or count as missing."""

    interactions: str | None = None
    """File of interactions. source=table: .csv, .tsv, .txt, .data, .parquet, one JSON object a line (.json,
    .jsonl, .ndjson, packed or not: Amazon 2014, 2018 and 2023 as they are), RecBole's .inter, MovieLens
    .dat, or hub:NAME[@REVISION][:CONFIG[:SPLIT]], a data set on the Hub or a folder; source=sequences:
    text."""

    items: str | None = None
    """File of items, of the same kinds as tables, or MovieLens-100k's u.item; none: items are known by their
    id alone."""

    user_column: str = "user_id"
    """Column of the user in the interactions file."""

    item_column: str = "item_id"
    """Column of the item, in both files unless items_item_column names another."""

    items_item_column: str | None = None
    """Column of the item in the items file; none: item_column."""

    timestamp_column: str | None = "timestamp"
    """Column of the time in the interactions file: whole or decimal numbers, such as Unix seconds; or ISO
    8601 such as 2011-10-18T00:00:00Z, all with a zone or all without (UTC then); none: there is no such
    column, and each user's rows stand in the order of time."""

    timestamp_format: str | None = None
    """How times are written that are neither, in the codes of Python's strptime, such as %d.%m.%Y %H:%M, or
    %a %b %d %H:%M:%S %z %Y for Tue May 01 12:30:00 -0700 2012, or %Y%m%d; UTC where a time has no %z."""

    column_names: tuple[str, ...] | None = None
    """All columns of an interactions file that has no header, in order, such as
    user_id,item_id,rating,timestamp; none: its first row names them."""

    rating_column: str | None = None
    """Column of the rating; goes with min_rating."""

    min_rating: float | None = None
    """Drop interactions with a lower rating; none: keep all."""

    title_column: str | None = "title"
    """Column of the title in the items file; none: it has no titles."""

    text_columns: tuple[str, ...] = ()
    """Further text columns of the items file to keep, such as brand,categories."""

    image_column: str | None = None
    """Column of the picture's path in the items file, relative to that file's folder; none: no pictures."""

    image_url_column: str | None = None
    """Column of the picture's address in the items file (of several, joined by a bar, the first); pictures of
    the items that stay are fetched into image_folder."""

    image_folder: str | None = None
    """Where fetched pictures are kept and looked up, with a status for every item (status.parquet)."""

    incomplete_items: Literal["keep", "drop"] = "keep"
    """Items without a title, or without a picture where there are pictures: drop them after the k-core
    filter, and then users with fewer than k_core interactions left, as MME-SID does."""

    exclude_items: str | None = None
    """File with raw ids of items to drop, one a line, at the same point and with the same consequence."""

    unknown_items: Literal["error", "drop"] = "error"
    """Interactions with an item that the items file lacks: refuse, or drop and count."""

    k_core: int | None = None
    """Drop users and items with fewer interactions, again and again until none is left; 0: keep all;
    none: 5 for tables, 0 for sequences."""

    split: Literal["leave_one_out", "global_time"] = "leave_one_out"
    """leave_one_out: last item of a user is test, the one before valid; global_time: two points in
    time, the same for all users."""

    valid_rate: float = 0.1
    """global_time: share of interactions between the two points in time."""

    test_rate: float = 0.1
    """global_time: share of interactions after the second point in time."""

    ties: Literal["file", "shuffle"] = "file"
    """Order of a user's interactions with equal timestamps: as in the file, or shuffled."""

    seed: int = 0
    """Seed of the sample market, or of shuffled ties."""

    market: SampleMarketConfig = field(default_factory=SampleMarketConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_values()
        for names, reason in self._without_effect():
            self.refuse_changed(names, reason)
        self._check_what_goes_together()

    def _without_effect(self) -> Iterator[tuple[Iterable[str], str]]:
        """Settings that have no effect beside others, and beside which."""
        source = f"source={self.source!r}"
        if self.source == "sample_market":
            yield [name for name in self.__dataclass_fields__ if name not in READ_OF_MARKET], source
            return
        yield ["market"], source
        if self.source == "amazon_2014":
            yield KNOWN_OF_NAMED, f"{source}, whose files and columns are known"
        else:
            yield ["category", "folder", "mirrors"], source
            if self.source == "sequences":
                yield LACKING_IN_SEQUENCES, f"{source}, whose lines hold no times, ratings or column names"
            if self.items is None:
                of_items = [*OF_ITEMS, "item_column"] if self.source == "sequences" else OF_ITEMS
                yield of_items, "no items file"
            if self.image_url_column is None:
                yield ["offline"], "nothing to fetch"
        if self.timestamp_column is None:
            yield ["timestamp_format", "ties"], "timestamp_column=none"
        if self.split == "leave_one_out":
            yield ["valid_rate", "test_rate"], "split='leave_one_out'"
        if self.ties == "file":
            yield ["seed"], "ties='file'"

    def _check_what_goes_together(self) -> None:
        for name in NEEDED[self.source]:
            require(
                getattr(self, name) is not None,
                f"prepare_data.{name} must be set with source={self.source!r}, got none",
            )
        require(
            self.image_url_column is None or self.image_column is None,
            "prepare_data.image_column must be none where prepare_data.image_url_column is set, got "
            f"{self.image_column!r}",
        )
        require(
            self.source == "amazon_2014" or (self.image_url_column is None) == (self.image_folder is None),
            "prepare_data.image_url_column and prepare_data.image_folder must be given together, got "
            f"{self.image_url_column!r} and {self.image_folder!r}",
        )
        if self.timestamp_format is not None:
            self._check_format(self.timestamp_format)
        require(
            self.timestamp_column is not None or self.split == "leave_one_out",
            f"prepare_data.split={self.split} needs times; set prepare_data.timestamp_column to their column",
        )

    def _check_format(self, written: str) -> None:
        """Refuse a format that reads no times, or not the same ones everywhere."""
        full = f"prepare_data.timestamp_format={written!r}"
        try:
            moment = datetime(2012, 5, 1, 12, 30, tzinfo=timezone.utc)
            datetime.strptime(moment.strftime(written), written)
        except (ValueError, re.error) as error:
            raise ConfigError(f"{full} cannot be read by Python's strptime: {error}") from None
        years = any(code in written for code in ("%Y", "%y", "%c", "%x", "%G"))
        require(years, f"{full} names no year; use the codes of Python's strptime, such as %d.%m.%Y %H:%M")
        zones = "%Z knows the names of zones that this machine goes by alone; take %z, zones as numbers"
        require("%Z" not in written, f"{full}: {zones}")

    def incidental_fields(self) -> tuple[str, ...]:
        """Settings that change how this is computed, but nothing of what."""
        return ("mirrors",)

    def source_files(self) -> dict[str, str]:
        """The users' own files that the result depends on, by setting."""
        named = {
            "interactions": self.interactions,
            "items": self.items,
            "exclude_items": self.exclude_items,
        }
        found = {name: path for name, path in named.items() if path is not None}
        return found | {path.name: str(path) for path in self.named_files()}

    def source_folders(self) -> dict[str, str]:
        """Folders of the user's that the result depends on, by setting: data sets in the Hub's form."""
        named = {"interactions": self.interactions, "items": self.items}
        return {
            name: address.removeprefix("hub:").partition(":")[0]
            for name, address in named.items()
            if address is not None and address.startswith("hub:")
        }

    def named_files(self) -> list[Path]:
        """The files of a category by name, whether they are there or not."""
        if self.source != "amazon_2014":
            return []
        from llmrec.data.named import file_names

        return [Path(given(self.folder)) / name for name in file_names(given(self.category))]

    @property
    def least_interactions(self) -> int:
        """k of the k-core filter; 0 if there is none."""
        if self.k_core is None:
            return 5 if self.source in ("table", "amazon_2014") else 0
        return self.k_core

    def _check_values(self) -> None:
        for name in ("valid_rate", "test_rate"):
            value = getattr(self, name)
            require(0 < value < 0.5, f"prepare_data.{name} must lie between 0 and 0.5, got {value}")
        require(
            self.k_core is None or self.k_core >= 0, f"prepare_data.k_core must be >= 0, got {self.k_core}"
        )
        require(self.seed >= 0, f"prepare_data.seed must be >= 0, got {self.seed}")
        require(
            self.source == "amazon_2014" or (self.rating_column is None) == (self.min_rating is None),
            "prepare_data.rating_column and prepare_data.min_rating must be given together, got "
            f"{self.rating_column!r} and {self.min_rating}",
        )
        require(
            len({self.user_column, self.item_column, self.timestamp_column}) == 3,
            "prepare_data.user_column, item_column and timestamp_column must be different, got "
            f"{self.user_column}, {self.item_column} and {self.timestamp_column}",
        )
        if self.column_names is not None:
            read = (self.user_column, self.item_column, self.timestamp_column, self.rating_column)
            absent = [name for name in read if name is not None and name not in self.column_names]
            require(
                not absent and len(set(self.column_names)) == len(self.column_names),
                "prepare_data.column_names must name every column once, those of user, item, time and rating "
                f"among them; got {','.join(self.column_names)}"
                + (f" without {', '.join(absent)}" if absent else ""),
            )
        for name in self.text_columns:
            require(
                name not in OWN_COLUMNS
                and name not in (self.title_column, self.image_column)
                and self.text_columns.count(name) == 1,
                "prepare_data.text_columns must be columns besides title and picture, each once and none "
                f"named {', '.join(OWN_COLUMNS)}; got {','.join(self.text_columns)}",
            )
