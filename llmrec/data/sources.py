"""Readers of interactions and items: CSV, parquet, and lines of item ids. No pandas, no Python loop."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from llmrec.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Log:
    """Interactions as read, one entry a row, all arrays of one length."""

    user: np.ndarray
    """Raw user ids, str objects"""
    item: np.ndarray
    """Raw item ids, str objects"""
    timestamp: np.ndarray
    """int64; the position in the user's line where the source has no time"""
    rating: np.ndarray | None = None
    """float64, if asked for"""
    row: np.ndarray
    """Row in the file as a person counts them, from 1, header included"""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> Log:
        """The chosen rows, in that order."""
        rating = None if self.rating is None else self.rating[index]
        return Log(
            user=self.user[index],
            item=self.item[index],
            timestamp=self.timestamp[index],
            rating=rating,
            row=self.row[index],
        )


def read_table(path: Path) -> pa.Table:
    """A CSV (all columns as text) or parquet file.

    Raises:
        DataError: missing, empty, not UTF-8, or rows with a wrong number of columns.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            table = _read_csv(path)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as {path.suffix or 'CSV'}: {reason}") from None
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows below its header")
    return table


def _read_csv(path: Path) -> pa.Table:
    with path.open("rb") as handle:
        if not handle.read(1):
            raise DataError(f"{path} is empty; expected a header line with column names")
    names = pacsv.open_csv(path).schema.names
    return pacsv.read_csv(
        path,
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


def read_log(path: Path, *, user: str, item: str, timestamp: str, rating: str | None = None) -> Log:
    """Interactions from a table; user, item, timestamp and rating are names of columns.

    Raises:
        DataError: a column is missing, an id is empty, a time or rating is not a number.
    """
    table = read_table(path)
    users, items = (text_column(table, path, name, required=True) for name in (user, item))
    times = _numbers(table, path, timestamp)
    if np.any(times != np.floor(times)) or np.abs(times).max() > 2**53:
        times = np.round(times * 1e6)  # fractions of seconds: microseconds keep their order
    return Log(
        user=users,
        item=items,
        timestamp=times.astype(np.int64),
        rating=None if rating is None else _numbers(table, path, rating),
        row=np.arange(2, table.num_rows + 2),
    )


def read_sequences(path: Path) -> Log:
    """Interactions from lines ``user item item ...``, oldest first; rows are line numbers.

    Raises:
        DataError: missing or empty file, a line without items, a user with two lines.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    lines = [(number, line) for number, line in enumerate(lines, start=1) if line]
    if not lines:
        raise DataError(f"{path} is empty; expected lines `user item item ...`")
    first_line: dict[str, int] = {}
    for number, line in lines:
        if len(line) == 1:
            raise DataError(f"{path}, line {number}: user {line[0]!r} has no items; delete the line")
        if line[0] in first_line:
            raise DataError(
                f"{path}, line {number}: user {line[0]!r} already stands in line {first_line[line[0]]}; "
                "put all items of a user in one line"
            )
        first_line[line[0]] = number
    length = np.array([len(line) - 1 for _, line in lines])
    return Log(
        user=np.repeat(np.array([line[0] for _, line in lines], dtype=object), length),
        item=np.array([word for _, line in lines for word in line[1:]], dtype=object),
        timestamp=np.concatenate([np.arange(size) for size in length]),
        row=np.repeat([number for number, _ in lines], length),
    )


def text_column(table: pa.Table, path: Path, name: str, *, required: bool = False) -> np.ndarray:
    """A column as str objects, '' for null; with `required`, an empty entry is an error."""
    column = pc.fill_null(pc.cast(_column(table, path, name), pa.string()), "")
    values = pc.utf8_trim_whitespace(column).to_numpy(zero_copy_only=False)
    if required and (empty := np.flatnonzero(values == "")).size:
        raise DataError(f"{path}, row {empty[0] + 2}, column {name!r}: empty, expected an id")
    return values


def _numbers(table: pa.Table, path: Path, name: str) -> np.ndarray:
    """A column as float64; anything that is not a finite number is an error with its row."""
    column = _column(table, path, name)
    if pa.types.is_timestamp(column.type):
        column = pc.cast(pc.cast(column, pa.timestamp("s"), safe=False), pa.int64())
    try:
        values = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        values = np.full(len(column), np.nan)
        for place, text in enumerate(column.to_pylist()):
            try:
                values[place] = float(text)
            except (TypeError, ValueError):
                break
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        got = column[int(bad[0])].as_py()
        raise DataError(f"{path}, row {bad[0] + 2}, column {name!r}: {got!r} is not a number")
    return values


def _column(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        close = difflib.get_close_matches(name, table.column_names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(
            f"{path} has no column {name!r}; {hint}it has: {', '.join(table.column_names)}. Column names "
            "are settings of prepare_data, such as user_column"
        )
    return table[name]
