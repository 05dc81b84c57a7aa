"""The items file: titles, other texts and pictures by raw item id."""

from __future__ import annotations

import errno
import logging
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.config import given
from llmrec.data.config import PrepareDataConfig
from llmrec.data.pictures import Picture, PictureLimits, fetch_pictures
from llmrec.data.sources import Log, id_column, text_column
from llmrec.data.table_file import TableFile
from llmrec.errors import DataError
from llmrec.interactions import Interactions

logger = logging.getLogger("llmrec")

PICTURE_LIMITS = PictureLimits()


def picture_root(config: PrepareDataConfig) -> Path | None:
    """Folder that picture paths are relative to, by the settings; None where they name no pictures."""
    if config.image_folder is not None:
        return Path(config.image_folder).resolve()
    if config.items is None or config.image_column is None:
        return None
    return Path(config.items).resolve().parent


def with_pictures_found(config: PrepareDataConfig, data: Interactions) -> Interactions:
    """The data, which look for their pictures where the settings say, if these are not where they were."""
    root = picture_root(config)
    if root is not None and data.image_root is not None and not data.image_root.is_dir() and root.is_dir():
        logger.info("prepare_data: pictures are looked for in %s, no longer in %s", root, data.image_root)
        object.__setattr__(data, "image_root", root)
    return data


