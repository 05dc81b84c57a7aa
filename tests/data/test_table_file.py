"""Tables in the forms that the field has them: RecBole's files, files without a header, without times."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data import table_file
from llmrec.data.config import PrepareDataConfig
from llmrec.data.prepare import prepare_data
from llmrec.data.sources import places
from llmrec.data.table_file import TableFile
from llmrec.errors import ConfigError, DataError
from llmrec.interactions import Interactions

ROWS = [(user, f"i{item}", 5, 100 * user + item) for user in range(3) for item in range(6)]


def lines(mark: str, rows=ROWS, columns=(0, 1, 2, 3)) -> str:
    return "".join(mark.join(str(row[column]) for column in columns) + "\n" for row in rows)


def prepared(path: Path, **settings) -> Interactions:
    return prepare_data(PrepareDataConfig(source="table", interactions=str(path), k_core=0, **settings))


def told(data: Interactions) -> list[tuple[str, str, int]]:
    """Raw user, raw item and time of every row."""
    user = np.repeat(np.arange(data.num_users), np.diff(data.offset))
    return [
        (data.user_raw_ids[u], data.raw_ids[i - 1], int(t))
        for u, i, t in zip(user, data.item, data.timestamp)
    ]


EXPECTED = [(str(user), item, time) for user, item, _, time in ROWS]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_atomic_files_of_recbole_are_read_as_they_are(ending, tmp_path):
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    content = (head + lines("\t")).encode()
    path = tmp_path / f"shop.inter{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    items = tmp_path / "shop.item"
    items.write_text(
        "item_id:token\ttitle:token_seq\tgenre:token_seq\n"
        + "".join(f"i{n}\tThe {n}th\tred\n" for n in range(6))
    )
    data = prepared(path, items=str(items), text_columns=("genre",), rating_column="rating", min_rating=4.0)
    assert told(data) == EXPECTED
    assert data.titles[2] == "The 2th" and data.items["genre"].to_pylist() == ["red"] * 6
    broken = content.replace(b"2\ti3", b"2\t", 1)
    path.write_bytes(gzip.compress(broken) if ending else broken)
    with pytest.raises(DataError, match=r"shop\.inter.*, row 17, column 'item_id': empty, expected an id"):
        prepared(path)


def test_quotes_are_letters_in_atomic_files(tmp_path):
    path = tmp_path / "x.item"
    path.write_text('item_id:token\tname:token_seq\n1\t"Alien\n2\t"Great" Cats\n3\tthe "end\n')
    assert TableFile(path).read(["item_id", "name"]).to_pydict() == {
        "item_id": ["1", "2", "3"], "name": ['"Alien', '"Great" Cats', 'the "end'],
    }  # fmt: skip
    assert [TableFile(path).row(index) for index in range(3)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("name", "mark"), [("x.tsv", "\t"), ("x.csv", ","), ("x.csv", ";"), ("x.txt", "|"), ("x.data.gz", "\t")]
)
def test_quotes_that_would_swallow_lines_are_letters(name, mark, tmp_path, caplog):
    """Two titles with a lone quote in front: what stood between them was one title, and its items gone."""
    path = tmp_path / name

    def write(text: str) -> None:
        content = text.replace("\t", mark).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    write('id\tname\tkind\n1\t"Alien\ta\n\n2\t"Great" Cats\tb\n3\t"end\tc\n4\tx\td\n')
    assert TableFile(path).read(["id", "name"]).to_pydict() == {
        "id": ["1", "2", "3", "4"], "name": ['"Alien', '"Great" Cats', '"end', "x"],
    }  # fmt: skip
    assert "read as letters" in caplog.text
    assert [TableFile(path).row(index) for index in range(4)] == [2, 4, 5, 6]
    write('id\tname\n1\t"never closed\n2\tx\n')
    assert TableFile(path).read(["name"]).to_pydict() == {"name": ['"never closed', "x"]}


@pytest.mark.parametrize("rest", ["", "\n" + "4,d\n" * 50_000])
def test_a_quote_that_never_ends_does_not_swallow_the_rest(rest, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('id,name\n1,"a, ""b"""\n2,"two\nlines"\n3,"c\n4,d' + rest)
    with pytest.raises(DataError, match=r'x\.csv, row 4: a "quote" begins and never ends'):
        TableFile(path).read(["id"])
    path.write_text('id,name\n1,"a, ""b"""\n2,"two\nlines"\n3,12" wide\n4,"d"')
    assert TableFile(path).read(["name"])["name"].to_pylist() == ['a, "b"', "two\nlines", '12" wide', "d"]


