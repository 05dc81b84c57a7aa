"""Public data sets by name: where their files are, how their columns are called, how many rows to expect.

Counts: "classic" is the 5-core file as most papers use it; "paper" is MME-SID's Table 1, which leaves out
items without a title or picture and then users with fewer than 5 interactions.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from llmrec.config import given
from llmrec.data.config import PrepareDataConfig
from llmrec.data.download import RemoteFile, download

logger = logging.getLogger("llmrec")

AMAZON_2014 = "snap.stanford.edu/data/amazon/productGraph/categoryFiles"
"""Where the 2014 release of Amazon reviews lies (McAuley et al., SIGIR 2015)."""

Counts = tuple[int, int, int]
"""Users, items, interactions."""


@dataclass(frozen=True, kw_only=True)
class NamedData:
    """One category of the 2014 release."""

    title: str
    stem: str
    """What its files are called: reviews_STEM_5.json.gz and meta_STEM.json.gz"""
    classic: Counts
    paper: Counts


CATEGORIES: dict[str, NamedData] = {
    "beauty": NamedData(
        title="Beauty", stem="Beauty", classic=(22_363, 12_101, 198_502), paper=(22_332, 12_086, 198_215)
    ),
    "toys_and_games": NamedData(
        title="Toys & Games",
        stem="Toys_and_Games",
        classic=(19_412, 11_924, 167_597),
        paper=(19_121, 11_757, 165_221),
    ),
    "sports_and_outdoors": NamedData(
        title="Sports & Outdoors",
        stem="Sports_and_Outdoors",
        classic=(35_598, 18_357, 296_337),
        paper=(35_092, 18_090, 292_007),
    ),
}


def resolve(config: PrepareDataConfig) -> PrepareDataConfig:
    """The same settings with the category's files, fetched where they are absent, as plain tables.

    Raises:
        DataError: a file can be neither found nor fetched.
    """
    names = file_names(given(config.category))
    paths = []
    for name in names:
        bases = [*config.mirrors, f"https://{AMAZON_2014}", f"http://{AMAZON_2014}"]
        file = RemoteFile(name=name, urls=tuple(f"{base.rstrip('/')}/{name}" for base in bases))
        paths.append(download(file, Path(given(config.folder)), offline=config.offline))
    return dataclasses.replace(
        config,
        source="table",
        category=None,
        folder=None,
        mirrors=(),
        offline=config.offline if config.image_folder else False,
        interactions=str(paths[0]),
        items=str(paths[1]),
        user_column="reviewerID",
        item_column="asin",
        timestamp_column="unixReviewTime",
        rating_column=None if config.min_rating is None else "overall",
        text_columns=("brand", "categories"),
        image_url_column="imUrl" if config.image_folder else None,
        unknown_items="drop",
    )


def file_names(category: str) -> tuple[str, str]:
    """Names of the files of interactions and of items."""
    stem = CATEGORIES[category].stem
    return f"reviews_{stem}_5.json.gz", f"meta_{stem}.json.gz"


def warnings_of_counts(config: PrepareDataConfig, counts: Counts) -> list[str]:
    """A sentence if a named data set has other counts than it is known for."""
    plain = config.k_core in (None, 5) and config.min_rating is None and config.exclude_items is None
    if config.source != "amazon_2014" or not plain:
        return []
    named = CATEGORIES[given(config.category)]
    which = "paper" if config.incomplete_items == "drop" else "classic"
    expected = getattr(named, which)
    if counts == expected:
        return []
    where = "MME-SID's Table 1" if which == "paper" else "the classic 5-core file"
    numbers = " and ".join(" / ".join(f"{number:,}" for number in found) for found in (counts, expected))
    return [
        f"{named.title}: users / items / interactions are {numbers} here and in {where}, in this order; "
        "results do not compare exactly."
    ]
