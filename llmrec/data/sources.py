"""Readers of interactions: from tables, and from lines of item ids. No pandas."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.raw import PACKING_ERRORS, as_text, open_text
from llmrec.data.table_file import TableFile, no_file, not_utf8
from llmrec.errors import DataError
from llmrec.progress import progress

logger = logging.getLogger("llmrec")

TIME = "a number such as 1318896000 (Unix seconds), or ISO 8601 such as 2011-10-18T00:00:00Z"
ISO_FORMS = {
    r"^(\d{4}-\d{2}-\d{2}) +": r"\1T",
    r"(\.\d{6})\d+": r"\1",
    r"(\d:\d{2}) ?([+-]\d{2})$": r"\1\2:00",
    r"(\d:\d{2}\.\d+) ?([+-]\d{2})$": r"\1\2:00",
    r"(\d) (Z|[+-]\d{2}:?\d{2})$": r"\1\2",
    r"(\d) UTC$": r"\1Z",
}
"""How pandas, Python and data bases write ISO 8601, and how Arrow reads it: a T before the time of day, no
more than millionths, minutes of the zone."""

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


def read_log(
    file: TableFile,
    *,
    user: str,
    item: str,
    timestamp: str | None,
    rating: str | None = None,
    timestamp_format: str | None = None,
) -> Log:
    """Interactions from a table; user, item, timestamp and rating are names of columns.

    Times with decimals are kept in millionths, so that their order survives. Without a column of times, those
    of a user are the places of their rows: 0, 1, 2, ...

    Raises:
        DataError: a column is missing, an id is empty, a time is none or a rating is not a number.
    """
    table = file.read([name for name in (user, item, timestamp, rating) if name is not None])
    users, user_number = numbered(id_column(table, file, user))
    items, item_number = numbered(id_column(table, file, item))
    return Log(
        user=user_number,
        item=item_number,
        timestamp=places(user_number)
        if timestamp is None
        else _times(table, file, timestamp, timestamp_format),
        rating=None if rating is None else _decimals(table, file, rating),
        users=users,
        items=items,
        place=lambda index: f"{file}, row {file.row(index)}",
    )


def places(user: np.ndarray) -> np.ndarray:
    """Of rows with these users, int64 (n,): how many of the same user stand before each."""
    order = np.argsort(user, kind="stable")
    ordered = user[order]
    first = np.searchsorted(ordered, ordered)
    place = np.empty(len(user), dtype=np.int64)
    place[order] = np.arange(len(user)) - first
    return place


def read_sequences(path: Path) -> Log:
    """Interactions from lines ``user item item ...``, oldest first; blank lines are skipped.

    Raises:
        DataError: missing or empty file, a line without items, a user with two lines.
    """
    if not path.is_file():
        raise no_file(path)
    try:
        with open_text(path, "utf-8-sig") as handle:
            lines = handle.read().split("\n")
    except UnicodeDecodeError:
        raise not_utf8(path) from None
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
        line = lines[filled[place]]
        marks = [mark for mark in ",;|" if mark in line]
        what = f"put spaces in place of {marks[0]!r}" if marks else "delete the line"
        raise DataError(
            f"{path}, row {filled[place] + 1}: user {users[user[place]]!r:.60} has no items; expected "
            f"`user item item ...`, so {what}"
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


def id_column(table: pa.Table, file: TableFile, name: str) -> pa.ChunkedArray:
    """A column of raw ids as text, without spaces around them; a missing one is an error with its row."""
    if pa.types.is_nested(table[name].type):
        raise DataError(f"{file}, column {name!r} holds {table[name].type}, expected ids: numbers or texts")
    values = text_column(table, file, name)
    trimmed = pc.utf8_trim_whitespace(values)
    missing = pc.is_in(pc.utf8_lower(trimmed), pa.array(NO_ID)).to_numpy()
    if missing.any():
        index = int(np.argmax(missing))
        got = repr(values[index].as_py()) if values[index].as_py() else "empty"
        raise DataError(
            f"{file}, row {file.row(index)}, column {name!r}: {got}, expected an id; delete the row or "
            f"fill it in ({missing.sum()} such rows)"
        )
    if spaced := pc.sum(pc.not_equal(trimmed, values)).as_py():
        logger.warning("%s, column %r: %d ids have spaces around them, left out here", file, name, spaced)
    return trimmed


def text_column(table: pa.Table, file: TableFile, name: str) -> pa.ChunkedArray:
    """A column as text, '' for null; whole numbers and UUIDs as people write them, lists and objects as in
    JSON lines (see `llmrec.data.raw.as_text`); bytes that are no text are an error."""
    values = table[name]
    is_uuid = isinstance(values.type, pa.UuidType)
    if isinstance(values.type, pa.BaseExtensionType):
        values = pa.chunked_array([chunk.storage for chunk in values.chunks], values.type.storage_type)
    if values.type == pa.binary(16) and (is_uuid or not _is_text(values)):
        texts = [None if value is None else str(uuid.UUID(bytes=value)) for value in values.to_pylist()]
        values = pa.chunked_array([pa.array(texts, pa.string())])
    if pa.types.is_nested(values.type):
        try:
            return pa.chunked_array([pa.array(map(as_text, values.to_pylist()), pa.string())])
        except (RecursionError, TypeError):
            raise DataError(
                f"{file}, column {name!r} holds {values.type}, which is none of JSON; write it as text"
            ) from None
    if pa.types.is_float16(values.type):
        values = pc.cast(values, pa.float32())  # Arrow does not count with them
    if pa.types.is_floating(values.type):
        whole = pc.all(pc.equal(pc.floor(values), values), min_count=0).as_py()
        values = pc.if_else(pc.is_finite(values), values, None)
        values = pc.cast(values, pa.int64()) if whole and _fits_int64(values) else values
    try:
        return pc.fill_null(pc.cast(values, pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{file}, column {name!r} holds {values.type} that is no UTF-8 text; write it as text"
        ) from None


def _is_text(values: pa.ChunkedArray) -> bool:
    """Whether all bytes are UTF-8 text that can be printed."""
    try:
        return bool(pc.all(pc.utf8_is_printable(pc.cast(values, pa.string()))).as_py())
    except pa.ArrowInvalid:
        return False


def numbered(values: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct texts in order, and the index of each value among them.

    The order is that of numbers if all are whole numbers (of at most 1,000 digits), else that of characters;
    it does not depend on the order of the values.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    encoded = values.dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    if pc.all(pc.match_substring_regex(encoded.dictionary, r"^-?[0-9]{1,1000}$")).as_py():
        order = np.array(sorted(order, key=lambda place: int(names[place])), dtype=np.int64)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return names[order], place[encoded.indices.to_numpy()]


def _times(table: pa.Table, file: TableFile, name: str, written: str | None) -> np.ndarray:
    """A column as int64 times; dates and timestamps, ISO 8601 text too, as Unix seconds, or millionths of
    them. `written`: the format of times that are written otherwise."""
    kind = table[name].type
    if pa.types.is_nested(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        raise DataError(f"{file}, column {name!r} holds {kind}, expected times: {TIME}")
    column = _moments(table, file, name) if written is None else _parsed(table, file, name, written)
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        if column.null_count:
            index = int(np.argmax(column.is_null().to_numpy()))
            raise DataError(f"{file}, row {file.row(index)}, column {name!r}: there is no time")
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
    values = _decimals(table, file, name, f"no time; expected {TIME}")
    if not np.array_equal(values, np.floor(values)):
        values = np.round(values * 1e6)
    if (large := np.abs(values) >= 2**63).any():
        index = int(np.argmax(large))
        raise DataError(
            f"{file}, row {file.row(index)}, column {name!r}: {table[name][index].as_py()} is too "
            "large for a time; expected Unix seconds or milliseconds"
        )
    return values.astype(np.int64)


def _moments(table: pa.Table, file: TableFile, name: str) -> pa.ChunkedArray:
    """ISO 8601 text as timestamps, all with a zone or all without (UTC then); anything else as it is."""
    column = table[name]
    if not pa.types.is_string(column.type) or column.null_count == len(column):
        return column
    first = column.drop_null()[0].as_py()
    if not re.match(r"\s*\d{4}-\d{2}-\d{2}", first):
        return column
    if column.null_count:
        index = int(np.argmax(column.is_null().to_numpy()))
        raise DataError(f"{file}, row {file.row(index)}, column {name!r}: there is no time")
    text = pc.utf8_trim_whitespace(column)
    for written, instead in ISO_FORMS.items():
        text = pc.replace_substring_regex(text, written, instead)
    zoned = pc.all(pc.match_substring_regex(text, r"T.*(Z|[+-]\d{2}:?\d{2})$")).as_py()
    kind = pa.timestamp("us", "UTC") if zoned else pa.timestamp("us")
    try:
        return pc.cast(text, kind)
    except pa.ArrowInvalid:
        index = _first_that_fails(text, kind)
    raise DataError(
        f"{file}, row {file.row(index)}, column {name!r}: {column[index].as_py()!r} is no time"
        f"{' as those before it' if index else ''}; expected {TIME}, with a zone in every row or in none, or "
        "prepare_data.timestamp_format"
    )


def _parsed(table: pa.Table, file: TableFile, name: str, written: str) -> pa.ChunkedArray:
    """Text as timestamps by the codes of strptime; UTC where there is no zone."""
    column = table[name]
    if pa.types.is_integer(column.type):
        column = pc.cast(column, pa.string())  # such as 20120501
    if not pa.types.is_string(column.type):
        raise DataError(
            f"{file}, column {name!r}: {column.type} needs no format; leave out prepare_data.timestamp_format"
        )
    encoded = pc.dictionary_encode(pc.utf8_trim_whitespace(pc.fill_null(column, ""))).combine_chunks()
    moments = []
    texts = progress(encoded.dictionary.to_pylist(), "reading times", unit="time")
    for place, text in enumerate(texts):
        try:
            moment = datetime.strptime(text, written)
        except ValueError:
            index = int(np.argmax(encoded.indices.to_numpy() == place))
            raise DataError(
                f"{file}, row {file.row(index)}, column {name!r}: {text!r} is no time as "
                f"prepare_data.timestamp_format={written!r} has it, such as "
                f"{datetime(2012, 5, 1, 12, 30, tzinfo=timezone.utc).strftime(written)!r}"
            ) from None
        moments.append(moment.replace(tzinfo=moment.tzinfo or timezone.utc))
    return pa.chunked_array([pa.array(moments, pa.timestamp("us", "UTC")).take(encoded.indices)])


def _decimals(table: pa.Table, file: TableFile, name: str, otherwise: str = NO_NUMBER) -> np.ndarray:
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
        raise DataError(f"{file}, row {file.row(index)}, column {name!r}: {got!r} is {otherwise}")
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