def test_bytes_that_are_no_text_are_named_beside_quotes(tmp_path):
    path = tmp_path / "x.csv"
    for row, number in itertools.product((b'2,"caf\xe9', b'2,"caf\xe9"', b"2,caf\xe9"), (1, 100_000)):
        path.write_bytes(b"id,name\n" + b'1,"x"\n' * number + row + b"\n3,y\n")
        with pytest.raises(DataError, match=rf"x\.csv, row {number + 2}: byte 0xe9 is not UTF-8"):
            TableFile(path).read(["name"])


def test_quotes_hold_values_together_where_lines_are_not_rows_without_them(tmp_path, caplog):
    path = tmp_path / "x.tsv"
    path.write_text('id\tname\n1\t"two\nlines"\n2\t"a ""b"" c"\n3\t"tab\there"\n')
    assert TableFile(path).read(["name"]).to_pydict() == {"name": ["two\nlines", 'a "b" c', "tab\there"]}
    path.write_text('id\tname\n1\t"two\nlines\tand a tab"\n2\tx\n')  # lines are rows without quotes, too
    assert TableFile(path).read(["name"]).to_pydict() == {"name": ["two\nlines\tand a tab", "x"]}
    path.write_text('id\tname\n1\t"a ""b"" c"\n2\t"d"\n')
    assert TableFile(path).read(["name"]).to_pydict() == {"name": ['a "b" c', "d"]}
    assert not caplog.text


@pytest.mark.parametrize(("name", "mark"), [("x.csv", ","), ("x.csv", ";"), ("x.tsv", "\t"), ("x.gz", "|")])
def test_names_of_columns_may_stand_in_quotes_as_all_values_do(name, mark, tmp_path, caplog):
    path, rows = (
        tmp_path / name.replace(".gz", ".txt.gz"),
        [("", "id", "a name"), ("1", "7", "tea, pot"), ("2", "8", 'a ""b""')],
    )
    content = "\n".join(mark.join(f'"{value}"' for value in row) for row in rows).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = TableFile(path).read(["id", "a name"]).to_pydict()
    assert found == {"id": ["7", "8"], "a name": ["tea, pot", 'a "b"']} and not caplog.text


NAMES = ("user_id", "item_id", "rating", "timestamp")


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("u.data", "\t"), ("u.txt", " "), ("u.txt", "|"), ("u.txt", ","), ("u.csv", ","), ("u.tsv", "\t"),
        ("u.dat", "::"),
    ],
)  # fmt: skip
def test_files_without_a_header_are_read_by_the_names_that_are_given(name, mark, tmp_path):
    path = tmp_path / name
    path.write_text(lines(mark))
    assert told(prepared(path, column_names=NAMES)) == EXPECTED
    path.write_text(lines(mark, [*ROWS[:4], ("", "i1", 5, 4), *ROWS[4:]]))
    with pytest.raises(DataError, match=rf"{name}, row 5, column 'user_id': empty"):
        prepared(path, column_names=NAMES)
    path.write_text("\n" + lines(mark, [*ROWS[:4], (7, "i1", 5, "late"), *ROWS[4:]]))
    with pytest.raises(DataError, match=rf"{name}, row 6, column 'timestamp': 'late'"):
        prepared(path, column_names=NAMES)


