"""prepare_data on small tables written by hand: every documented outcome, in numbers."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.config import PrepareDataConfig
from llmrec.data.items import with_pictures_found
from llmrec.data.prepare import prepare_data
from llmrec.data.summary import warnings_of_times
from llmrec.errors import ConfigError, DataError
from llmrec.interactions import Interactions

SMALL = "user_id,item_id,timestamp\nann,9,3\nann,10,1\nann,8,2\nbob,10,5\nbob,9,4\nbob,7,6\n"


USERS = {"a": "1236", "b": "1234567", "c": "4567", "d": "123", "e": "4567"}


def prepare(folder: Path, interactions: str, items: str | None = None, **settings) -> Interactions:
    (folder / "log.csv").write_text(interactions)
    if items is not None and not items.endswith(".parquet"):
        (folder / "items.csv").write_text(items)
        items = str(folder / "items.csv")
    if items is not None:
        settings["items"] = items
    chosen = {"k_core": 0} | settings
    return prepare_data(PrepareDataConfig(source="table", interactions=str(folder / "log.csv"), **chosen))


def histories(data: Interactions) -> dict[str, list[str]]:
    """Raw items of every raw user, in order."""
    raw = np.array(["", *data.raw_ids])
    return {
        user: raw[data.item[data.offset[place] : data.offset[place + 1]]].tolist()
        for place, user in enumerate(data.user_raw_ids)
    }


def same(one: Interactions, other: Interactions) -> bool:
    arrays = ("offset", "item", "timestamp", "split")
    return (
        one.user_raw_ids == other.user_raw_ids
        and one.items.equals(other.items)
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    )


def test_users_are_ordered_in_time_and_split_from_the_end(tmp_path):
    data = prepare(tmp_path, SMALL)
    assert histories(data) == {"ann": ["10", "8", "9"], "bob": ["9", "10", "7"]}
    assert data.split.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.summary["split_counts"] == {"train": 2, "valid": 2, "test": 2, "context": 0}


def test_spaces_around_ids_make_no_others(tmp_path, caplog):
    spaced = SMALL.replace("ann,10,", "ann , 10,").replace("bob,9,", "bob,9 ,")
    assert same(prepare(tmp_path, spaced), prepare(tmp_path, SMALL))
    assert "column 'user_id': 1 ids have spaces" in caplog.text and "column 'item_id': 2 ids" in caplog.text


@pytest.mark.parametrize("wrong", ["0", "1600000005000"])
def test_times_of_two_units_are_pointed_out(tmp_path, caplog, wrong):
    rows = [f"u{user},{item},{1_600_000_000 + 9 * item + user}" for user in range(3) for item in range(5)]
    prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert "can hardly be in one unit" not in caplog.text
    rows[7] = f"u1,2,{wrong}"
    prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert "can hardly be in one unit" in caplog.text
    assert not warnings_of_times(-157_680_000, 1_000_000_000), "1965 to 2001"


def test_times_that_can_be_in_one_unit_are_not_pointed_out():
    assert warnings_of_times(1, 99_999_999) == warnings_of_times(14_000_000, 1_300_000_000) == []
    assert len(warnings_of_times(12_000_000, 1_300_000_000)) == 1


@pytest.mark.parametrize("missing", ["None", "NaN", "NULL", " none "])
def test_ids_that_are_written_as_a_missing_value_are_refused(tmp_path, missing):
    with pytest.raises(DataError, match=r"row 4, column 'item_id': '.*', expected an id"):
        prepare(tmp_path, SMALL.replace("ann,8,2", f"ann,{missing},2"))


def test_fractions_of_seconds_are_rounded_to_millionths(tmp_path):
    log = "user_id,item_id,timestamp\na,1,1.001\na,2,1.1\na,3,9\n"
    assert prepare(tmp_path, log).timestamp.tolist() == [1_001_000, 1_100_000, 9_000_000]


@pytest.mark.parametrize("zone", ["Z", " Z", "+00:00", " +0000", " +00", " UTC"])
def test_every_form_of_a_zone_is_read(tmp_path, zone):
    rows = [f"a,{item},2011-10-18 00:00:0{item}{zone}" for item in range(3)]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert data.timestamp.tolist() == [1318896000, 1318896001, 1318896002]


def test_users_and_items_are_different_columns():
    with pytest.raises(ConfigError, match="must be different, got x, x and timestamp"):
        PrepareDataConfig(source="table", interactions="a.csv", user_column="x", item_column="x")


def test_utc_may_be_written_after_a_time(tmp_path):
    rows = [f"u,{item},2011-10-15 16:43:5{item} UTC" for item in range(4)]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert data.timestamp.tolist() == [1318697030 + item for item in range(4)]


def test_whole_number_ids_are_ordered_as_numbers_and_others_as_text(tmp_path):
    assert prepare(tmp_path, SMALL).raw_ids == ["7", "8", "9", "10"]
    assert prepare(tmp_path, SMALL.replace(",7,", ",7b,")).raw_ids == ["10", "7b", "8", "9"]


def test_raw_ids_stay_as_they_are_written(tmp_path):
    data = prepare(tmp_path, SMALL.replace("ann,9", "ann,09").replace(",7,", ",007,"))
    assert data.raw_ids == ["007", "8", "09", "9", "10"]


def test_the_order_of_rows_changes_nothing_when_times_differ(tmp_path):
    rng = random.Random(0)
    rows = [
        f"u{user},{item},{1000 * user + time}"
        for user in range(30)
        for time, item in enumerate(rng.sample(range(40), rng.randint(3, 12)))
    ]
    expected = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]), k_core=3)
    for _ in range(3):
        rng.shuffle(rows)
        again = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]), k_core=3)
        assert same(expected, again)


def test_train_counts_know_nothing_of_valid_and_test_targets(tmp_path):
    header, *rows = SMALL.splitlines()
    longer = [*rows, "ann,7,20", "ann,8,21", "bob,8,20", "bob,9,21"]
    swapped = [*rows, "ann,8,20", "ann,7,21", "bob,9,20", "bob,8,21"]
    one, other = (prepare(tmp_path, "\n".join([header, *chosen])) for chosen in (longer, swapped))
    assert not np.array_equal(one.item, other.item)
    assert one.items.equals(other.items)
    assert dict(zip(one.raw_ids, one.train_count[1:].tolist())) == {"7": 1, "8": 1, "9": 2, "10": 2}


@pytest.mark.parametrize(
    ("first", "second", "apart", "written"),
    [
        ("2011-10-18", "2011-10-19", 86_400, None),
        ("2011-10-18T00:00:00", "2011-10-18T00:00:05", 5, None),
        ("2011-10-18 00:00:00", "2011-10-18 00:01:00", 60, None),
        ("2011-10-18T00:00:00Z", "2011-10-18T02:00:00+01:00", 3_600, None),
        ("2011-10-18 00:00:00+00:00", "2011-10-18 02:00:00+01:00", 3_600, None),
        ("2011-10-18 00:00:00Z", "2011-10-18 01:00:00Z", 3_600, None),
        ("2011-10-18 00:00:00+00", "2011-10-18 02:00:00.000+01", 3_600, None),
        ("2011-10-18T00:00:00.000000000Z", "2011-10-18T01:00:00.000000999Z", 3_600, None),
        ("18.10.2011 00:00", " 18.10.2011 01:00", 3_600, "%d.%m.%Y %H:%M"),
        (
            "Mon Oct 17 17:00:00 -0700 2011",
            "Tue Oct 18 02:00:00 +0100 2011",
            3_600,
            "%a %b %d %H:%M:%S %z %Y",
        ),
    ],
)
def test_times_may_be_dates_and_moments_as_text(tmp_path, first, second, apart, written):
    rows = [
        (f"u{user}", item, when) for user in range(3) for item, when in ((1, second), (2, first), (3, second))
    ]
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    config = PrepareDataConfig(source="table", interactions=str(path), k_core=1, timestamp_format=written)
    data = prepare_data(config)
    assert data.item[:3].tolist() == [2, 1, 3]
    start = 1_318_896_000
    assert data.timestamp[:3].tolist() == [start, start + apart, start + apart]


def test_exact_duplicates_go_and_repeats_at_other_times_stay(tmp_path):
    data = prepare(tmp_path, SMALL + "ann,9,3\nann,9,3\nann,9,7\n")
    assert histories(data)["ann"] == ["10", "8", "9", "9"]
    assert data.summary["dropped"]["duplicate"] == 2
    assert data.summary["read"]["interactions"] == 9


def test_ratings_below_the_minimum_go_and_a_good_copy_of_a_bad_row_stays(tmp_path):
    rows = ["a,1,1,5", "a,2,2,3.5", "a,3,3,4", "a,4,4,4", "a,5,5,1", "a,5,5,4.5"]
    text = "\n".join(["user_id,item_id,timestamp,stars", *rows])
    data = prepare(tmp_path, text, rating_column="stars", min_rating=4)
    assert histories(data) == {"a": ["1", "3", "4", "5"]}
    assert data.summary["dropped"]["low_rating"] == 2


def test_ties_stay_in_file_order_and_are_measured(tmp_path, caplog):
    rows = [f"u{user},{item},{item // 3}" for user in range(4) for item in (1, 2, 3, 4, 5)]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert histories(data)["u0"] == ["1", "2", "3", "4", "5"]
    figures = data.summary["ties"]
    assert figures["tied_pair_rate"] == 0.75
    assert figures["ascending_rate"] == 1.0
    assert figures["tied_last_pair_user_rate"] == 1.0
    assert "75.0% of neighbouring interactions have equal timestamps, 100.0% of these" in caplog.text
    assert any("ties=shuffle" in sentence for sentence in data.summary["warnings"])

    rows = [f"u{user},{item},{item // 3}" for user in range(4) for item in (2, 1, 5, 4, 3)]
    backwards = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert histories(backwards)["u0"] == ["2", "1", "5", "4", "3"]
    assert any("descending" in sentence for sentence in backwards.summary["warnings"])


def test_shuffled_ties_depend_on_the_seed_alone_and_keep_times_in_order(tmp_path):
    rows = [f"u{user},{item},{item // 10}" for user in range(20) for item in range(20)]
    text = "\n".join(["user_id,item_id,timestamp", *rows])
    reverse = "\n".join(["user_id,item_id,timestamp", *rows[::-1]])
    one = prepare(tmp_path, text, ties="shuffle", seed=1)
    assert same(one, prepare(tmp_path, reverse, ties="shuffle", seed=1))
    assert not same(one, prepare(tmp_path, text, ties="shuffle", seed=2))
    assert (np.diff(one.timestamp.reshape(20, 20)) >= 0).all()
    assert len({tuple(items[:10]) for items in histories(one).values()}) > 1
    figures = one.summary["ties"]
    assert figures["order"] == "shuffle"
    assert figures["ascending_rate"] == 1.0
    assert 0.35 < figures["ascending_rate_after_shuffle"] < 0.65


def test_k_core_goes_on_until_nothing_changes(tmp_path):
    # Item 4 has one row; without it user c has two; without c item 3 has two, then b has two, ...
    rows = ["a,1,1", "a,2,2", "a,5,3", "b,1,1", "b,2,2", "b,5,3", "c,1,1", "c,2,2", "c,5,4", "c,3,3"]
    rows += ["d,3,1", "d,4,2", "d,1,3"]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]), k_core=3)
    assert histories(data) == {"a": ["1", "2", "5"], "b": ["1", "2", "5"], "c": ["1", "2", "5"]}
    assert data.summary["dropped"]["k_core"] == 4
    assert data.summary["read"]["users"] == 4


def test_where_nothing_is_left_no_file_of_excluded_items_is_blamed(tmp_path):
    (tmp_path / "excluded.txt").write_text("7\n")
    with pytest.raises(DataError, match=r"no interaction is left of 6 \(dropped by k_core: 6\)"):
        prepare(tmp_path, SMALL, k_core=9, exclude_items=str(tmp_path / "excluded.txt"))


def test_items_bring_titles_texts_and_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "7.png").write_bytes(b"x")
    items = (
        "item_id,name,brand,image\n10,Ten,Acme,pictures/10.png\n9,,Acme,  \n8,Eight,,\n"
        '7,"Seven, ""best""",Zed, pictures/7.png \n99,Unused,,\n'
    )
    data = prepare(tmp_path, SMALL, items, title_column="name", text_columns=("brand",), image_column="image")
    assert data.titles == ['Seven, "best"', "Eight", "", "Ten"]
    assert data.items["brand"].to_pylist() == ["Zed", "", "Acme", "Acme"]
    assert data.items["image_path"].to_pylist() == ["pictures/7.png", None, None, None]
    assert data.image_file(1) == tmp_path / "pictures" / "7.png"
    summary = data.summary
    assert summary["items_without_title"] == 1
    assert summary["missing_picture_files"] == 1
    assert summary["items_without_picture_path"] == 2
    assert summary["items_without_interactions"] == 1
    assert "2 of 4 items name no picture." in summary["warnings"]
    told = "The pictures of 1 of 4 items are named but do not exist. To have them, put them there, and delete"
    assert any(one.startswith(told) for one in summary["warnings"])


