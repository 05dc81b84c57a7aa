"""Raw public files: the same table whatever release it came from, and named faults."""

from __future__ import annotations

import gzip
import json

import pytest

from llmrec.data.config import PrepareDataConfig
from llmrec.data.prepare import prepare_data
from llmrec.data.raw import as_text, read_dat, read_json_lines
from llmrec.data.table_file import TableFile
from llmrec.errors import DataError

REVIEWS_2014 = [
    {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1318896000, "helpful": [0, 1]},
    {"reviewerID": "A2", "asin": "B2", "overall": 1.0, "unixReviewTime": 1318896001, "helpful": []},
]
REVIEWS_2023 = [
    {"user_id": "A1", "parent_asin": "B1", "rating": 5.0, "timestamp": 1588687728923, "images": []},
    {
        "user_id": "A2",
        "parent_asin": "B2",
        "rating": 1.0,
        "timestamp": 1588687728924,
        "images": [{"large": "x"}],
    },
]


def write_lines(path, records, form=json.dumps):
    text = "".join(form(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["reviews_Beauty_5.json.gz", "x.json", "x.jsonl", "x.ndjson", "X.JSONL.GZ"])
def test_reviews_are_read_packed_or_not(name, tmp_path):
    path = tmp_path / name
    write_lines(path, REVIEWS_2014)
    if name == "X.JSONL.GZ":
        path.write_bytes(gzip.compress(path.read_bytes()))
    table = TableFile(path).read(["reviewerID", "asin", "overall", "unixReviewTime"])
    assert table.to_pydict() == {
        "reviewerID": ["A1", "A2"],
        "asin": ["B1", "B2"],
        "overall": ["5", "1"],
        "unixReviewTime": ["1318896000", "1318896001"],
    }


def test_the_metadata_of_2014_are_python_literals_and_never_run(tmp_path):
    items = [
        {"asin": "B1", "title": 'Rose "Water"', "categories": [["Beauty", "Skin"], ["Gifts"]], "price": 1.5},
        {"asin": "B2", "imUrl": "http://x/y.jpg"},
    ]
    path = write_lines(tmp_path / "meta_Beauty.json.gz", items, repr)
    table = read_json_lines(path, ["asin", "title", "categories", "imUrl", "price"])
    assert table.to_pylist() == [
        {
            "asin": "B1",
            "title": 'Rose "Water"',
            "categories": "Beauty|Skin|Gifts",
            "imUrl": "",
            "price": "1.5",
        },
        {"asin": "B2", "title": "", "categories": "", "imUrl": "http://x/y.jpg", "price": ""},
    ]
    path = tmp_path / "evil.json"
    path.write_text("{'asin': __import__('os').getcwd()}\n")
    with pytest.raises(DataError, match="row 1: neither JSON nor a Python literal"):
        read_json_lines(path, ["asin"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("  two\n lines ", "  two\n lines "),
        (["  two\n lines "], "two lines"),
        ({"a": "two  spaces"}, '{"a": "two spaces"}'),
        (3.0, "3"),
        (2.25, "2.25"),
        (True, "True"),
        ([["a", "b"], [], ["c"]], "a|b|c"),
        ([{"thumb": "t", "large": "l", "hi_res": None}, {"thumb": "u"}], "l|u"),
        ({"Size:": "7 oz"}, '{"Size:": "7 oz"}'),
        ({"large": 5, "thumb": "t"}, "5"),
        ("tea \ud83d", "tea ?"),
        ({"a": "\ud83d"}, '{"a": "?"}'),
        ("caf\u00e9 \U0001f375", "caf\u00e9 \U0001f375"),
    ],
    ids=str,
)
def test_every_kind_of_field_becomes_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"asin": "B1"}\n{"asin": "B2"\n', "row 2: neither JSON"),
        ('{"asin": "B1"}\n\n[1, 2]\n', "row 3: list, expected an object"),
        ('{"asin": "B1"}\n', "no line has a field 'title'; it has asin"),
        ("", "has no rows of data"),
        ("{[1]: 2}\n", "row 1: neither JSON nor a Python literal"),
        ("{'asin': {1: 2, 'a': 3}, 'title': ''}\n", "row 1: a field is none of JSON"),
        ('{"asin": ' + "[" * 60 + "]" * 60 + ', "title": ""}\n', "row 1: a field is too deep"),
        ("{1: 2}\n", "no line has a field 'asin'; it has 1"),
    ],
    ids=str,
)
def test_faults_are_named_with_their_row(lines, message, tmp_path):
    path = tmp_path / "items.json"
    path.write_text(lines)
    with pytest.raises(DataError, match=message):
        TableFile(path).read(["asin", "title"])