def test_a_first_row_of_data_is_pointed_out_where_names_are_missing(tmp_path):
    path = tmp_path / "u.csv"
    path.write_text(lines(","))
    with pytest.raises(
        DataError, match=r"its first row \(0, i0, 5, 0\) looks like data.*column_names=user_id"
    ):
        prepared(path)
    with pytest.raises(DataError, match=r"row 1: 4 columns, but prepare_data.column_names names 3"):
        prepared(path, column_names=("user_id", "item_id", "timestamp"))
    path.write_text("user,item,when\n1,2,3\n")
    with pytest.raises(DataError, match=r"u.csv has no column 'user_id'; did you mean 'user'\? It has: user"):
        prepared(path)


@pytest.mark.parametrize("mark", [", ", " ;\t", "\t "])
def test_spaces_around_the_names_of_columns_are_none_of_them(mark, tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text(mark.join(("user_id", "item_id", "rating", "timestamp")) + " \n" + lines(mark))
    assert told(prepared(path)) == EXPECTED


@pytest.mark.parametrize("quote", ["", '"'])
def test_rows_may_hold_whole_pictures_but_not_more(quote, tmp_path, monkeypatch):
    path = tmp_path / "shop.csv"
    head, (first, *rest) = "user_id,item_id,rating,timestamp,picture\n", lines(",").splitlines()
    long = f"{quote}{'x' * 5_000_000}{quote}"
    path.write_text("\n".join([head.strip(), f"{first},{long}", *(f"{row}," for row in rest)]))
    assert told(prepared(path)) == EXPECTED
    monkeypatch.setattr(table_file, "BLOCK_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"shop\.csv has a row of more than 1,048,576 bytes; leave out"):
        prepared(path)


def test_without_times_the_rows_of_a_user_are_in_order(tmp_path):
    path = tmp_path / "pairs.txt"
    rows = [(1, 5), (2, 9), (1, 3), (1, 5), (2, 1), (2, 7), (1, 8)]
    path.write_text(lines(" ", rows, (0, 1)))
    settings = {"column_names": ("user_id", "item_id"), "timestamp_column": None}
    data = prepared(path, **settings)
    assert told(data) == [
        *(("1", item, place) for place, item in enumerate("5358")),
        *(("2", item, place) for place, item in enumerate("917")),
    ]
    assert data.summary["times_are_positions"] and data.summary["dropped"]["duplicate"] == 0
    with pytest.raises(ConfigError, match=r"split=global_time needs times; set"):
        prepared(path, split="global_time", **settings)


def test_the_items_file_may_call_its_column_otherwise(tmp_path):
    path, items = tmp_path / "u.csv", tmp_path / "m.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"a,i{n},{n}\n" for n in range(5)))
    items.write_text("movie_id,title\n" + "".join(f"i{n},T{n}\n" for n in range(5)))
    data = prepared(path, items=str(items), items_item_column="movie_id")
    assert data.titles == [f"T{n}" for n in range(5)]
    with pytest.raises(DataError, match=r"m\.csv has no column 'item_id'; .*\(items_item_column in"):
        prepared(path, items=str(items))
    with pytest.raises(ConfigError, match="items_item_column has no effect with no items file"):
        prepared(path, items_item_column="movie_id")


def test_places_are_counted_for_each_user():
    rng = np.random.default_rng(0)
    user = rng.integers(0, 7, 200)
    seen: dict[int, int] = {}
    expected = []
    for one in user.tolist():
        expected.append(seen.get(one, 0))
        seen[one] = expected[-1] + 1
    assert places(user).tolist() == expected
    assert places(user[:0]).tolist() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column_names": ("user_id", "item_id")}, "got user_id,item_id without timestamp"),
        ({"column_names": (*NAMES, "rating")}, "must name every column once"),
        ({"column_names": NAMES[:3], "timestamp_column": None, "user_column": "who"}, "without who"),
    ],
)
def test_names_that_cannot_be_those_of_the_columns_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PrepareDataConfig(source="table", interactions="u.txt", **settings)