@pytest.mark.parametrize("source", ["table", "sequences"])
def test_pictures_that_were_moved_are_found_where_the_settings_say(source, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "pictures").mkdir(parents=True)
    (here / "pictures" / "7.png").write_bytes(b"x")
    (here / "items.csv").write_text("item_id,image\n7,pictures/7.png\n8,\n9,\n")
    log = "a 7 8 9\nb 9 8 7\n"
    if source == "table":
        log = "user_id,item_id,timestamp\na,7,1\na,8,2\na,9,3\n"
    (here / "log.csv").write_text(log)

    def config(folder: Path) -> PrepareDataConfig:
        return PrepareDataConfig(
            source=source, interactions=str(folder / "log.csv"), items=str(folder / "items.csv"),
            title_column=None, image_column="image", k_core=0,
        )  # fmt: skip

    data = prepare_data(config(here))
    there.mkdir()
    assert with_pictures_found(config(there), data).image_file(1) == here / "pictures" / "7.png"
    there.rmdir()
    here.rename(there)
    assert not data.image_file(1).is_file()
    assert with_pictures_found(config(there), data).image_file(1) == there / "pictures" / "7.png"


def test_rows_of_the_items_file_that_say_the_same_once_more_are_left_out_and_counted(tmp_path, caplog):
    items = "item_id,title,price\n7,a,1\n8,b,2\n7,a,3\n9,c,4\n10,d,5\n 7 ,a,6\n"
    data = prepare(tmp_path, SMALL, items)
    assert dict(zip(data.raw_ids, data.titles)) == {"7": "a", "8": "b", "9": "c", "10": "d"}
    assert data.summary["read"]["repeated_item_rows"] == 2
    assert data.summary["items_without_interactions"] == 0
    assert "2 rows repeat an earlier one and are left out" in caplog.text
    with pytest.raises(DataError, match="item '7' already stands in row 2, which says something else"):
        prepare(tmp_path, SMALL, items, text_columns=("price",))


