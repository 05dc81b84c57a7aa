"""Tables of the Hugging Face Hub, or of a local folder in its form, through `datasets`; no scripts run.

An address is ``hub:NAME``, ``hub:NAME:CONFIG`` or ``hub:NAME:CONFIG:SPLIT``, such as
``hub:McAuley-Lab/Amazon-Reviews-2023:0core_rating_only_Beauty_and_Personal_Care:full``, with ``@REVISION``
behind the name to pin it. Rows stream, and only the columns asked for are kept. Those of CSV files are text,
as in a CSV file that is named by its path: guessed types would make 7 of 007, and nothing of the title NA.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from llmrec.errors import DataError
from llmrec.progress import progress

PREFIX = "hub:"
BLOCK_ROWS = 1 << 16


def read_hub(address: str, columns: list[str]) -> pa.Table:
    """Some columns of a data set.

    Raises:
        DataError: it cannot be had, has several splits, or lacks a column.
    """
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig
    from huggingface_hub.errors import HfHubHTTPError

    name, config, split, revision = parts_of(address)
    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        if isinstance(found, dict):
            if len(found) > 1:
                raise DataError(
                    f"{address} has the splits {', '.join(found)}; name one as hub:NAME:CONFIG:SPLIT (CONFIG "
                    "may be empty)"
                )
            found = next(iter(found.values()))
        known = found.column_names or list(next(iter(found), {}))
        for column in columns:
            if column not in known:
                raise DataError(f"{address} has no column {column!r}; it has: {', '.join(known)}")
        if isinstance(datasets.load_dataset_builder(name, config, revision=revision).config, CsvConfig):
            texts = datasets.Features({column: datasets.Value("string") for column in columns})
            found = datasets.load_dataset(
                name,
                config,
                split=found.split,
                revision=revision,
                streaming=True,
                features=texts,
                keep_default_na=False,
            )
        blocks = found.select_columns(columns).with_format("arrow").iter(batch_size=BLOCK_ROWS)
        tables = [pa.table(block) for block in progress(blocks, f"reading {name}", unit="block")]
    except DataError:
        raise
    # Not found or not reachable: OSError and its kin. A script instead of data files: RuntimeError.
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{address} cannot be read ({reason}). It must be a data set of plain files (parquet, CSV, JSON "
            "lines), public or one you are logged in for, or a local folder of such files"
        ) from None
    if not tables:
        raise DataError(f"{address} has no rows of data; expected at least one")
    return pa.concat_tables(tables, promote_options="permissive")


def warnings_of_address(address: str) -> list[str]:
    """What to know of a data set that may become another one; none of a local folder, which is looked at."""
    name, _, _, revision = parts_of(address)
    if revision is not None or Path(name).is_dir():
        return []
    return [
        f"{address} is read as it is now; with hub:{name}@COMMIT the same data come again, whatever becomes "
        "of it."
    ]


def parts_of(address: str) -> tuple[str, str | None, str | None, str | None]:
    """Name, config, split and revision of an address."""
    match = re.fullmatch(r"hub:([^:@]+)(?:@([^:]+))?(?::([^:]*))?(?::([^:]+))?", address)
    if match is None:
        raise DataError(f"{address!r} is not of the form hub:NAME[@REVISION][:CONFIG[:SPLIT]]")
    name, revision, config, split = match.groups()
    return name, config or None, split, revision