def test_files_that_name_their_columns_take_no_other_names(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text('{"user_id": 1}\n')
    with pytest.raises(
        DataError, match=r"u\.jsonl names its columns itself; leave prepare_data.column_names"
    ):
        TableFile(path, ("user_id",)).read(["user_id"])


def parquet(tmp_path: Path, **columns: Any) -> PrepareDataConfig:
    """Three users with three items each, some columns otherwise."""
    rows = {
        "user_id": [f"u{user}" for user in range(3) for _ in range(3)],
        "item_id": [f"i{item}" for _ in range(3) for item in range(3)],
        "timestamp": list(range(9)),
    }
    pq.write_table(pa.table(rows | columns), tmp_path / "log.parquet")
    return PrepareDataConfig(source="table", interactions=str(tmp_path / "log.parquet"), k_core=1)


def test_uuids_are_read_as_people_write_them(tmp_path):
    ids = [uuid.UUID(int=item + 1) for _ in range(3) for item in range(3)]
    data = prepare_data(parquet(tmp_path, item_id=pa.array([one.bytes for one in ids], pa.binary(16))))
    assert data.raw_ids == [str(one) for one in ids[:3]]
    texts = pa.array([b"0123456789abcde%d" % item for _ in range(3) for item in range(3)], pa.binary(16))
    assert prepare_data(parquet(tmp_path, item_id=texts)).raw_ids == [f"0123456789abcde{n}" for n in range(3)]


def test_days_as_whole_numbers_are_read_by_their_format(tmp_path):
    config = parquet(tmp_path, timestamp=[20111018 + place for _ in range(3) for place in (0, 2, 1)])
    data = prepare_data(dataclasses.replace(config, timestamp_format="%Y%m%d"))
    assert data.timestamp[:3].tolist() == [1_318_896_000 + 86_400 * day for day in range(3)]
    assert data.item[:3].tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": pa.array([b"\xff\xfe"] * 9)}, "'item_id' holds binary that is no UTF-8 text"),
        ({"timestamp": [[1]] * 9}, "'timestamp' holds list.*, expected times: a number"),
        ({"timestamp": pa.array([1] * 9, pa.time32("s"))}, r"holds time32\[ms\], expected times"),
        (
            {"timestamp": ["2011-10-18T00:00:00Z"] * 5 + [None] + ["2011-10-18T00:00:00Z"] * 3},
            "row 6, column 'timestamp': there is no time",
        ),
    ],
)
def test_types_that_are_none_of_a_log_are_refused_by_name(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        prepare_data(parquet(tmp_path, **columns))


def test_json_lines_may_hold_nan_and_a_mark_of_their_order(tmp_path):
    """pandas writes NaN for what is missing; Windows' programs begin with a byte order mark."""
    rows = [
        {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": item}
        for user in range(3)
        for item in range(3)
    ]
    log = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "log.jsonl").write_text(log, encoding="utf-8-sig")
    items = [
        {"item_id": f"i{item}", "title": math.nan if item == 1 else f"Thing {item}"} for item in range(3)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    data = prepare_data(
        PrepareDataConfig(
            source="table",
            interactions=str(tmp_path / "log.jsonl"),
            items=str(tmp_path / "items.jsonl"),
            k_core=1,
        )
    )
    assert data.titles == ["Thing 0", "", "Thing 2"] and data.summary["items_without_title"] == 1


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_without_commas_is_read_by_what_spreadsheets_write(mark, tmp_path):
    path = tmp_path / "items.csv"
    path.write_text(f'item_id{mark}title\n1{mark}"red, {mark} blue"\n\n2{mark}b,c\n')
    table = TableFile(path).read(["item_id", "title"])
    assert table.to_pydict() == {"item_id": ["1", "2"], "title": [f"red, {mark} blue", "b,c"]}
    assert TableFile(path).row(1) == 4


@pytest.mark.parametrize("line", ["[" * 100_000, '{"item_id": ' + "9" * 5000 + "}"])
def test_lines_that_no_reader_takes_are_refused_in_one_line(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    config = PrepareDataConfig(source="table", interactions=str(tmp_path / "log.jsonl"))
    with pytest.raises(
        DataError, match=r"log.jsonl, row 1: neither JSON nor a Python literal \(.*\); expected"
    ):
        prepare_data(config)
