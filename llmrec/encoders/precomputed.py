"""Item vectors from a file: made elsewhere, joined to the items, checked before use.

Two formats, because neither can run code when it is read:

- ``.parquet`` with a row per item: ``item_id`` (raw id, text or whole number) and ``vector`` (list of
  numbers). Rows are joined by raw id, so their order does not matter. A null vector says that the
  item has none. Items that the data set does not know are left out.
- ``.safetensors`` with ``vectors`` (N + 1, D), row 0 zero, and optionally ``missing`` (N + 1,). What its
  rows stand for is taken from, in this order: the header's ``catalog`` hash (files of this package),
  a JSON list of raw ids beside it, ``<name>.ids.json``, whose entry i belongs to row i + 1, or,
  failing both, the row number itself where the raw ids are the numbers 1..N.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from llmrec.encoders.config import ids_beside
from llmrec.errors import ArtifactMismatchError, DataError
from llmrec.interactions import catalog_of

logger = logging.getLogger("llmrec")


def read_vectors(path: str, raw_ids: list[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one vector per item from a file.

    Args:
        path: a ``.parquet`` or ``.safetensors`` file.
        raw_ids: raw ids of the items in item order; entry i belongs to item i + 1.
        what: what the vectors are, for messages, such as "text vectors".

    Returns:
        Vectors float32 (N + 1, D), row 0 and the rows of missing items zero; missing items bool (N + 1,).

    Raises:
        DataError: the file is absent, of another format, or holds NaN, duplicates or no usable column.
        ArtifactMismatchError: the file's items are not the data set's.
    """
    file = Path(path)
    readers = {".parquet": _read_parquet, ".safetensors": _read_safetensors}
    if file.suffix.lower() not in readers:
        raise DataError(
            f"{what}: {file} must be a .parquet file (columns item_id and vector) or a .safetensors file "
            f"(tensor vectors), got {file.suffix or 'no file ending'!r}; convert it"
        )
    if not file.is_file():
        raise DataError(f"{what}: {file} does not exist; check the path")
    vectors, missing = readers[file.suffix.lower()](file, raw_ids, what)
    if missing[1:].all():
        raise DataError(f"{what}: {file} holds no vector for any of the {len(raw_ids)} items")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DataError(
            f"{what}: {file} holds NaN, null or infinite numbers (float32) for {len(bad)} items, the first "
            f"is {raw_ids[bad[0] - 1]!r}; give finite numbers, or in parquet a null vector for an item "
            "without one"
        )
    zero = int((~vectors[1:].any(axis=1) & ~missing[1:]).sum())
    if zero:
        logger.warning("%s: %d items of %s have an all-zero vector, kept as it is", what, zero, file)
    return vectors, missing


def _read_parquet(file: Path, raw_ids: list[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = pq.read_schema(file)
        absent = [name for name in ("item_id", "vector") if name not in found.names]
        if absent:
            raise DataError(
                f"{what}: {file} has no column {' and '.join(absent)}, its columns are "
                f"{', '.join(found.names)}; rename them to item_id and vector"
            )
        table = pq.read_table(file, columns=["item_id", "vector"])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what}: {file} cannot be read as parquet ({error}); write it again") from None
    ids = _id_column(table, file, what)
    given, empty = _vector_column(table, ids, file, what)
    return _join(given, empty, ids, raw_ids, file, what)


def _id_column(table: pa.Table, file: Path, what: str) -> list[str]:
    column = table["item_id"].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (texts or pa.types.is_integer(kind)):
        raise DataError(
            f"{what}: column item_id of {file} must hold text or whole numbers, got {kind}; "
            "write raw item ids as text"
        )
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]) + 1
        raise DataError(f"{what}: {file} row {row} has no item_id; remove the row or name its item")
    return [name.strip() for name in column.cast(pa.large_string()).to_pylist()]  # as tables are read


