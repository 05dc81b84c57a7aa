"""Settings of prepare_data that contradict each other or cannot take effect are refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from llmrec.assignments import field_docs, override
from llmrec.config import as_dict, from_dict
from llmrec.data.config import KNOWN_OF_NAMED, PrepareDataConfig, SampleMarketConfig
from llmrec.errors import ConfigError

TABLE = {"source": "table", "interactions": "log.csv"}
SEQUENCES = {"source": "sequences", "interactions": "log.txt"}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"source": "table"}, "interactions"),
        ({"interactions": "log.csv"}, "interactions"),
        ({"k_core": 5}, "k_core"),
        ({"ties": "shuffle"}, "ties"),
        (TABLE | {"market": SampleMarketConfig(num_users=5)}, "market"),
        (TABLE | {"seed": 1}, "seed"),
        (TABLE | {"k_core": -1}, "k_core"),
        (TABLE | {"min_rating": 3.0}, "rating_column"),
        (TABLE | {"rating_column": "stars"}, "rating_column"),
        (TABLE | {"valid_rate": 0.2}, "valid_rate"),
        (TABLE | {"split": "global_time", "test_rate": 0.5}, "test_rate"),
        (TABLE | {"image_column": "image"}, "image_column"),
        (TABLE | {"text_columns": ("brand",)}, "text_columns"),
        (TABLE | {"unknown_items": "drop"}, "unknown_items"),
        (TABLE | {"items": "items.csv", "text_columns": ("title",)}, "text_columns"),
        (TABLE | {"items": "items.csv", "text_columns": ("brand", "brand")}, "text_columns"),
        (TABLE | {"items": "items.csv", "text_columns": ("train_count",)}, "text_columns"),
        (SEQUENCES | {"rating_column": "stars", "min_rating": 3.0}, "rating_column"),
        (SEQUENCES | {"timestamp_column": "time"}, "timestamp_column"),
        (SEQUENCES | {"timestamp_format": "%Y"}, "timestamp_format"),
        (SEQUENCES | {"ties": "shuffle"}, "ties"),
        (SEQUENCES | {"split": "global_time"}, "split"),
        (SEQUENCES | {"item_column": "asin"}, "item_column"),
        (TABLE | {"timestamp_column": None, "ties": "shuffle"}, "ties"),
        (TABLE | {"timestamp_column": None, "timestamp_format": "%Y"}, "timestamp_format"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, field):
    with pytest.raises(ConfigError, match=rf"^prepare_data\.{field} (.*must|has no effect with) ") as caught:
        PrepareDataConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_users": 0}, "num_users must be >= 1, got 0"),
        ({"num_interests": 25}, "num_interests must lie in 4..24, got 25"),
        ({"num_items": 240}, "max_length must be at most 9"),
        ({"num_items": 4000}, "num_items must be at most 144 per interest"),
        ({"max_length": 4}, "max_length must be >= 5, got 4"),
        ({"stay_rate": 1.0}, "stay_rate must lie between 0 and 1"),
        ({"cold_rate": 0.9}, "cold_rate must lie in"),
        ({"colour_affinity": -1.0}, "colour_affinity must be >= 0"),
    ],
)
def test_impossible_markets_are_refused(settings, words):
    with pytest.raises(ConfigError, match=r"^prepare_data\.market\.") as caught:
        SampleMarketConfig(**settings)
    assert words in str(caught.value)


def test_the_filter_default_depends_on_the_source():
    assert PrepareDataConfig(**TABLE).least_interactions == 5
    assert PrepareDataConfig(**SEQUENCES).least_interactions == 0
    assert PrepareDataConfig(**SEQUENCES, k_core=5).least_interactions == 5
    assert PrepareDataConfig(**TABLE, k_core=0).least_interactions == 0


NAMED = {"source": "amazon_2014", "category": "beauty", "folder": "data"}
OTHER = {
    "column_names": ("user_id", "item_id", "timestamp"),
    **{"text_columns": ("brand",), "unknown_items": "drop"},
}


@pytest.mark.parametrize("name", KNOWN_OF_NAMED)
def test_what_is_known_of_a_category_cannot_be_set(name):
    reason = "(has no effect with source='amazon_2014'|and .*together)"
    with pytest.raises(ConfigError, match=f"{name} {reason}"):
        PrepareDataConfig(**NAMED, **{name: OTHER.get(name, "%Y" if name == "timestamp_format" else "x")})


def test_what_a_result_depends_on_is_known_and_where_it_came_from_is_not_part_of_it():
    config = PrepareDataConfig(**TABLE | {"interactions": "hub:data/log:small:full"}, exclude_items="x.txt")
    assert config.source_files() == {"interactions": "hub:data/log:small:full", "exclude_items": "x.txt"}
    assert config.source_folders() == {"interactions": "data/log"}
    names = ["meta_Beauty.json.gz", "reviews_Beauty_5.json.gz"]
    named = PrepareDataConfig(**NAMED, mirrors=("http://a",))
    assert named.source_files() == {name: f"data/{name}" for name in names}
    assert named.incidental_fields() == ("mirrors",)


def test_settings_survive_json_and_the_command_line():
    config = PrepareDataConfig(**TABLE, items="items.csv", text_columns=("brand", "categories"))
    assert from_dict(PrepareDataConfig, as_dict(config)) == config
    changed = override(PrepareDataConfig(), {"source": "table", "interactions": "a.csv", "k_core": "0"})
    assert changed.least_interactions == 0
    assert override(PrepareDataConfig(), {"market.num_users": "50"}).market.num_users == 50


@pytest.mark.parametrize("cls", [PrepareDataConfig, SampleMarketConfig])
def test_every_setting_but_the_nested_one_is_explained(cls):
    names = {field.name for field in dataclasses.fields(cls)} - {"market"}
    assert names == set(field_docs(cls))


def test_the_help_names_every_form_of_a_time():
    assert "ISO 8601" in field_docs(PrepareDataConfig)["timestamp_column"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("DD.MM.YYYY", "names no year; use the codes of Python's strptime"),
        ("%H:%M", "names no year"),
        ("%d/%m/%d %Y", "cannot be read by Python's strptime: redefinition"),
        ("%Q %Y", "cannot be read by Python's strptime: 'Q' is a bad directive"),
        ("%Y-%m-%d %Z", "take %z, zones as numbers"),
    ],
)
def test_formats_that_read_no_times_are_refused(written, message):
    with pytest.raises(ConfigError, match=f"prepare_data.timestamp_format='{written}'.*{message}"):
        PrepareDataConfig(**TABLE, timestamp_format=written)
