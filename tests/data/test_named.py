"""Data sets by name, on the Hub, and with pictures behind addresses, all from this machine."""

import dataclasses
import functools
import gzip
import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_server import serving
from PIL import Image

from llmrec.data import items, named, prepare
from llmrec.data.config import PrepareDataConfig
from llmrec.data.hub import read_hub, warnings_of_address
from llmrec.data.pictures import PictureLimits
from llmrec.data.prepare import prepare_data
from llmrec.errors import ConfigError, DataError, StaleArtifactError
from llmrec.pipeline import RunDir
from llmrec.stage_changes import changes_of, describe_stage
from llmrec.stages import STAGES

ITEMS = [f"B{number:03d}" for number in range(20)]
FEW = ["B001", "B003", "B005", "B002", "B004"]


def png():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def server():
    """A category of the 2014 release: 30 users, 20 items, one without a title and two without pictures."""
    with serving({"red.png": png()}) as found:
        rng = np.random.default_rng(0)
        reviews = [
            {"reviewerID": f"A{user}", "asin": item, "overall": 5.0, "unixReviewTime": 10**9 + 60 * place}
            for user in range(30)
            for place, item in enumerate(rng.permutation(ITEMS)[:12] if user < 28 else FEW)
        ]
        reviews.append(reviews[0] | {"asin": "B999"})  # which the metadata lack
        meta = [
            {"asin": item, "title": f"Item {item}", "brand": "O'Neil", "categories": [["Beauty", "Hair"]]}
            | {"imUrl": found.url(f"/good/red.png?{item}")}
            for item in ITEMS
        ]
        del meta[3]["title"]
        meta[5]["imUrl"] = found.url("/missing/red.png")
        del meta[7]["imUrl"]
        meta[8]["imUrl"] = [found.url("/good/red.png"), found.url("/missing/red.png")]
        found.content |= {
            "reviews_Beauty_5.json.gz": gzip.compress("\n".join(map(json.dumps, reviews)).encode()),
            "meta_Beauty.json.gz": gzip.compress("\n".join(map(str, meta)).encode()),  # Python literals
        }
        yield found


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    """Pictures on this machine are private addresses."""
    monkeypatch.setattr(items, "PICTURE_LIMITS", PictureLimits(public_only=False, retries=0))


def config(server, folder, **changes):
    return PrepareDataConfig(
        source="amazon_2014",
        category="beauty",
        folder=str(folder),
        mirrors=(server.url("/good"),),
        **changes,
    )