def _vector_column(table: pa.Table, ids: list[str], file: Path, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The vectors float32 (rows, D), zero where null, and which rows are null."""
    column = table["vector"]
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DataError(f"{what}: column vector of {file} must hold lists of numbers, got {kind}")
    empty = column.is_null().to_numpy()
    present = column.drop_null()
    lengths = pc.list_value_length(present).to_numpy()
    width = int(lengths[0]) if len(lengths) else 0
    if len(lengths) and (width == 0 or (lengths != width).any()):
        at = int(np.argmax(lengths != width)) if width else 0
        row = int(np.flatnonzero(~empty)[at])
        raise DataError(
            f"{what}: {file} row {row + 1} (item {ids[row]!r}) has a vector of {lengths[at]} numbers, "
            f"expected {width or 'at least 1'} as in the first row; all vectors must have one width"
        )
    values = np.zeros((len(ids), max(width, 1)), np.float32)
    rows, start = np.flatnonzero(~empty), 0
    for chunk in present.chunks:  # together they may be more than one list's offsets can count
        numbers = chunk.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
        values[rows[start : start + len(chunk)]] = _to_float32(numbers).reshape(len(chunk), max(width, 1))
        start += len(chunk)
    return values, empty


def _read_safetensors(file: Path, raw_ids: list[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with safe_open(file, framework="np") as handle:
            catalog = (handle.metadata() or {}).get("catalog")
            names = list(handle.keys())
            if "vectors" not in names:
                raise DataError(
                    f"{what}: {file} has no tensor 'vectors', it holds {', '.join(names) or 'none'}"
                )
            kind = handle.get_slice("vectors").get_dtype()
            if kind not in ("F16", "BF16", "F32", "F64"):
                raise DataError(f"{what}: tensor vectors of {file} must be float32, got {kind}; convert it")
            vectors = _bfloat16(file) if kind == "BF16" else _to_float32(handle.get_tensor("vectors"))
            missing = (
                handle.get_tensor("missing") if "missing" in names else np.zeros(vectors.shape[:1], bool)
            )
    except (SafetensorError, OSError) as error:
        raise DataError(f"{what}: {file} cannot be read as safetensors ({error}); write it again") from None
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise DataError(f"{what}: tensor vectors of {file} must be (N + 1, D), got shape {vectors.shape}")
    if missing.shape != (len(vectors),) or missing.dtype != np.bool_:
        raise DataError(
            f"{what}: tensor missing of {file} must be bool ({len(vectors)},), "
            f"got {missing.dtype} {missing.shape}"
        )
    if len(vectors) == 0 or vectors[0].any():
        raise ArtifactMismatchError(
            f"{what}: row 0 of {file} must be zero, as padding; rows 1..N are the items. Set it to zero if "
            "it is padding, or add a zero row in front if it is an item"
        )
    vectors[missing] = 0
    return _order_rows(vectors, missing, catalog, raw_ids, file, what)


def _bfloat16(file: Path) -> np.ndarray:
    """Vectors in a number format that NumPy does not have, as float32."""
    with safe_open(file, framework="pt") as handle:
        return np.asarray(handle.get_tensor("vectors").float().numpy())


def _order_rows(
    vectors: np.ndarray, missing: np.ndarray, catalog: str | None, raw_ids: list[str], file: Path, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bring the rows of a tensor file into item order; see the module's head for the three ways."""
    if catalog is not None:
        if catalog != catalog_of(raw_ids):
            raise ArtifactMismatchError(
                f"{what}: {file} belongs to catalogue {catalog[:12]}, expected {catalog_of(raw_ids)[:12]}; "
                "recompute it for this data set, or store it as parquet with raw ids"
            )
        _check_rows(vectors, len(raw_ids), file, what)
        return vectors, missing
    beside = ids_beside(file)
    if beside.is_file():
        ids = _read_ids(beside, what)
        _check_rows(vectors, len(ids), file, what)
    else:
        _check_rows(vectors, len(raw_ids), file, what)
        ids = [str(row) for row in range(1, len(vectors))]
        if set(ids) != set(raw_ids):
            raise ArtifactMismatchError(
                f"{what}: {file} does not say which row is which item. Put the raw ids of rows 1, 2, ... as "
                f"a JSON list into {beside.name} beside it, or use parquet with columns item_id and vector"
            )
    return _join(vectors[1:], missing[1:], ids, raw_ids, file, what)


def _read_ids(path: Path, what: str) -> list[str]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{what}: {path} cannot be read as JSON ({error})") from None
    if not isinstance(ids, list) or not all(isinstance(entry, str | int) for entry in ids):
        raise DataError(f"{what}: {path} must be a JSON list of raw item ids, entry i for row i + 1")
    return [str(entry) for entry in ids]


def _check_rows(vectors: np.ndarray, num_items: int, file: Path, what: str) -> None:
    if len(vectors) != num_items + 1:
        raise ArtifactMismatchError(
            f"{what}: {file} has {len(vectors)} rows, expected {num_items + 1} (a zero row 0, then one row "
            f"for each of the {num_items} items)"
        )


def _join(
    given: np.ndarray, empty: np.ndarray, ids: list[str], raw_ids: list[str], file: Path, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Pick the row of every item by raw id.

    Args:
        given: float32 (rows, D).
        empty: bool (rows,), rows that stand for "this item has no vector".
        ids: raw id of each row.
    """
    row_of = {raw_id: row for row, raw_id in enumerate(ids)}
    if len(row_of) != len(ids):
        second = next(row for row, raw_id in enumerate(ids) if row_of[raw_id] != row)
        raise DataError(
            f"{what}: {file} names item {ids[second]!r} more than once ({len(ids) - len(row_of)} repeated "
            "rows in all); keep one row per item"
        )
    absent = [raw_id for raw_id in raw_ids if raw_id not in row_of]
    unknown = len(ids) - (len(raw_ids) - len(absent))
    if absent:
        raise ArtifactMismatchError(
            f"{what}: {file} has no row for {len(absent)} of {len(raw_ids)} items, the first is "
            f"{absent[0]!r} (and {unknown} rows for items that the data set does not have). Add the "
            "rows; an item without a vector is a parquet row with a null vector"
        )
    if unknown:
        logger.warning("%s: %d rows of %s are of items outside the data set, left out", what, unknown, file)
    order = np.fromiter((row_of[raw_id] for raw_id in raw_ids), np.int64, len(raw_ids))
    vectors = np.zeros((len(raw_ids) + 1, given.shape[1]), np.float32)
    vectors[1:] = given[order]
    return vectors, np.concatenate([[False], empty[order]])


def _to_float32(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
