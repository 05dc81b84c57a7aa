"""Counts that are known for public data sets."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from llmrec.data.config import PrepareDataConfig
from llmrec.data.prepare import prepare_data

pytestmark = pytest.mark.real_data


def test_beauty_has_the_classic_counts_and_its_tie_leak(real_data):
    data = prepare_data(
        PrepareDataConfig(
            source="table",
            interactions=str(real_data / "beauty" / "interactions.csv"),
            items=str(real_data / "beauty" / "items.csv"),
            text_columns=("brand", "categories"),
            k_core=5,
        )
    )
    assert (data.num_users, data.num_items, len(data.item)) == (22_363, 12_101, 198_502)
    figures = data.summary["ties"]
    assert figures["tied_pair_rate"] == pytest.approx(0.44, abs=0.005)
    assert figures["ascending_rate"] == 1.0
    assert figures["tied_last_pair_user_rate"] == pytest.approx(0.435, abs=0.0005)
    assert any("43.9% of neighbouring interactions" in sentence for sentence in data.summary["warnings"])
    assert data.summary["items_without_title"] == 7
    assert sum(brand != "" for brand in data.items["brand"].to_pylist()) == 7_476


def test_the_published_sequences_have_the_published_counts(real_data):
    data = prepare_data(
        PrepareDataConfig(
            source="sequences", interactions=str(real_data / "beauty" / "sequences_mme_sid.txt")
        )
    )
    assert (data.num_users, data.num_items, len(data.item)) == (22_332, 12_086, 198_215)
    assert data.raw_ids == [str(number) for number in range(1, 12_087)]
    targets = data.targets("train", max_targets=50)
    assert len(targets) == 150_041
    assert (targets.start == targets.stop).sum() == 22_196
    assert (data.train_count[1:] == 0).sum() == 33


def test_the_rule_of_mme_sid_gives_its_published_sequences(real_data, tmp_path):
    """15 items go, then users with fewer than 5 interactions left; nothing else."""
    folder = real_data / "beauty"
    published = json.loads((folder / "item_ids_mme_sid.json").read_text())
    config = PrepareDataConfig(source="table", interactions=str(folder / "interactions.csv"))
    classic = prepare_data(config)
    gone = sorted(set(classic.raw_ids) - set(published))
    assert len(gone) == 15
    (tmp_path / "gone.txt").write_text("\n".join(gone))
    made = prepare_data(dataclasses.replace(config, exclude_items=str(tmp_path / "gone.txt")))
    assert made.summary["dropped"]["short_user"] > 0
    names = made.raw_ids
    ours = Counter(
        tuple(names[item - 1] for item in made.item[start:stop])
        for start, stop in zip(made.offset, made.offset[1:])
    )
    lines = (folder / "sequences_mme_sid.txt").read_text().splitlines()
    theirs = Counter(tuple(published[int(item) - 1] for item in line.split()[1:]) for line in lines)
    assert ours == theirs and ours.total() == 22_332


def test_movielens_keeps_its_posters_and_knows_that_its_times_are_positions(real_data):
    data = prepare_data(
        PrepareDataConfig(
            source="table",
            interactions=str(real_data / "ml-1m" / "interactions.csv"),
            items=str(real_data / "ml-1m" / "items.csv"),
            image_column="image",
            text_columns=("genres",),
            k_core=0,
        )
    )
    assert (data.num_users, data.num_items, len(data.item)) == (6_040, 3_706, 1_000_209)
    assert data.items["image_path"].null_count == 450
    assert data.raw_ids[0] == "1"
    assert data.titles[0] == "Toy Story (1995)"
    assert data.image_file(1).is_file()
    assert data.summary["times_are_positions"] and "ties" not in data.summary
    assert any(sentence.startswith("Times are places") for sentence in data.summary["warnings"])