def test_a_category_by_name_is_fetched_once_and_read_as_it_is(server, tmp_path):
    made = prepare_data(config(server, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta_Beauty.json.gz",
        "reviews_Beauty_5.json.gz",
    ]
    assert (made.num_users, made.num_items) == (30, 20)
    assert made.summary["dropped"]["unknown_item"] == 1
    assert made.items["brand"][0].as_py() == "O'Neil" and made.items["categories"][0].as_py() == "Beauty|Hair"
    (warning,) = [text for text in made.summary["warnings"] if text.startswith("Beauty")]
    assert "30 / 20 / 346 and 22,363 / 12,101 / 198,502 here and in the classic 5-core file" in warning
    asked = len(server.asked)
    again = prepare_data(config(server, tmp_path, offline=True))
    assert len(server.asked) == asked and np.array_equal(again.item, made.item)
    with pytest.raises(DataError, match=r"may not be fetched \(offline\)"):
        prepare_data(config(server, tmp_path / "elsewhere", offline=True))


def test_files_of_a_category_belong_to_what_was_made_from_them_though_they_were_fetched(server, tmp_path):
    run = RunDir(tmp_path / "run")
    asked = config(server, tmp_path)
    run.stage(STAGES["prepare_data"], asked)
    run.stage(STAGES["prepare_data"], asked)
    reviews = tmp_path / "reviews_Beauty_5.json.gz"
    fewer = gzip.decompress(reviews.read_bytes()).splitlines()[12:]
    reviews.write_bytes(gzip.compress(b"\n".join(fewer)))
    with pytest.raises(StaleArtifactError, match=r"other content of the reviews_Beauty_5\.json\.gz file"):
        run.stage(STAGES["prepare_data"], asked)


def test_a_password_of_a_mirror_is_not_written_down_and_may_change(tmp_path):
    first, second = (
        PrepareDataConfig(
            source="amazon_2014",
            category="beauty",
            folder=str(tmp_path),
            mirrors=(f"https://ann:{word}@mirror.example/data?token={word}",),
        )
        for word in ("s3cret", "0ther")
    )
    made = describe_stage("prepare_data", first, ())
    assert made["config"]["mirrors"] == ["https://[hidden]@mirror.example/data?[hidden]"]
    assert changes_of(made, second, {}) == []


def test_expected_counts_do_not_warn(server, tmp_path, monkeypatch):
    exact = dataclasses.replace(named.CATEGORIES["beauty"], classic=(30, 20, 346))
    monkeypatch.setitem(named.CATEGORIES, "beauty", exact)
    made = prepare_data(config(server, tmp_path))
    assert not any(text.startswith("Beauty") for text in made.summary["warnings"])


def test_no_counts_are_expected_of_other_filters(server, tmp_path):
    (tmp_path / "names.txt").write_text("B001\n")
    for changes in ({"k_core": 4}, {"min_rating": 5.0}, {"exclude_items": str(tmp_path / "names.txt")}):
        made = prepare_data(config(server, tmp_path / "files", **changes))
        assert not any(text.startswith("Beauty") for text in made.summary["warnings"])
        assert made.items.column_names[1:4] == ["title", "brand", "categories"]
    with pytest.raises(DataError, match=r"dropped by unknown_item: 1, low_rating: 346\)"):
        prepare_data(config(server, tmp_path / "files", min_rating=5.5))


def test_expected_counts_are_those_before_a_split_in_time_leaves_interactions_out(
    server, tmp_path, monkeypatch
):
    exact = dataclasses.replace(named.CATEGORIES["beauty"], classic=(30, 20, 346))
    monkeypatch.setitem(named.CATEGORIES, "beauty", exact)
    made = prepare_data(config(server, tmp_path, split="global_time", valid_rate=0.2, test_rate=0.2))
    assert len(made.item) < 346
    assert not any(text.startswith("Beauty") for text in made.summary["warnings"])


def test_pictures_are_fetched_for_the_items_that_stay(server, tmp_path):
    made = prepare_data(config(server, tmp_path, image_folder=str(tmp_path / "pictures")))
    assert made.items["image_path"].null_count == 2
    assert made.image_file(1).read_bytes() == png()
    assert made.summary["items_without_picture_address"] == 1 and made.summary["pictures_not_fetched"] == 1
    assert made.summary["pictures_that_may_come"] == 0
    assert "The pictures of 1 of 20 items could not be fetched." in made.summary["warnings"]
    status = pq.read_table(tmp_path / "pictures" / "status.parquet")
    assert sorted(set(status["status"].to_pylist())) == ["ok", "refused"] and status.num_rows == 19


def test_incomplete_items_go_and_then_users_with_too_few_left(server, tmp_path):
    pictures = str(tmp_path / "pictures")
    made = prepare_data(config(server, tmp_path, image_folder=pictures, incomplete_items="drop"))
    assert set(ITEMS) - set(made.raw_ids) == {"B003", "B005", "B007"}
    assert made.num_users == 28 and np.diff(made.offset).min() >= 5
    assert made.summary["dropped"]["short_user"] == 6
    assert made.summary["incomplete_items"] == {
        **{"items": 3, "of_items": 20, "items_without_title": 1},
        **{"items_without_picture_address": 1, "pictures_not_fetched": 1, "pictures_that_may_come": 0},
    }


def test_pictures_that_may_come_are_told_since_they_decide_which_items_stay(server, tmp_path):
    prepare_data(config(server, tmp_path))  # the tables alone
    offline = {"image_folder": str(tmp_path / "pictures"), "offline": True}
    kept = prepare_data(config(server, tmp_path, **offline))
    assert kept.summary["pictures_that_may_come"] == 19
    with pytest.raises(DataError, match="no interaction is left"):
        prepare_data(config(server, tmp_path, **offline, incomplete_items="drop"))
    assert any("19 pictures were not to be had now but may come" in text for text in kept.summary["warnings"])


def test_pictures_that_may_come_are_told_where_their_items_are_left_out(server, tmp_path):
    pictures = tmp_path / "pictures"
    made = prepare_data(config(server, tmp_path, image_folder=str(pictures)))
    (pictures / made.items["image_path"][0].as_py()).unlink()
    settings = {"image_folder": str(pictures), "offline": True, "incomplete_items": "drop"}
    again = prepare_data(config(server, tmp_path, **settings))
    assert again.summary["incomplete_items"]["items"] == 4 and made.raw_ids[0] not in again.raw_ids
    assert any(text.startswith("1 pictures were not to be had now") for text in again.summary["warnings"])


def test_excluded_items_must_exist(server, tmp_path):
    (tmp_path / "names.txt").write_text("B001\n\nB002\nnobody\n")
    made = prepare_data(config(server, tmp_path, exclude_items=str(tmp_path / "names.txt")))
    assert set(ITEMS) - set(made.raw_ids) == {"B001", "B002"}
    (tmp_path / "names.txt").write_text("nobody\n")
    for text, message in (("names.txt", "none of its 1 ids is an item here"), ("absent", "no such file")):
        with pytest.raises(DataError, match=message):
            prepare_data(config(server, tmp_path, exclude_items=str(tmp_path / text)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "amazon_2014", "folder": "x"}, "category must be set"),
        ({"source": "amazon_2014", "category": "beauty"}, "folder must be set"),
        (
            {"source": "amazon_2014", "category": "beauty", "folder": "x", "items": "y"},
            "items has no effect with",
        ),
        ({"source": "table", "interactions": "x", "folder": "y"}, "folder has no effect with"),
        ({"source": "table", "interactions": "x", "offline": True}, "offline has no effect with nothing"),
        (
            {"source": "table", "interactions": "x", "items": "y", "image_url_column": "u"},
            "image_url_column and prepare_data.image_folder must be given together",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"prepare_data.{message}"):
        PrepareDataConfig(**settings)


def test_a_folder_of_parquet_files_is_a_data_set_too(tmp_path):
    rng = np.random.default_rng(0)
    rows = {"who": [], "what": [], "when": []}
    for user in range(12):
        for place, item in enumerate(rng.permutation(ITEMS)[:12]):
            rows["who"].append(f"u{user}")
            rows["what"].append(str(item))
            rows["when"].append(place)
    table = pa.table({**rows, "review": ["long text"] * len(rows["who"])})
    (tmp_path / "set").mkdir()
    pq.write_table(table.slice(0, 70), tmp_path / "set" / "train-0.parquet")
    pq.write_table(table.slice(70), tmp_path / "set" / "train-1.parquet")
    settings = {"user_column": "who", "item_column": "what", "timestamp_column": "when"}
    address = f"hub:{tmp_path / 'set'}"
    made = prepare_data(PrepareDataConfig(source="table", interactions=address, **settings))
    pq.write_table(table, tmp_path / "all.parquet")
    plain = prepare_data(
        PrepareDataConfig(source="table", interactions=str(tmp_path / "all.parquet"), **settings)
    )
    assert np.array_equal(made.item, plain.item) and made.raw_ids == plain.raw_ids
    assert made.summary["warnings"] == plain.summary["warnings"]
    (unpinned,) = warnings_of_address("hub:ann/set:small:full")
    assert "hub:ann/set:small:full is read as it is now; with hub:ann/set@COMMIT the same" in unpinned
    assert not warnings_of_address("hub:ann/set@0123abc:small")
    for text, message in (
        (f"{address}:default:nothing", r"cannot be read"),
        ("hub:", r"is not of the form hub:NAME"),
        (f"hub:{tmp_path / 'absent'}", r"cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_data(PrepareDataConfig(source="table", interactions=text, **settings))
    with pytest.raises(DataError, match=r"has no column 'user'; it has: who, what, when, review"):
        prepare_data(
            PrepareDataConfig(source="table", interactions=address, **{**settings, "user_column": "user"})
        )


def test_csv_files_of_a_data_set_are_read_as_a_csv_file_is(tmp_path, monkeypatch):
    names = [f"{number:03d}" for number in range(8)]
    log = "".join(
        f"{user:02d},{item},{10**9 + 60 * user + n}\n" for user in range(9) for n, item in enumerate(names)
    )
    items = "item_id,title\n" + "".join(f"{item},NA\n" for item in names)
    made = []
    for folder in ("log", "items"):
        (tmp_path / folder).mkdir()
    (tmp_path / "log" / "train.csv").write_text("user_id,item_id,timestamp\n" + log)
    (tmp_path / "items" / "train.csv").write_text(items)
    # As of data sets on the Hub: a local folder is looked at, and not warned of.
    monkeypatch.setattr(prepare, "warnings_of_address", lambda address: [f"{address} may change"])
    for form in ("hub:{}", "{}/train.csv"):
        paths = {"interactions": "log", "items": "items"}
        paths = {name: form.format(tmp_path / folder) for name, folder in paths.items()}
        made.append(prepare_data(PrepareDataConfig(source="table", k_core=0, **paths)))
    hub, plain = made
    changing = [text for text in hub.summary["warnings"] if text.endswith(" may change")]
    assert changing == [f"hub:{tmp_path / name} may change" for name in ("log", "items")]
    assert hub.raw_ids == plain.raw_ids == names and hub.user_raw_ids == plain.user_raw_ids
    assert hub.titles == plain.titles == ["NA"] * 8
    assert np.array_equal(hub.item, plain.item) and np.array_equal(hub.timestamp, plain.timestamp)


def test_a_data_set_is_read_at_the_commit_that_is_named(tmp_path, monkeypatch):
    """As a folder's, to which commits mean nothing."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("item_id\n007\n")
    asked = []

    def recorded(function, *args, revision=None, **options):
        asked.append(revision)
        return function(*args, **options)

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, functools.partial(recorded, getattr(datasets, name)))
    assert read_hub(f"hub:{tmp_path / 'set'}@0123abc", ["item_id"])["item_id"].to_pylist() == ["007"]
    assert asked == ["0123abc"] * 3


def test_of_several_splits_one_must_be_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"item_id\n{split}\n")
    with pytest.raises(DataError, match=r"has the splits train, test; name one as hub:NAME:CONFIG:SPLIT"):
        read_hub(f"hub:{tmp_path}", ["item_id"])
    assert read_hub(f"hub:{tmp_path}::test", ["item_id"])["item_id"].to_pylist() == ["test"]


def test_a_data_set_with_a_script_is_not_run(tmp_path):
    (tmp_path / "set").mkdir()
    marker = tmp_path / "ran"
    (tmp_path / "set" / "set.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(DataError, match=r"cannot be read"):
        prepare_data(PrepareDataConfig(source="table", interactions=f"hub:{tmp_path / 'set'}"))
    assert not marker.exists()
