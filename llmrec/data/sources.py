"""Readers of interactions: CSV, parquet, public raw files, and lines of item ids. No pandas.

Rows in messages are those a person sees: row 1 of a CSV file is its header, blank lines count. Files
without a header begin with row 1 of data.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from llmrec.data.hub import PREFIX, read_hub
from llmrec.data.raw import (
    PACKING_ERRORS,
    as_text,
    is_packed,
    kind_of,
    lines_of,
    open_text,
    read_dat,
    read_json_lines,
)
from llmrec.errors import DataError

RAW_READERS = {".json": read_json_lines, ".jsonl": read_json_lines, ".dat": read_dat}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TIME = "a number such as 1318896000 (Unix seconds), or ISO 8601 such as 2011-10-18T00:00:00Z"
NO_NUMBER = "not a number; expected one such as 1318896000 or 4.5"
NO_ID = ("", "nan", "null", "none")
"""Ids that are a missing value, in any case of letters."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Interactions as read, in file order. Users and items are numbers in the order of raw ids."""

    user: np.ndarray
    """int64 (n,), index into users"""
    item: np.ndarray
    """int64 (n,), index into items"""
    timestamp: np.ndarray
    """int64 (n,); the position in the user's line where the source has no time"""
    rating: np.ndarray | None = None
    """float64 (n,), if asked for"""
    users: np.ndarray
    """Distinct raw user ids, str objects"""
    items: np.ndarray
    """Distinct raw item ids, str objects"""
    place: Callable[[int], str]
    """File and row of the n-th interaction, for messages"""

    def __len__(self) -> int:
        return len(self.user)


def read_log(path: Path, *, user: str, item: str, timestamp: str, rating: str | None = None) -> Log:
    """Interactions from a table; user, item, timestamp and rating are names of columns.

    Times with decimals are kept in millionths, so that their order survives.

    Raises:
        DataError: a column is missing, an id is empty, a time is none or a rating is not a number.
    """
    table = read_table(path, [name for name in (user, item, timestamp, rating) if name is not None])
    users, user_number = numbered(id_column(table, path, user))
    items, item_number = numbered(id_column(table, path, item))
    return Log(
        user=user_number,
        item=item_number,
        timestamp=_times(table, path, timestamp),
        rating=None if rating is None else _decimals(table, path, rating),
        users=users,
        items=items,
        place=lambda index: f"{path}, row {file_row(path, index)}",
    )


def read_sequences(path: Path) -> Log:
    """Interactions from lines ``user item item ...``, oldest first; blank lines are skipped.

    Raises:
        DataError: missing or empty file, a line without items, a user with two lines.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with open_text(path, "utf-8-sig") as handle:
            lines = handle.read().splitlines()
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except PACKING_ERRORS as error:
        raise DataError(f"{path} is cut or damaged ({error}); get the file again") from None
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pa.array(lines, pa.string())))
    filled = np.flatnonzero([bool(line.strip()) for line in lines])
    if not len(filled):
        raise DataError(f"{path} is empty; expected lines `user item item ...`")
    words = words.take(pa.array(filled))
    length = pc.list_value_length(words).to_numpy() - 1
    users, user = numbered(pc.list_element(words, 0))
    if (length == 0).any():
        place = int(np.argmin(length))
        raise DataError(
            f"{path}, row {filled[place] + 1}: user {users[user[place]]!r} has no items; expected "
            "`user item item ...`, so delete the line"
        )
    if (np.bincount(user) > 1).any():
        twice = int(np.argmax(np.bincount(user) > 1))
        first, second = filled[np.flatnonzero(user == twice)[:2]] + 1
        raise DataError(
            f"{path}, row {second}: user {users[twice]!r} already stands in row {first}; put all items of "
            "a user in one line"
        )
    start = np.cumsum(length) - length
    is_item = np.ones(length.sum() + len(length), dtype=bool)
    is_item[start + np.arange(len(length))] = False
    items, item = numbered(pc.list_flatten(words).filter(pa.array(is_item)))
    row = np.repeat(filled + 1, length)
    return Log(
        user=np.repeat(user, length),
        item=item,
        timestamp=np.arange(len(item)) - np.repeat(start, length),
        users=users,
        items=items,
        place=lambda index: f"{path}, row {row[index]}",
    )


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Some columns of a CSV, JSON lines or MovieLens .dat file (all as text), or of a parquet file.

    Raises:
        DataError: missing or empty file, a missing column, not UTF-8, rows of a wrong length.
    """
    if is_hub(path):
        return plain_texts(read_hub(str(path), list(dict.fromkeys(columns))))
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".parquet":
            _check_columns(path, pq.read_schema(path).names, columns)
            table = plain_texts(pq.read_table(path, columns=list(dict.fromkeys(columns))))
        elif kind_of(path) in DELIMITERS:
            table = _read_csv(path, columns)
        elif kind_of(path) in RAW_READERS:
            table = RAW_READERS[kind_of(path)](path, list(dict.fromkeys(columns)))
        else:
            raise DataError(
                f"{path}: unknown kind of file, expected .csv, .tsv, .json or .jsonl (one object a line), a "
                "MovieLens .dat (all of these may be packed, .gz), or .parquet"
            )
    except (pa.ArrowException, OSError, UnicodeDecodeError, *PACKING_ERRORS) as error:
        reason = str(error).splitlines()[0]
        if is_packed(path) and not isinstance(error, PermissionError):
            raise DataError(f"{path} is cut or damaged ({reason}); get the file again") from None
        raise DataError(f"{path} cannot be read as {kind_of(path)[1:]}: {reason}") from None
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows of data; expected at least one")
    return table


