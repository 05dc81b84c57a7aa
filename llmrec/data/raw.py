"""Public raw files as tables: JSON lines of the Amazon releases, `.dat` files and the u.item of MovieLens.

Only the columns asked for are kept, and the file is gone through in blocks, so it may be larger than
memory. Columns of lists and numbers become text here; numbers are made of text where they are needed,
with the same messages for every kind of file.
"""

from __future__ import annotations

import ast
import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import pyarrow as pa

from llmrec.errors import DataError
from llmrec.progress import progress

PACKING_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
"""What reading a packed file raises that was cut or changed."""

NAMES = (
    "prepare_data.user_column, item_column (items_item_column in the items file alone), timestamp_column, "
    "title_column and so on"
)
"""What columns are named with, for messages."""

DEEPEST = 50
"""Lists in one another that a field may have; public files have three."""

BLOCK_ROWS = 1 << 16
"""Rows held as Python objects at once."""

DAT_COLUMNS = {
    "ratings": ("user_id", "item_id", "rating", "timestamp"),
    "movies": ("item_id", "title", "genres"),
    "users": ("user_id", "gender", "age", "occupation", "zip"),
    "u.item": ("item_id", "title", "release_date", "video_release_date", "imdb_url", "genres"),
}
"""Columns of MovieLens files, which have no header, by the file's name (their READMEs)."""

U_ITEM = "u.item"
"""The items of MovieLens-100k, which RecBole's `.item` files are not: fields separated by a bar."""

U_ITEM_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War"),
    "Western",
)
"""What the fields of u.item behind the address tell with a 1."""


def kind_of(path: Path) -> str:
    """Ending of a file's name in small letters, without that of packing: .csv of x.CSV.gz; u.item is one."""
    name = path.name.lower().removesuffix(".gz")
    return U_ITEM if name == U_ITEM else Path(name).suffix


def read_json_lines(path: Path, columns: list[str]) -> pa.Table:
    """Some fields of a file with one JSON object a line, as text; a field that a line lacks is ''.

    Lines that are no JSON are read as Python literals, as the 2014 Amazon metadata needs, and never run.
    See `as_text` for fields that hold more than one value.

    Raises:
        DataError: a line is no object, or no line has one of the fields.
    """
    batches: list[pa.RecordBatch] = []
    rows: list[list[str]] = []
    found: set[str] = set()
    for number, line in progress(lines_of(path), f"reading {path.name}", unit="line"):
        record = parse_line(path, number, line)
        found.update(record)
        try:
            rows.append([as_text(record.get(name)) for name in columns])
        except (RecursionError, TypeError) as error:
            reason = "is too deep" if isinstance(error, RecursionError) else f"is none of JSON ({error})"
            raise DataError(f"{path}, row {number}: a field {reason}") from None
        if len(rows) == BLOCK_ROWS:
            batches.append(batch_of(rows, columns))
            rows = []
    batches.append(batch_of(rows, columns))
    missing = [name for name in columns if name not in found]
    if missing and found:
        has = ", ".join(sorted(map(str, found))[:20])
        raise DataError(
            f"{path}: no line has a field {missing[0]!r}; it has {has}. Name the columns with {NAMES}"
        )
    return pa.Table.from_batches(batches)