def test_a_packed_file_that_is_cut_is_refused(tmp_path):
    path = write_lines(tmp_path / "r.json.gz", [REVIEWS_2014[0] | {"n": n} for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"cut or damaged after row \d+"):
        TableFile(path).read(["asin"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_movielens_titles_are_read_in_the_encoding_that_they_have(encoding, packed, tmp_path):
    content = "1::Misérables, Les (1995)::Drama\n2::Plain::Drama\n".encode(encoding)
    path = tmp_path / ("movies.dat.gz" if packed else "movies.dat")
    path.write_bytes(gzip.compress(content) if packed else content)
    table = read_dat(path, ["item_id", "title"])
    assert table.to_pydict() == {"item_id": ["1", "2"], "title": ["Misérables, Les (1995)", "Plain"]}


def test_movielens_files_have_no_header_and_are_latin_1(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n2::661::3::978302109\n")
    (tmp_path / "movies.dat").write_bytes("1193::Café: Noir (1975)::Drama|War\n".encode("latin-1"))
    ratings = read_dat(tmp_path / "ratings.dat", ["user_id", "item_id", "timestamp"])
    assert ratings.to_pylist()[1] == {"user_id": "2", "item_id": "661", "timestamp": "978302109"}
    movies = read_dat(tmp_path / "movies.dat", ["item_id", "title", "genres"])
    assert movies.to_pylist() == [{"item_id": "1193", "title": "Café: Noir (1975)", "genres": "Drama|War"}]
    (tmp_path / "ratings.dat").write_text("1::1193::5\n")
    with pytest.raises(DataError, match="row 1: 3 fields, expected 4"):
        read_dat(tmp_path / "ratings.dat", ["user_id"])
    with pytest.raises(DataError, match=r"a movies\.dat has: item_id, title, genres"):
        read_dat(tmp_path / "movies.dat", ["user"])


def test_movielens_100k_is_read_as_it_is(tmp_path):
    users, films = range(1, 8), range(1, 7)
    ratings = "".join(
        f"{user}\t{film}\t{3 + film % 3}\t{881250949 + 60 * (user + film)}\n"
        for user in users
        for film in films
    )
    flags = ["0"] * 19
    flags[5], flags[18] = "1", "1"
    lines = [
        f"{film}|Café {film} (1995)|01-Jan-1995||http://films.test/{film}|{'|'.join(flags)}\n"
        for film in films
    ]
    (tmp_path / "u.data").write_text(ratings)
    path = tmp_path / "u.item"
    path.write_bytes("".join(lines).encode("latin-1"))
    config = PrepareDataConfig(
        source="table",
        interactions=str(tmp_path / "u.data"),
        column_names=("user_id", "item_id", "rating", "timestamp"),
        items=str(path),
        text_columns=("genres", "release_date"),
    )
    data = prepare_data(config)
    assert (data.num_users, data.num_items) == (7, 6)
    assert data.items.select(["title", "genres", "release_date"]).to_pylist()[0] == {
        "title": "Café 1 (1995)", "genres": "Comedy|Western", "release_date": "01-Jan-1995",
    }  # fmt: skip
    path.write_text(lines[0] + lines[1].replace("|0\n", "\n").replace("|1\n", "\n"))
    with pytest.raises(DataError, match=r"u\.item, row 2: 23 fields, expected 24"):
        prepare_data(config)
    path.write_text("item_id:token\ttitle:token_seq\n1\tPlain\n")
    with pytest.raises(DataError, match=r"u\.item, row 1: 1 fields, expected 24"):
        prepare_data(config)


@pytest.mark.parametrize("release", ["2014", "2023"])
def test_a_raw_release_goes_through_prepare_data(release, tmp_path):
    user, item, time = (
        ("reviewerID", "asin", "unixReviewTime")
        if release == "2014"
        else ("user_id", "parent_asin", "timestamp")
    )
    records = [
        {user: f"u{number}", item: f"i{(number + step) % 7}", time: 10**9 + step, "text": "..."}
        for number in range(9)
        for step in range(6)
    ]
    reviews = write_lines(tmp_path / "reviews.json.gz", records)
    meta = write_lines(tmp_path / "meta.json.gz", [{item: f"i{n}", "title": f"t{n}"} for n in range(7)], repr)
    config = PrepareDataConfig(
        source="table", interactions=str(reviews), items=str(meta), k_core=0,
        user_column=user, item_column=item, timestamp_column=time,
    )  # fmt: skip
    data = prepare_data(config)
    assert (data.num_users, data.num_items, len(data.item)) == (9, 7, 54)
    assert data.titles == [f"t{n}" for n in range(7)]


def test_ids_that_differ_in_spaces_are_different_items_and_texts_have_single_ones(tmp_path):
    names = ["a b", "a  b", "a\tb", " c "]
    log = [
        {"user_id": f"u{user}", "item_id": item, "timestamp": 10**9 + user + time}
        for user in range(3)
        for time, item in enumerate(names)
    ]
    items = [{"item_id": item, "title": f" Tea\n {n}", "brand": "A  B"} for n, item in enumerate(names)]
    (tmp_path / "items.csv").write_text(
        "item_id,title,brand\n" + "".join(f'"{i["item_id"]}","{i["title"]}","{i["brand"]}"\n' for i in items)
    )
    write_lines(tmp_path / "items.jsonl", items)
    for name in ("items.jsonl", "items.csv"):
        config = PrepareDataConfig(
            source="table", interactions=str(write_lines(tmp_path / "log.jsonl", log)), k_core=0,
            items=str(tmp_path / name), text_columns=("brand",),
        )  # fmt: skip
        data = prepare_data(config)
        assert data.raw_ids == ["a\tb", "a  b", "a b", "c"] and len(data.item) == 12
        assert data.titles == ["Tea 2", "Tea 1", "Tea 0", "Tea 3"]
        assert data.items["brand"].to_pylist() == ["A B"] * 4


@pytest.mark.real_data
def test_the_raw_file_of_2018_is_read_and_its_repeats_are_counted(real_data):
    data = prepare_data(
        PrepareDataConfig(
            source="table",
            interactions=str(real_data / "amazon-2018-all-beauty" / "All_Beauty_5.json.gz"),
            user_column="reviewerID",
            item_column="asin",
            timestamp_column="unixReviewTime",
            k_core=0,
            split="global_time",
        )
    )
    read = data.summary["read"]
    assert (read["users"], read["items"], read["interactions"]) == (991, 85, 5269)
    assert data.summary["dropped"]["duplicate"] > 0