def test_items_left_out_for_what_they_lack_are_counted(tmp_path):
    log = "".join(f"u{user},{item},{item}\n" for user in range(3) for item in range(6))
    items = "item_id,title,image\n" + "".join(
        f"{item},{'' if item == 2 else 'x'},p{item}.png\n" for item in range(6)
    )
    for item in range(5):
        (tmp_path / f"p{item}.png").write_bytes(b"x")
    head = "user_id,item_id,timestamp\n"
    data = prepare(tmp_path, head + log, items, image_column="image", incomplete_items="drop")
    assert data.num_items == 4
    left_out = data.summary["incomplete_items"]
    assert left_out["items"] == 2 and left_out["of_items"] == 6
    assert left_out["items_without_title"] == 1 and left_out["missing_picture_files"] == 1
    assert "2 of 6 items are left out, lacking a title or picture." in data.summary["warnings"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_users_with_just_enough_items_left_stay_where_others_are_excluded(tmp_path, mark):
    log = "".join(f"{user},{item},{item}\n" for user, items in USERS.items() for item in items)
    (tmp_path / "names.txt").write_text(f"{mark}6\n 7 \n", encoding="utf-8")
    settings = {"exclude_items": str(tmp_path / "names.txt"), "k_core": 3}
    data = prepare(tmp_path, "user_id,item_id,timestamp\n" + log, **settings)
    assert histories(data) == {"a": ["1", "2", "3"], "b": ["1", "2", "3", "4", "5"], "d": ["1", "2", "3"]}
    assert data.summary["dropped"] == {
        **{"unknown_item": 0, "duplicate": 0, "k_core": 0, "excluded_item": 7, "short_user": 4},
    }


def test_an_items_file_may_have_no_titles(tmp_path):
    data = prepare(tmp_path, SMALL, "item_id\n7\n8\n9\n10\n", title_column=None)
    assert data.titles == [""] * 4
    assert "items_without_title" not in data.summary


def test_without_an_items_file_titles_are_empty(tmp_path):
    data = prepare(tmp_path, SMALL)
    assert data.titles == [""] * 4
    assert data.image_root is None


def test_interactions_with_unknown_items_can_be_dropped(tmp_path):
    text = SMALL + "bob,404,9\nann,404,8\n"
    data = prepare(tmp_path, text, "item_id,title\n7,a\n8,b\n9,c\n10,d\n", unknown_items="drop")
    assert data.raw_ids == ["7", "8", "9", "10"]
    assert data.summary["dropped"]["unknown_item"] == 2


def test_blank_lines_byte_order_marks_and_tabs_are_read(tmp_path):
    expected = prepare(tmp_path, SMALL)
    (tmp_path / "other.tsv").write_text("\ufeff" + SMALL.replace(",", "\t").replace("\n", "\n\n"))
    config = PrepareDataConfig(source="table", interactions=str(tmp_path / "other.tsv"), k_core=0)
    assert same(prepare_data(config), expected)


@pytest.mark.parametrize("name", ["other.csv.gz", "other.TSV.GZ"])
def test_packed_tables_are_read_as_they_are(tmp_path, name):
    expected = prepare(tmp_path, SMALL)
    text = SMALL.replace(",", "\t") if "TSV" in name else SMALL
    (tmp_path / name).write_bytes(gzip.compress(("\ufeff" + text).encode()))
    config = PrepareDataConfig(source="table", interactions=str(tmp_path / name), k_core=0)
    assert same(prepare_data(config), expected)


def test_packed_sequences_are_read_as_they_are(tmp_path):
    (tmp_path / "log.txt.gz").write_bytes(gzip.compress(b"10 3 1 2\n2 5 3 5\n"))
    config = PrepareDataConfig(source="sequences", interactions=str(tmp_path / "log.txt.gz"))
    assert histories(prepare_data(config)) == {"2": ["5", "3", "5"], "10": ["3", "1", "2"]}


def test_lists_in_parquet_become_text_as_in_json_lines(tmp_path):
    items = pa.table(
        {
            "item_id": ["7", "8", "9", "10"],
            "title": ["a", "b", "c", "d"],
            "kinds": [["tea", "pots"], [], None, ["tea"]],
        }
    )
    pq.write_table(items, tmp_path / "items.parquet")
    data = prepare(tmp_path, SMALL, text_columns=("kinds",), items=str(tmp_path / "items.parquet"))
    assert data.items["kinds"].to_pylist() == ["tea|pots", "", "", "tea"]


def test_columns_that_become_no_text_are_refused_by_name_and_small_floats_are_read(tmp_path):
    table = {"item_id": ["7", "8", "9", "10"], "year": np.array([1, 2, 3, 4], np.float16)}
    pq.write_table(pa.table(table | {"about": [{"made": np.datetime64(1, "s")}] * 4}), tmp_path / "x.parquet")
    settings = {"items": str(tmp_path / "x.parquet"), "title_column": None}
    found = prepare(tmp_path, SMALL, text_columns=("year",), **settings)
    assert found.items["year"].to_pylist() == ["1", "2", "3", "4"]
    with pytest.raises(DataError, match=r"x\.parquet, column 'about' holds struct<.*none of JSON"):
        prepare(tmp_path, SMALL, text_columns=("about",), **settings)


@pytest.mark.parametrize("kind", ["text", "whole", "float", "timestamp"])
def test_parquet_gives_what_csv_gives(tmp_path, kind):
    expected = prepare(tmp_path, SMALL)
    times = pa.array([3, 1, 2, 5, 4, 6])
    if kind == "timestamp":
        times = times.cast(pa.timestamp("s"))
    item = pa.array([9, 10, 8, 10, 9, 7])
    item = {"text": item.cast(pa.large_string()), "float": item.cast(pa.float64())}.get(kind, item)
    table = pa.table({"user_id": ["ann"] * 3 + ["bob"] * 3, "item_id": item, "timestamp": times})
    pq.write_table(table, tmp_path / "log.parquet")
    config = PrepareDataConfig(source="table", interactions=str(tmp_path / "log.parquet"), k_core=0)
    assert same(prepare_data(config), expected)


def test_nanoseconds_and_fractions_of_seconds_keep_their_order(tmp_path):
    start = 1_700_000_000_000_000_000
    rows = [f"u,{item},{start + 3 - item}" for item in range(4)]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert histories(data)["u"] == ["3", "2", "1", "0"]
    assert data.timestamp[0] == start
    rows = [f"u,{item},1700000000.{3 - item}5" for item in range(4)]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert histories(data)["u"] == ["3", "2", "1", "0"]


def test_a_user_is_a_line_and_no_line_ends_within_one(tmp_path):
    """Other characters that end lines for some programs are spaces like any."""
    (tmp_path / "log.txt").write_bytes("u 1 2\x85 3\u2028 4\r\nv 1 2 3\r\n".encode())
    config = PrepareDataConfig(source="sequences", interactions=str(tmp_path / "log.txt"))
    data = prepare_data(config)
    assert data.num_users == 2 and data.num_items == 4


def test_sequences_keep_their_order_and_need_no_filter(tmp_path):
    (tmp_path / "log.txt").write_text("\n10 3 1 2\n2  5 3 5 1 \n\n")
    config = PrepareDataConfig(source="sequences", interactions=str(tmp_path / "log.txt"))
    data = prepare_data(config)
    assert data.user_raw_ids == ["2", "10"]
    assert histories(data) == {"2": ["5", "3", "5", "1"], "10": ["3", "1", "2"]}
    assert data.timestamp.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert "ties" not in data.summary and "train_after_test_rate" not in data.summary
    assert data.summary["warnings"][0].startswith("Times are places")


def test_a_global_time_split_counts_what_it_leaves_out(tmp_path):
    rows = [
        "a,1,0",
        "a,2,10",
        "a,3,60",
        "a,4,65",
        "a,5,80",
        "a,6,90",
    ]  # train x2, valid, context, test, after
    rows += ["b,1,5", "b,2,15", "b,3,85"]  # train x2, no valid target, test
    rows += ["c,1,61", "c,2,62"]  # context only
    rows += ["d,1,81", "d,2,82"]  # no history before the test period
    rows += ["e,1,1", "e,2,2", "e,3,3", "e,4,4", "e,5,5", "e,6,6", "e,7,7"]
    text = "\n".join(["user_id,item_id,timestamp", *rows])
    data = prepare(tmp_path, text, split="global_time", valid_rate=0.2, test_rate=0.25)
    assert (data.summary["valid_from"], data.summary["test_from"]) == (60, 80)
    assert histories(data)["a"] == ["1", "2", "3", "4", "5"]
    assert data.split.tolist() == [0, 0, 1, 3, 2, 0, 0, 2] + [0] * 7
    assert data.user_raw_ids == ["a", "b", "e"]
    assert data.summary["dropped"] == {
        **{"unknown_item": 0, "duplicate": 0},
        **{"after_test_item": 1, "test_without_history": 2, "context_only": 2},
    }
    assert data.train_count.sum() == 11
    assert "train_after_test_rate" not in data.summary


def test_leave_one_out_says_how_much_of_the_future_it_trains_on(tmp_path):
    rows = ["a,1,0", "a,2,1", "a,3,2", "b,1,7", "b,2,11", "b,3,12", "b,4,13", "c,1,2", "c,2,4", "c,3,7"]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    # Test times 2, 13, 7: median 7. Train times 0, 7, 11, 2: one is later.
    assert data.summary["train_after_test_rate"] == 0.25
    # The last train time is 11: tests at 2 and 7 are older.
    assert data.summary["leaking_user_rate"] == 2 / 3
    assert any("66.7% of the users" in sentence for sentence in data.summary["warnings"])
    assert any("25.0% of train interactions are later" in sentence for sentence in data.summary["warnings"])


def test_times_that_are_positions_say_nothing_about_the_future(tmp_path):
    rows = [f"u{user},{item},{item}" for user in range(3) for item in range(3 + user)]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert data.summary["times_are_positions"] is True
    data.save(tmp_path)
    assert Interactions.load(tmp_path).summary == data.summary
    assert "train_after_test_rate" not in data.summary and "ties" not in data.summary
    places, few = data.summary["warnings"]
    assert places.startswith("Times are places in a user's history, so two things cannot be measured")
    assert few == "Only 3 test items: too few to tell methods apart."
    with pytest.raises(DataError, match=r"no two are equal and prepare_data\.ties=shuffle has nothing to"):
        prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]), ties="shuffle")