def read_dat(path: Path, columns: list[str], names: tuple[str, ...] | None = None) -> pa.Table:
    """Some columns of a MovieLens file: fields separated by :: (100k's u.item: by |), no header; UTF-8 (10M)
    or Latin-1 (1M, 100k).

    Args:
        path: the file.
        columns: those to read.
        names: all of them, in order; None: as the file's name says.

    Raises:
        DataError: unknown file, unknown column, or a line with another number of fields.
    """
    names = names or DAT_COLUMNS.get(path.name.lower().removesuffix(".gz").removesuffix(".dat"))
    if names is None:
        raise DataError(
            f"{path}: .dat files of MovieLens are called ratings.dat, movies.dat or users.dat; name the "
            "columns of others with prepare_data.column_names"
        )
    for name in columns:
        if name not in names:
            raise DataError(f"{path} has no column {name!r}; a {path.name} has: {', '.join(names)}")
    place = [names.index(name) for name in columns]
    flags = len(U_ITEM_GENRES) if kind_of(path) == U_ITEM else 0
    width = len(names) + max(flags - 1, 0)
    batches, rows = [], []
    lines = lines_of(path, "utf-8" if is_utf8(path) else "latin-1")
    for number, line in progress(lines, f"reading {path.name}", unit="line"):
        fields = line.rstrip("\r\n").split("|" if flags else "::")
        if len(fields) != width:
            raise DataError(f"{path}, row {number}: {len(fields)} fields, expected {width}")
        if flags:
            told = zip(U_ITEM_GENRES, fields[-flags:])
            fields[-flags:] = ["|".join(genre for genre, flag in told if flag == "1")]
        rows.append([fields[index] for index in place])
        if len(rows) == BLOCK_ROWS:
            batches.append(batch_of(rows, columns))
            rows = []
    batches.append(batch_of(rows, columns))
    return pa.Table.from_batches(batches)


def is_packed(path: Path) -> bool:
    """Whether a file's name says that gzip packed it."""
    return path.name.lower().endswith(".gz")


def open_text(path: Path, encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """A text file to read, unpacked as it is read."""
    opened = gzip.open if is_packed(path) else open
    return cast(TextIO, opened(path, "rt", encoding=encoding, newline=newline))


def is_utf8(path: Path) -> bool:
    """Whether a whole file is UTF-8 text; a packed one that is damaged is not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as handle:
            while block := handle.read(1 << 20):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, *PACKING_ERRORS):
        return False
    return True


def lines_of(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line that is not blank, unpacked as it is read; a byte order mark is
    no part of the first.

    Raises:
        DataError: a packed file that is cut or damaged, or bytes that are no text.
    """
    number = 0
    try:
        with open_text(path, encoding) as handle:
            for number, line in enumerate(handle, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8.decode(encoding))
                if line.strip():
                    yield number, line
    except PACKING_ERRORS as error:
        raise DataError(
            f"{path} is cut or damaged after row {number} ({error}); get the file again"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after row {number}: {error.reason}; expected {encoding} text") from None


def parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    """One JSON object or Python literal."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at character {error.pos + 1}"
        try:
            record = ast.literal_eval(line.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise DataError(
                f"{path}, row {number}: neither JSON nor a Python literal ({reason}); expected one object a "
                "line"
            ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, row {number}: {type(record).__name__}, expected an object with named fields"
        )
    return record


def as_text(value: Any, depth: int = 0) -> str:
    """A field as text; `depth` counts the lists and objects around it.

    Texts stay as they are, since ids may differ in spaces alone; those in lists get single spaces. Lists
    become their entries joined by a bar, nested ones one after another (2014 and 2018 categories); of
    pictures described by objects (2023) each gives its largest address; other objects become JSON. Halves of
    characters, as cut texts end in, become question marks.

    Raises:
        RecursionError: more than DEEPEST lists lie in one another.
    """
    if depth > DEEPEST:
        raise RecursionError
    if value is None:
        return ""
    if isinstance(value, str):
        whole = value if value.isascii() else value.encode("utf-8", "replace").decode()
        return re.sub(r"\s+", " ", whole).strip() if depth else whole
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple):
        return "|".join(filter(None, (as_text(part, depth + 1) for part in value)))
    if isinstance(value, dict):
        sizes = (as_text(value.get(name), depth + 1) for name in ("hi_res", "large", "thumb"))
        return next(filter(None, sizes), None) or as_text(
            json.dumps(value, ensure_ascii=False, sort_keys=True), depth + 1
        )
    return str(value)


def batch_of(rows: list[list[str]], columns: list[str]) -> pa.RecordBatch:
    values = zip(*rows) if rows else [[] for _ in columns]
    return pa.RecordBatch.from_arrays([pa.array(list(column), pa.string()) for column in values], columns)