class ItemFile:
    """What an items file says; nothing at all where there is no such file.

    Raises:
        DataError: missing columns, an empty id, two rows for one item that differ.
    """

    def __init__(self, config: PrepareDataConfig) -> None:
        self.path = Path(config.items) if config.items is not None else None
        self.title, self.texts, self.image = config.title_column, config.text_columns, config.image_column
        self.url, self.folder, self.offline = config.image_url_column, config.image_folder, config.offline
        self.root = picture_root(config)
        self.fetched: dict[str, Picture] = {}
        self.repeated_rows = 0
        """Rows that say once more what an earlier one says"""
        self.columns: dict[str, pa.ChunkedArray] = {}
        if self.path is None:
            return
        optional = [name for name in (self.title, *self.texts, self.image, self.url) if name is not None]
        file = TableFile(self.path)
        item = config.items_item_column or config.item_column
        table = file.read([item, *optional])
        self.ids = id_column(table, file, item).combine_chunks()
        self.columns = {name: text_column(table, file, name) for name in optional}
        self._keep_first_rows(item)

    def knows(self, log: Log, what: str) -> np.ndarray:
        """Which interactions have an item of this file; bool (n,).

        Args:
            log: the interactions.
            what: 'error' to refuse unknown items, 'drop' to let them pass as False.
        """
        if self.path is None:
            return np.ones(len(log), dtype=bool)
        known = pc.is_in(pa.array(log.items, pa.string()), self.ids).to_numpy(zero_copy_only=False)[log.item]
        if what == "error" and not known.all():
            index = int(np.argmin(known))
            item = str(log.items[log.item[index]])
            there = set(self.ids.to_pylist())
            alike = next((form for form in other_forms(item) if form in there), None)
            advice = "Add it there" if alike is None else f"{alike!a} is: write ids alike in both files"
            raise DataError(
                f"{log.place(index)}: item {item!r} is not in {self.path} ({(~known).sum()} such "
                f"interactions). {advice}, or set prepare_data.unknown_items=drop"
            )
        return known

    def table(self, raw_ids: np.ndarray) -> tuple[pa.Table, dict[str, int]]:
        """Columns raw_id, title, further texts and image_path in the order of raw_ids; and counts."""
        names = pa.array(raw_ids, pa.string())
        empty = pa.repeat(pa.scalar(""), len(names))
        columns: dict[str, Any] = {"raw_id": names, "title": empty}
        counts: dict[str, int] = {}
        if self.path is None:
            return pa.table(columns | {"image_path": pa.nulls(len(names), pa.string())}), counts
        place = pc.index_in(names, self.ids)
        taken = {name: column.take(place) for name, column in self.columns.items()}
        if self.title is not None:
            columns["title"] = single_spaced(taken[self.title])
            counts["items_without_title"] = pc.sum(pc.equal(columns["title"], "")).as_py()
        columns |= {name: single_spaced(taken[name]) for name in self.texts}
        images: list[str | None] = [None] * len(names)
        if self.image is not None:
            paths = [name.strip() for name in taken[self.image].to_pylist()]
            images = [name if name and is_there(given(self.root) / name) else None for name in paths]
            counts["items_without_picture_path"] = paths.count("")
            counts["missing_picture_files"] = images.count(None) - paths.count("")
        if self.url is not None:
            images, more = self.fetch(raw_ids, taken[self.url].to_pylist())
            counts |= more
        counts["items_without_interactions"] = len(self.ids) - len(names)
        return pa.table(columns | {"image_path": pa.array(images, pa.string())}), counts

    def fetch(self, raw_ids: np.ndarray, addresses: list[str]) -> tuple[list[str | None], dict[str, int]]:
        """Paths of the items' pictures, fetched where they are not there; and counts by status."""
        wanted = [(item, url.split("|")[0].strip()) for item, url in zip(raw_ids, addresses)]
        wanted = [(item, url) for item, url in wanted if url]
        new = [(item, url) for item, url in wanted if url not in self.fetched]
        if new:
            found = fetch_pictures(new, Path(given(self.folder)), PICTURE_LIMITS, offline=self.offline)
            self.fetched |= {picture.url: picture for picture in found}
        place = {item: self.fetched[url] for item, url in wanted}
        images = [place[item].path if item in place else None for item in raw_ids]
        status = [picture.status for picture in place.values()]
        counts = {
            "items_without_picture_address": len(images) - len(wanted),
            "pictures_not_fetched": len(status) - status.count("ok"),
            "pictures_that_may_come": status.count("failed") + status.count("offline"),
        }
        return images, counts

    def _keep_first_rows(self, column: str) -> None:
        """Leave out rows that repeat an earlier one in all that is read; others are an error."""
        encoded = self.ids.dictionary_encode().indices.to_numpy()
        first = np.unique(encoded, return_index=True)[1][encoded]
        again = np.flatnonzero(first != np.arange(len(first)))
        differs = np.zeros(len(again), dtype=bool)
        for values in self.columns.values():
            differs |= pc.not_equal(values.take(again), values.take(first[again])).to_numpy()
        if differs.any():
            index = int(again[np.argmax(differs)])
            file = TableFile(given(self.path))
            raise DataError(
                f"{file}, row {file.row(index)}, column {column!r}: item "
                f"{self.ids[index].as_py()!r} already stands in row {file.row(int(first[index]))}, which "
                f"says something else; keep one row per item ({differs.sum()} rows too many)"
            )
        if len(again):
            logger.warning("%s: %d rows repeat an earlier one and are left out", self.path, len(again))
            kept = np.unique(first)
            self.repeated_rows, self.ids = len(again), self.ids.take(kept)
            self.columns = {name: values.take(kept) for name, values in self.columns.items()}


def single_spaced(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts with single spaces for all that is space, line ends among it, and none around them."""
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
    return pc.binary_join(words, " ")


def is_there(file: Path) -> bool:
    """Whether there is such a file; a text that can be no file's name, such as a whole picture in base64, has
    none."""
    try:
        return file.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def other_forms(raw_id: str) -> list[str]:
    """How programs may write the same id: 11.0 for 11, 007 for 7, with spaces, in other letters, or with the
    accents of letters as characters of their own."""
    bare = raw_id.strip()
    whole = bare.removesuffix(".0")
    composed = [unicodedata.normalize(form, bare) for form in ("NFC", "NFD")]
    return [bare, whole, f"{bare}.0", whole.lstrip("0") or "0", bare.upper(), bare.lower(), *composed]