def test_the_result_survives_saving_and_loading(tmp_path):
    data = prepare(tmp_path, SMALL, "item_id,title\n7,a\n8,b\n9,c\n10,d\n")
    (tmp_path / "stage").mkdir()
    data.save(tmp_path / "stage")
    loaded = Interactions.load(tmp_path / "stage")
    assert same(loaded, data)
    assert loaded.summary == data.summary


def test_the_summary_names_the_files_by_hash(tmp_path):
    files = prepare(tmp_path, SMALL).summary["files"]
    assert files["interactions"]["name"] == "log.csv"
    assert files["interactions"]["bytes"] == len(SMALL)
    assert len(files["interactions"]["sha256"]) == 64


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_texts_of_parquet_files_may_have_any_of_their_types(kind, tmp_path):
    (tmp_path / "log.csv").write_text(SMALL)
    wanted = prepare(tmp_path, SMALL)

    def typed(values: list[str]) -> pa.Array:
        made = pa.array(values)
        return made.dictionary_encode() if kind == "dictionary" else made.cast(getattr(pa, kind)())

    rows = [line.split(",") for line in SMALL.split()[1:]]
    table = {
        "user_id": typed([user for user, _, _ in rows]),
        "item_id": typed([item for _, item, _ in rows]),
        "timestamp": typed([f"2011-10-18T00:00:{int(time):02d}Z" for _, _, time in rows]),
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    found = prepare_data(
        PrepareDataConfig(source="table", interactions=str(tmp_path / "log.parquet"), k_core=0)
    )
    assert histories(found) == histories(wanted)
    assert found.timestamp.min() == 1318896001


def test_positions_in_place_of_times_are_seen_though_a_row_stands_twice(tmp_path):
    log = "user_id,item_id,timestamp\n" + "".join(
        f"u{u},i{(u + t) % 5},{t}\n" for u in range(4) for t in range(4)
    )
    for text in (log, log + "u0,i0,0\n"):
        data = prepare(tmp_path, text)
        assert data.summary["times_are_positions"] and "train_after_test_rate" not in data.summary


@pytest.mark.parametrize("starts", [(100, 101, 102), (5, 5, 9)])
def test_times_that_begin_otherwise_for_other_users_are_times(tmp_path, starts):
    rows = [f"u{user},{place},{start + place}" for user, start in enumerate(starts) for place in range(4)]
    data = prepare(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]))
    assert data.summary["times_are_positions"] is False and "ties" in data.summary


def test_users_with_one_interaction_each_do_not_make_one_time_a_position(tmp_path):
    log = "user_id,item_id,timestamp\n" + "".join(f"u{user},{user % 2},7\n" for user in range(6))
    with pytest.raises(DataError, match=r"at 7 and 7 leaves 0 train"):
        prepare(tmp_path, log, split="global_time")


def test_a_leak_is_told_though_the_median_test_item_is_the_latest(tmp_path):
    times = [(0, 1, 2), (3, 90, 91), (4, 92, 93)]
    log = "".join(
        f"u{user},i{place},{time}\n" for user, row in enumerate(times) for place, time in enumerate(row)
    )
    data = prepare(tmp_path, "user_id,item_id,timestamp\n" + log)
    assert data.summary["train_after_test_rate"] == 0 and data.summary["leaking_user_rate"] == 1 / 3
    assert any("33.3% of the users have a test item older" in text for text in data.summary["warnings"])