def plain_texts(table: pa.Table) -> pa.Table:
    """A table whose texts have one type, of the several that they have in parquet files."""
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_string(kind):
            table = table.set_column(place, field.name, table[place].cast(pa.string()))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table[place].cast(kind))
    return table


def is_hub(path: Path) -> bool:
    """Whether this is the address of a data set on the Hub, see `llmrec.data.hub`."""
    return str(path).startswith(PREFIX)


def _read_csv(path: Path, columns: list[str]) -> pa.Table:
    delimiter = DELIMITERS[kind_of(path)]
    try:
        with open_text(path, "utf-8-sig", newline="") as handle:
            names = next((row for row in csv.reader(handle, delimiter=delimiter) if row), [])
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except csv.Error as error:
        raise DataError(f"{path}, row 1: {error}") from None
    if not names:
        raise DataError(f"{path} is empty; expected a header line with column names")
    _check_columns(path, names, columns)
    try:
        return pacsv.read_csv(
            pa.input_stream(str(path), compression="gzip" if is_packed(path) else None),
            parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=list(dict.fromkeys(columns)),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise _why_unreadable(path, delimiter, str(error)) from None


def _why_unreadable(path: Path, delimiter: str, reason: str) -> DataError:
    """Read the file again, slowly, for the row that pyarrow does not name."""
    try:
        with open_text(path, "utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter=delimiter)
            width, number = None, 0
            for number, row in enumerate(reader, start=1):
                if row and width is not None and len(row) != width:
                    return DataError(
                        f"{path}, row {number}: {len(row)} columns, expected {width} as in the header; "
                        f'put "quotes" around values that hold a {delimiter!r}'
                    )
                width = width or len(row) or None
    except UnicodeDecodeError:
        return _not_utf8(path)
    except csv.Error as error:
        return DataError(f"{path}, row {number + 1}: {error}")
    if number <= 1:
        return DataError(f"{path} has no rows of data; expected at least one")
    return DataError(f"{path} cannot be read as {kind_of(path)[1:]}: {reason.splitlines()[0]}")


def _not_utf8(path: Path) -> DataError:
    content = gzip.decompress(path.read_bytes()) if is_packed(path) else path.read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return DataError(
                f"{path}, row {number}: byte {line[error.start]:#04x} is not UTF-8 text; save the file as "
                "UTF-8"
            )
    raise AssertionError("called for a file that is UTF-8")


def file_row(path: Path, index: int) -> int:
    """Row in the file, as a person counts them, of the row of data at this index."""
    if path.suffix.lower() == ".parquet" or is_hub(path):
        return index + 1
    if kind_of(path) in RAW_READERS:
        return next(itertools.islice(lines_of(path, "latin-1"), index, None))[0]
    with open_text(path, "utf-8-sig", newline="") as handle:
        reader = csv.reader(handle, delimiter=DELIMITERS[kind_of(path)])
        try:
            filled = (number for number, row in enumerate(reader, start=1) if row)
            return next(number for place, number in enumerate(filled, start=-1) if place == index)
        except csv.Error:  # a text longer than the csv module takes; rare, and blank lines are too
            return index + 2


def id_column(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    """A column of raw ids as text, exactly as given; a missing one is an error with its row."""
    if pa.types.is_nested(table[name].type):
        raise DataError(f"{path}, column {name!r} holds {table[name].type}, expected ids: numbers or texts")
    values = text_column(table, name)
    missing = pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(values)), pa.array(NO_ID)).to_numpy()
    if missing.any():
        index = int(np.argmax(missing))
        got = repr(values[index].as_py()) if values[index].as_py() else "empty"
        raise DataError(
            f"{path}, row {file_row(path, index)}, column {name!r}: {got}, expected an id; delete the row or "
            f"fill it in ({missing.sum()} such rows)"
        )
    return values


def text_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column as text, '' for null; whole numbers as people write them, lists and objects as in JSON lines
    (see `llmrec.data.raw.as_text`)."""
    values = table[name]
    if pa.types.is_nested(values.type):
        return pa.chunked_array([pa.array(map(as_text, values.to_pylist()), pa.string())])
    if pa.types.is_floating(values.type):
        whole = pc.all(pc.equal(pc.floor(values), values), min_count=0).as_py()
        values = pc.if_else(pc.is_finite(values), values, None)
        values = pc.cast(values, pa.int64()) if whole and _fits_int64(values) else values
    return pc.fill_null(pc.cast(values, pa.string()), "")


def numbered(values: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct texts in order, and the index of each value among them.

    The order is that of numbers if all are whole numbers, else that of characters; it does not depend on
    the order of the values.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    encoded = values.dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    if pc.all(pc.match_substring_regex(encoded.dictionary, r"^-?[0-9]+$")).as_py():
        order = np.array(sorted(order, key=lambda place: int(names[place])), dtype=np.int64)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return names[order], place[encoded.indices.to_numpy()]


def _times(table: pa.Table, path: Path, name: str) -> np.ndarray:
    """A column as int64 times; dates and timestamps, ISO 8601 text too, as Unix seconds, or millionths of
    them."""
    column = _moments(table, path, name)
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        if column.null_count:
            index = int(np.argmax(column.is_null().to_numpy()))
            raise DataError(f"{path}, row {file_row(path, index)}, column {name!r}: there is no time")
        column = pc.cast(pc.cast(column, pa.timestamp("us"), safe=False), pa.int64())
        seconds = pc.divide(column, 1_000_000)
        if pc.all(pc.equal(pc.multiply(seconds, 1_000_000), column)).as_py():
            column = seconds
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
    if column.null_count == 0 and not pa.types.is_floating(column.type):
        try:
            return pc.cast(column, pa.int64()).to_numpy()
        except pa.ArrowInvalid:
            pass  # decimal numbers, or no numbers at all
    values = _decimals(table, path, name, f"no time; expected {TIME}")
    if not np.array_equal(values, np.floor(values)):
        values = np.round(values * 1e6)
    if (large := np.abs(values) >= 2**63).any():
        index = int(np.argmax(large))
        raise DataError(
            f"{path}, row {file_row(path, index)}, column {name!r}: {table[name][index].as_py()} is too "
            "large for a time; expected Unix seconds or milliseconds"
        )
    return values.astype(np.int64)


def _moments(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    """ISO 8601 text as timestamps, all with a zone or all without (UTC then); anything else as it is."""
    column = table[name]
    if not pa.types.is_string(column.type) or not len(column) or column.null_count:
        return column
    text = pc.utf8_trim_whitespace(column)
    dated = pc.match_substring_regex(text, r"^\d{4}-\d{2}-\d{2}")
    if not dated[0].as_py():
        return column
    zoned = (
        pc.all(pc.match_substring_regex(text, r"(Z|[+-]\d{2}:?\d{2})$")).as_py()
        and pc.all(pc.match_substring(text, "T")).as_py()
    )
    kind = pa.timestamp("us", "UTC") if zoned else pa.timestamp("us")
    try:
        return pc.cast(text, kind)
    except pa.ArrowInvalid:
        index = _first_that_fails(text, kind)
    raise DataError(
        f"{path}, row {file_row(path, index)}, column {name!r}: {column[index].as_py()!r} is no time as "
        f"those before it; expected {TIME}, with a zone in every row or in none"
    )


def _decimals(table: pa.Table, path: Path, name: str, otherwise: str = NO_NUMBER) -> np.ndarray:
    """A column as float64; anything that is not a finite number is an error with its row, and `otherwise`."""
    column = table[name]
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
    try:
        values = pc.cast(column, pa.float64(), safe=False).to_numpy()
        bad = np.flatnonzero(~np.isfinite(values))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        bad = np.array([_first_that_fails(column, pa.float64())])
    if len(bad):
        index = int(bad[0])
        got = table[name][index].as_py()
        raise DataError(f"{path}, row {file_row(path, index)}, column {name!r}: {got!r} is {otherwise}")
    return values


def _first_that_fails(column: pa.ChunkedArray, kind: pa.DataType) -> int:
    """Index of the first value that cannot be cast to a type, by halving."""
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pc.cast(column.slice(low, middle - low), kind)
            low = middle
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            high = middle
    return low


def _fits_int64(values: pa.ChunkedArray) -> bool:
    most = pc.max(pc.abs(values)).as_py()
    return most is not None and most < 2**53


def _check_columns(path: Path, names: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(f"{path} has {names.count(name)} columns named {name!r}; rename all but one")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}? It" if close else "it"
            if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
                hint = f"columns must be separated by {DELIMITERS.get(kind_of(path))!r}. It"
            raise DataError(
                f"{path} has no column {name!r}; {hint} has: {', '.join(names)}. Name it with "
                "prepare_data.user_column, item_column, timestamp_column, title_column and so on"
            )
