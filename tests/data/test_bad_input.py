"""Every kind of bad data file: one line that says where it is and what to do."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.config import PrepareDataConfig
from llmrec.data.prepare import prepare_data
from llmrec.errors import DataError

HEAD = "user_id,item_id,timestamp\n"
GOOD = HEAD + "a,1,1\na,2,2\na,3,3\n"
ITEMS = "item_id,title\n1,one\n2,two\n3,three\n"

# name: interactions file, items file or None, settings, words of the message
BAD_TABLES: dict[str, tuple[str | bytes, str | None, dict, list[str]]] = {
    "column missing": (
        GOOD.replace("timestamp", "timestmp"),
        None,
        {},
        ["log.csv", "no column 'timestamp'", "did you mean 'timestmp'?", "user_id, item_id, timestmp"],
    ),
    "column named twice": (GOOD.replace("item_id", "user_id"), None, {}, ["2 columns named 'user_id'"]),
    "other separator": (
        GOOD.replace(",", "|"),
        None,
        {},
        ["no column 'user_id'", "columns must be separated by ','"],
    ),
    "empty file": (b"", None, {}, ["log.csv is empty", "header"]),
    "header alone": (HEAD, None, {}, ["log.csv has no rows of data"]),
    "header without line end": (HEAD.strip(), None, {}, ["log.csv has no rows of data"]),
    "text as time": (
        GOOD + "b,1,yesterday\n",
        None,
        {},
        ["log.csv, row 5, column 'timestamp': 'yesterday' is no time; expected a number"],
    ),
    "text as ISO 8601 time": (
        HEAD + "a,1,2011-10-18\na,2,2011-10-19\na,3,yesterday\na,4,2011-10-20\n",
        None,
        {},
        ["row 4, column 'timestamp': 'yesterday' is no time as those before it; expected", "or ISO 8601"],
    ),
    "no such day": (
        HEAD + "a,1,2011-10-18\na,2,2011-02-30\n",
        None,
        {},
        ["row 3, column 'timestamp': '2011-02-30' is no time as those before it"],
    ),
    "zone in some rows": (
        HEAD + "a,1,2011-10-18T00:00:00\na,2,2011-10-18T00:00:00Z\n",
        None,
        {},
        ["row 3, column 'timestamp': '2011-10-18T00:00:00Z'", "with a zone in every row or in none"],
    ),
    "a time of day alone": (
        HEAD + "a,1,2011-10-18T00:00:00\na,2,12:30\n",
        None,
        {},
        ["row 3, column 'timestamp': '12:30' is no time as those before it"],
    ),
    "another form of times than was named": (
        HEAD + "a,1,18.10.2011\na,2,10/19/2011\n",
        None,
        {"timestamp_format": "%d.%m.%Y"},
        ["row 3, column 'timestamp': '10/19/2011' is no time as", "='%d.%m.%Y' has it, such as '01.05.2012'"],
    ),
    "no time": (
        GOOD + "b,1,\n",
        None,
        {},
        ["log.csv, row 5, column 'timestamp': '' is no time; expected a number"],
    ),
    "infinite time": (
        GOOD + "b,1,inf\n",
        None,
        {},
        ["row 5, column 'timestamp': 'inf' is no time; expected a number"],
    ),
    "time too large": (GOOD + "b,1,1e30\n", None, {}, ["row 5, column 'timestamp'", "too large for a time"]),
    "text as rating": (
        "user_id,item_id,timestamp,stars\na,1,1,5\na,2,2,good\n",
        None,
        {"rating_column": "stars", "min_rating": 3},
        ["row 3, column 'stars': 'good' is not a number"],
    ),
    "empty user": (GOOD + ",4,4\n", None, {}, ["log.csv, row 5, column 'user_id': empty, expected an id"]),
    "missing value as user": (
        GOOD + "NaN,4,4\n",
        None,
        {},
        ["row 5, column 'user_id': 'NaN', expected an id"],
    ),
    "empty item": (GOOD + "a, ,4\n", None, {}, ["row 5, column 'item_id'", "delete the row or fill it in"]),
    "row after blank lines": (
        GOOD + "\n\nb,1,x\n",
        None,
        {},
        ["log.csv, row 7, column 'timestamp': 'x' is no time; expected a number"],
    ),
    "short row": (GOOD + "b,1\n", None, {}, ["log.csv, row 5: 2 columns, expected 3 as in the header"]),
    "long row": (GOOD + "b,1,2,3\n", None, {}, ["log.csv, row 5: 4 columns, expected 3", "quotes"]),
    "not UTF-8": (GOOD.encode() + b"b\xe9,1,1\n", None, {}, ["log.csv, row 5: byte 0xe9 is not UTF-8"]),
    "not UTF-8 in the header": (
        b"user\xff_id,item_id\n",
        None,
        {},
        ["log.csv, row 1: byte 0xff is not UTF-8"],
    ),
    "unknown item": (
        GOOD + "b,9,1\nc,9,1\n",
        ITEMS,
        {},
        ["log.csv, row 5: item '9' is not in", "items.csv", "2 such", "prepare_data.unknown_items=drop"],
    ),
    "item with two rows": (
        GOOD,
        ITEMS + "2,again\n",
        {},
        ["items.csv, row 5, column 'item_id': item '2' already stands in row 3", "keep one row per item"],
    ),
    "item with two rows, one of which is a copy": (
        GOOD,
        ITEMS + "1,one\n\n2,again\n",
        {},
        ["items.csv, row 7, column 'item_id': item '2' already stands in row 3", "(1 rows too many)"],
    ),
    "item without id": (GOOD, ITEMS + ",nothing\n", {}, ["items.csv, row 5, column 'item_id': empty"]),
    "title column missing": (
        GOOD,
        ITEMS.replace("title", "titles"),
        {},
        ["items.csv", "did you mean 'titles'? It has: item_id"],
    ),
    "image column missing": (GOOD, ITEMS, {"image_column": "image"}, ["no column 'image'; it has: item_id"]),
    "text column missing": (GOOD, ITEMS, {"text_columns": ("brand",)}, ["items.csv has no column 'brand'"]),
    "items file empty": (GOOD, "", {}, ["items.csv is empty"]),
    "users too short": (
        GOOD + "b,1,1\nb,2,2\nc,1,1\n",
        None,
        {},
        ["2 of 3 users", "fewer than 3", "the first is 'b' with 2", "prepare_data.k_core=3 (or more)"],
    ),
    "unknown item that is written otherwise": (
        HEAD + "a,1.0,1\na,2.0,2\nb,1.0,3\n",
        "item_id,title\n1,x\n2,y\n",
        {},
        ["row 2: item '1.0' is not in", "'1' is: write ids alike in both files"],
    ),
    "unknown item with accents as characters of their own": (
        HEAD + "a,cafe\u0301,1\na,2,2\n",
        "item_id,title\ncaf\u00e9,x\n2,y\n",
        {},
        ["row 2: item 'cafe\u0301' is not in", "'caf\\xe9' is: write ids alike in both files"],
    ),
    "nothing left": (GOOD, None, {"k_core": 5}, ["no interaction is left of 3", "k_core: 3", "lower"]),
    "positions as global time": (GOOD, None, {"split": "global_time"}, ["column 'timestamp'", "real times"]),
    "one moment as global time": (
        HEAD + "a,1,7\na,2,7\nb,1,7\n",
        None,
        {"split": "global_time"},
        ["0 train, 0 valid and 0 test", "valid_rate or test_rate"],
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused_in_one_line(tmp_path, name, packed):
    interactions, items, settings, words = BAD_TABLES[name]
    content = interactions if isinstance(interactions, bytes) else interactions.encode()
    file = tmp_path / ("log.csv.gz" if packed else "log.csv")
    file.write_bytes(gzip.compress(content) if packed else content)
    words = [word.replace("log.csv", file.name) for word in words]
    if items is not None:
        (tmp_path / "items.csv").write_text(items)
        settings = {**settings, "items": str(tmp_path / "items.csv")}
    refused(file, words, source="table", **{"k_core": 0} | settings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["log.txt is empty", "user item item"]),
        (b"\n \n", ["log.txt is empty"]),
        (b"1 2 3 4\n\n2\n", ["log.txt, row 3: user '2' has no items"]),
        (b"1 2 3 4\n2 1 2 3\n1 5 6 7\n", ["log.txt, row 3: user '1' already stands in row 1"]),
        (b"1 2 3 4\n2 \xff 3\n", ["log.txt, row 2: byte 0xff is not UTF-8"]),
        (b"1 2 3 4\n2 1 3\n", ["1 of 2 users", "the first is '2' with 2"]),
        (b"u1,b2,b3,b4\n", ["row 1: user 'u1,b2,b3,b4' has no items", "put spaces in place of ','"]),
    ],
)
def test_bad_sequences_are_refused_in_one_line(tmp_path, content, words):
    (tmp_path / "log.txt").write_bytes(content)
    refused(tmp_path / "log.txt", words, source="sequences")


def test_files_that_are_not_there_or_not_tables_are_refused(tmp_path):
    refused(tmp_path / "log.csv", ["log.csv: no such file"], source="table")
    refused(tmp_path / "log.txt", ["log.txt: no such file"], source="sequences")
    for source in ("table", "sequences"):
        refused(tmp_path, ["is a folder; give one file, such as"], source=source)
    (tmp_path / "log.csv").write_bytes(gzip.compress(GOOD.encode()))
    refused(tmp_path / "log.csv", ["log.csv is packed; let its name end in .gz"], source="table")
    (tmp_path / "log.xlsx").write_bytes(b"x")
    refused(tmp_path / "log.xlsx", ["unknown kind of file, expected .csv, .tsv"], source="table")
    (tmp_path / "log.parquet").write_bytes(b"PAR1 but no more of it")
    refused(tmp_path / "log.parquet", ["log.parquet cannot be read as parquet"], source="table")


@pytest.mark.parametrize(("name", "source"), [("log.csv.gz", "table"), ("log.txt.gz", "sequences")])
def test_a_packed_file_that_is_cut_is_refused(tmp_path, name, source):
    rows = [f"u{n % 70},{n % 90},{n * 7919 % 10007}" for n in range(3000)]
    packed = gzip.compress("\n".join(["user_id,item_id,timestamp", *rows]).encode())
    for size in (5, len(packed) // 2, len(packed) - 3):
        (tmp_path / name).write_bytes(packed[:size])
        refused(tmp_path / name, [name, "is cut or damaged", "get the file again"], source=source)


def test_a_parquet_row_is_counted_from_the_first_row_of_data(tmp_path):
    table = pa.table({"user_id": ["a", None], "item_id": [1, 2], "timestamp": [1, 2]})
    pq.write_table(table, tmp_path / "log.parquet")
    refused(tmp_path / "log.parquet", ["row 2, column 'user_id': empty"], source="table")
    table = pa.table({"user_id": ["a", "b"], "item_id": [1.0, float("nan")], "timestamp": [1, 2]})
    pq.write_table(table, tmp_path / "log.parquet")
    refused(tmp_path / "log.parquet", ["row 2, column 'item_id': empty"], source="table")
    table = pa.table({"user_id": ["a", "b"], "item_id": [1, 2], "timestamp": [1, None]})
    pq.write_table(table, tmp_path / "log.parquet")
    refused(tmp_path / "log.parquet", ["row 2, column 'timestamp': None is no time"], source="table")
    table = pa.table({"user_id": ["a", "b"], "item_id": [[1], [2, 3]], "timestamp": [1, 2]})
    pq.write_table(table, tmp_path / "log.parquet")
    refused(tmp_path / "log.parquet", ["column 'item_id' holds list", "expected ids"], source="table")


def refused(path: Path, words: list[str], **settings) -> None:
    with pytest.raises(DataError) as caught:
        prepare_data(PrepareDataConfig(interactions=str(path), **settings))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
