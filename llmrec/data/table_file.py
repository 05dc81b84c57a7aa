"""A file that holds a table: read by column, with rows that messages can name.

Rows are those a person sees: row 1 of a CSV file is its header, blank lines count. Files without a header
begin with row 1 of data.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import gzip
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from llmrec.data.hub import PREFIX, read_hub
from llmrec.data.raw import (
    NAMES,
    PACKING_ERRORS,
    U_ITEM,
    is_packed,
    kind_of,
    lines_of,
    open_text,
    read_dat,
    read_json_lines,
)
from llmrec.errors import DataError

logger = logging.getLogger("llmrec")

DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
ATOMIC = (".inter", ".item")
"""RecBole's atomic files: columns are named with their type, as ``user_id:token``."""
LOOSE = (".txt", ".data")
"""Names that do not say what separates columns: the first of tab, comma, semicolon, bar, space there is."""
BLOCK_BYTES = 1 << 24
"""Block in which text files are read; no row can be longer than two, such as one with a picture in it."""


@dataclass(frozen=True)
class TableFile:
    """A CSV, RecBole, JSON lines, MovieLens .dat or parquet file, or a data set on the Hub."""

    path: Path
    names: tuple[str, ...] | None = None
    """Its columns, where it has no header that names them"""

    def __str__(self) -> str:
        return str(self.path)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns; those of text files as text.

        Raises:
            DataError: missing or empty file, a missing column, not UTF-8, rows of a wrong length.
        """
        path, columns = self.path, list(dict.fromkeys(columns))
        if self.names is not None and (self.on_hub or self.kind not in (*DELIMITERS, *LOOSE, ".dat")):
            raise DataError(f"{path} names its columns itself; leave prepare_data.column_names out")
        if self.on_hub:
            return plain_texts(read_hub(str(path), columns))
        if not path.is_file():
            raise no_file(path)
        with self._explained():
            table = self._read(columns)
        if table.num_rows == 0:
            raise DataError(f"{path} has no rows of data; expected at least one")
        return table

    def row(self, index: int) -> int:
        """Row in the file, as a person counts them, of the row of data at this index."""
        path = self.path
        if self.kind == ".parquet" or self.on_hub:
            return index + 1
        if self.kind not in (*DELIMITERS, *LOOSE):
            return next(itertools.islice(lines_of(path, "latin-1"), index, None))[0]
        before_data = 0 if self.names is not None else -1
        with open_text(path, "utf-8-sig", newline="") as handle:
            reader = self.reader(handle, quoted=self.quoted)
            try:
                filled = (number for number, row in enumerate(reader, start=1) if row)
                return next(
                    number for place, number in enumerate(filled, start=before_data) if place == index
                )
            except csv.Error:  # a text longer than the csv module takes; rare, and blank lines are too
                return index + 1 - before_data

    @property
    def kind(self) -> str:
        """Ending of its name."""
        return kind_of(self.path)

    @property
    def on_hub(self) -> bool:
        """Whether this is the address of a data set on the Hub, see `llmrec.data.hub`."""
        return str(self.path).startswith(PREFIX)

    @functools.cached_property
    def quoted(self) -> bool:
        """Whether "quotes" hold values together. RecBole writes and reads them as letters, and so do others:
        in their files quotes that begin or end where no value does swallow lines that are all rows."""
        if self.kind in ATOMIC:
            return False
        if not self._num_quotes:
            return True
        as_letters = self._num_rows(quoted=False)
        whole = as_letters is None or as_letters == self._num_rows(quoted=True)
        return whole or self._is_well_quoted()

    @functools.cached_property
    def _num_quotes(self) -> int:
        opened = gzip.open if is_packed(self.path) else open
        with cast(BinaryIO, opened(self.path, "rb")) as handle:
            return sum(block.count(b'"') for block in iter(lambda: handle.read(BLOCK_BYTES), b""))

    def reader(self, handle: Iterable[str], *, quoted: bool) -> Iterator[list[str]]:
        """Rows of a text file, slowly."""
        delimiter = self.delimiter()
        if quoted:
            return csv.reader(handle, delimiter=delimiter)
        return csv.reader(handle, delimiter=delimiter, quoting=csv.QUOTE_NONE)

    def delimiter(self) -> str:
        """What separates the columns of a text file."""
        usual = DELIMITERS.get(self.kind, " ")
        if self.kind not in (".csv", *LOOSE):
            return usual
        try:
            with open_text(self.path, "utf-8-sig") as handle:
                first = next((line for line in handle if line.strip()), "")
        except UnicodeDecodeError:
            return usual  # whoever reads on finds the place
        # A .csv has commas, or where its first row has none what spreadsheets write in many countries.
        return next((mark for mark in ("\t,;|" if self.kind in LOOSE else ",;\t") if mark in first), usual)

    def _read(self, columns: list[str]) -> pa.Table:
        if self.kind == ".parquet":
            self._check(pq.read_schema(self.path).names, columns)
            return plain_texts(pq.read_table(self.path, columns=columns))
        if self.kind in (*DELIMITERS, *LOOSE):
            return self._read_csv(columns)
        if self.kind in (".json", ".jsonl", ".ndjson"):
            return read_json_lines(self.path, columns)
        if self.kind in (".dat", U_ITEM):
            return read_dat(self.path, columns, self.names)
        raise DataError(
            f"{self.path}: unknown kind of file, expected .csv, .tsv, .txt, .data, .json, .jsonl or .ndjson "
            "(one object a line), .inter or .item of RecBole, .dat or u.item of MovieLens (all of these may "
            "be packed, .gz), or .parquet"
        )

    def check(self, columns: Sequence[str]) -> None:
        """Look for columns in the head of a file that has one; nothing is read of others.

        Raises:
            DataError: no such file, or no such column.
        """
        if self.on_hub:
            return
        if not self.path.is_file():
            raise no_file(self.path)
        with self._explained():
            if self.kind in (*DELIMITERS, *LOOSE):
                self._raw_names(list(columns))
            elif self.kind == ".parquet":
                self._check(pq.read_schema(self.path).names, list(columns))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in a sentence why the file cannot be read."""
        try:
            try:
                yield
            except UnicodeDecodeError:
                raise not_utf8(self.path) from None
        except (pa.ArrowException, OSError, *PACKING_ERRORS) as error:
            reason = str(error).splitlines()[0]
            if is_packed(self.path) and not isinstance(error, PermissionError):
                raise DataError(f"{self.path} is cut or damaged ({reason}); get the file again") from None
            raise DataError(f"{self.path} cannot be read as {self.kind[1:]}: {reason}") from None

    def _raw_names(self, columns: list[str]) -> dict[str, str]:
        """The columns of a text file as its head has them, by the names that they go by: without spaces
        around them, and RecBole's without types."""
        path = self.path
        try:
            with open_text(path, "utf-8-sig", newline="") as handle:
                first = next((row for row in self.reader(handle, quoted=self.kind not in ATOMIC) if row), [])
        except csv.Error as error:
            raise DataError(f"{path}, row 1: {error}") from None
        if not first:
            raise DataError(f"{path} is empty; expected a header line with column names")
        raw = list(self.names or first)
        if len(raw) != len(first):
            raise DataError(
                f"{path}, row 1: {len(first)} columns, but prepare_data.column_names names {len(raw)}"
            )
        names = [(name.partition(":")[0] if self.kind in ATOMIC else name).strip() for name in raw]
        self._check(names, columns)
        return dict(zip(names, raw))

    def _read_csv(self, columns: list[str]) -> pa.Table:
        path, delimiter = self.path, self.delimiter()
        raw_name = self._raw_names(columns)
        wanted = [raw_name[name] for name in columns]
        if self.kind not in ATOMIC:
            if not self.quoted:
                logger.warning('%s: "quotes" are read as letters: only so is every line a row', path)
            elif self._num_quotes % 2:
                self._check_that_quotes_end()
        try:
            table = self._parsed(wanted, quoted=self.quoted)
        except pa.ArrowInvalid as error:
            if "straddling" in str(error):
                raise DataError(
                    f"{path} has a row of more than {BLOCK_BYTES:,} bytes; leave out what is so long, or "
                    "write it as parquet"
                ) from None
            raise self._why_unreadable(delimiter, str(error)) from None
        return table.rename_columns(columns)

    def _parsed(self, raw_names: list[str], *, quoted: bool) -> pa.Table:
        return pacsv.read_csv(
            pa.input_stream(str(self.path), compression="gzip" if is_packed(self.path) else None),
            read_options=pacsv.ReadOptions(
                column_names=None if self.names is None else list(self.names), block_size=BLOCK_BYTES
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=self.delimiter(), quote_char='"' if quoted else False, newlines_in_values=quoted
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(raw_names, pa.string()),
                include_columns=raw_names,
                strings_can_be_null=False,
            ),
        )

    def _num_rows(self, *, quoted: bool) -> int | None:
        """Rows of a text file if it is read so; None if it cannot be."""
        name = next(iter(self._raw_names([]).values()))
        try:
            return self._parsed([name], quoted=quoted).num_rows
        except (pa.ArrowInvalid, pa.ArrowKeyError):  # no rows of one length, or names that stand in quotes
            return None

    def _is_well_quoted(self) -> bool:
        """Whether quotes begin and end with values."""
        try:
            with long_values(), open_text(self.path, "utf-8-sig", newline="") as handle:
                for _ in csv.reader(handle, delimiter=self.delimiter(), strict=True):
                    pass
        except csv.Error:
            return False
        return True

    def _check_that_quotes_end(self) -> None:
        """Where one does not, pyarrow takes all the rest of the file for one value.

        Raises:
            DataError: the row where it begins.
        """
        number, ends = 0, False
        try:
            with long_values(), open_text(self.path, "utf-8-sig", newline="") as handle:
                rows = self.reader(itertools.chain(handle, ["\n", "end"]), quoted=True)
                for row in rows:
                    number, ends = number + 1, row == ["end"]
        except csv.Error:
            number += 1
        if not ends:
            raise DataError(
                f'{self.path}, row {number}: a "quote" begins and never ends; write quotes that are letters '
                'twice ("") in values between quotes'
            )

    def _check(self, names: list[str], wanted: list[str]) -> None:
        path = self.path
        for name in wanted:
            if names.count(name) > 1:
                raise DataError(f"{path} has {names.count(name)} columns named {name!r}; rename all but one")
            if name in names:
                continue
            shown = ", ".join(names)
            if self.names is None and any(map(is_number, names)):
                raise DataError(
                    f"{path} has no column {name!r}, and its first row ({shown}) looks like data. If it has "
                    "no header, name its columns in order: prepare_data.column_names=user_id,item_id,..."
                )
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}? It" if close else "it"
            if len(names) == 1 and any(mark in names[0] for mark in ",;\t|"):
                hint = f"columns must be separated by {DELIMITERS.get(self.kind, ' ')!r}. It"
            raise DataError(f"{path} has no column {name!r}; {hint} has: {shown}. Name it with {NAMES}")

    def _why_unreadable(self, delimiter: str, reason: str) -> DataError:
        """Read the file again, slowly, for the row that pyarrow does not name."""
        path, where = self.path, "in the header" if self.names is None else "in the first row"
        try:
            with open_text(path, "utf-8-sig", newline="") as handle:
                reader = self.reader(handle, quoted=self.quoted)
                width, number = None, 0
                for number, row in enumerate(reader, start=1):
                    if row and width is not None and len(row) != width:
                        return DataError(
                            f"{path}, row {number}: {len(row)} columns, expected {width} as {where}; "
                            f'put "quotes" around values that hold a {delimiter!r}'
                        )
                    width = width or len(row) or None
        except csv.Error as error:
            return DataError(f"{path}, row {number + 1}: {error}")
        if number <= 1:
            return DataError(f"{path} has no rows of data; expected at least one")
        return DataError(f"{path} cannot be read as {self.kind[1:]}: {reason.splitlines()[0]}")


@contextlib.contextmanager
def long_values() -> Iterator[None]:
    """Inside, the csv module reads values as long as pyarrow does."""
    usual = csv.field_size_limit(2 * BLOCK_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(usual)


def is_number(text: str) -> bool:
    """Whether a text is a number, which no column is called."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def plain_texts(table: pa.Table) -> pa.Table:
    """A table whose texts have one type, of the several that they have in parquet files."""
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_string(kind):
            table = table.set_column(place, field.name, table[place].cast(pa.string()))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table[place].cast(kind))
    return table


def no_file(path: Path) -> DataError:
    """What is wrong with a path that is no file."""
    if path.is_dir():
        return DataError(f"{path} is a folder; give one file, such as {path / 'all.parquet'}")
    return DataError(f"{path}: no such file")


def not_utf8(path: Path) -> DataError:
    """Which row of a text file is not UTF-8."""
    if not is_packed(path) and path.read_bytes()[:2] == b"\x1f\x8b":
        return DataError(f"{path} is packed; let its name end in .gz")
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
