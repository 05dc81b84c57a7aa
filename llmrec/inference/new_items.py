"""Items that came after training: their vectors, codes and table rows, without training anything.

Text and image vectors come from the catalogue's encoders. What only training could have given, the
collaborative vector and the item's rows of trained tables, is the mean over the items nearest by content, at
the length these have.
Codes are the frozen quantiser's, and the fusion gate sees an item of frequency 0. Known items keep every
number they had.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llmrec.artifacts import CollabEmbeddings
from llmrec.encoders.again import ItemEncoders
from llmrec.errors import ConfigError, DataError
from llmrec.finetune.adapter import per_item
from llmrec.inference.package import Package
from llmrec.interactions import catalog_of
from llmrec.semantic_ids.assign import assign

logger = logging.getLogger("llmrec")

BLOCK = 1 << 22
"""Similarities held at once."""


def extended(
    package: Package,
    items: pa.Table,
    content: dict[str, np.ndarray],
    *,
    present: dict[str, np.ndarray] | None = None,
    neighbours: int = 10,
) -> Package:
    """The package with more items at the end of its catalogue.

    Args:
        package: what was trained.
        items: one row per new item: raw_id, and the text columns that are known.
        content: vectors float32 (n, D_m) of the new items by content modality.
        present: which of them say something of their item, bool (n,) by modality; None: those that are not
            zero. The others do not count where neighbours are sought.
        neighbours: items nearest by content whose mean stands in for what training would have given.

    Raises:
        DataError: ids that are taken, doubled or empty, or an item of which nothing is known.
        ConfigError: there is no content modality to go by.
    """
    check_ids(package, items)
    if isinstance(neighbours, bool) or not isinstance(neighbours, int | np.integer) or neighbours < 1:
        raise DataError(f"neighbours must be a whole number of at least 1, got {neighbours!r}")
    if not content:
        raise ConfigError("new items need text or image vectors, and this catalogue has neither")
    if present is None:
        present = {name: np.asarray(rows.any(axis=1)) for name, rows in content.items()}
    refuse_unknown(items, {name: present[name] for name in content})
    near = nearest(package, content, present, neighbours)
    collab_rows = mean_of(package.collab.vectors, near)
    vectors = {"collab": collab_rows, **content}
    codes = assign(package.ids, {name: vectors[name] for name in package.ids.modalities})
    table = joined(package.items, items)
    catalog = catalog_of(table["raw_id"].to_pylist())
    heads, settings = package.adapter.heads, package.adapter.settings
    return dataclasses.replace(
        package,
        items=table,
        adapter=dataclasses.replace(
            package.adapter,
            catalog=catalog,
            heads=extended_heads(heads, near),
            settings={**settings, "num_added": settings.get("num_added", 0) + len(items)},
        ),
        collab=CollabEmbeddings(
            catalog=catalog,
            provider=package.collab.provider,
            vectors=np.concatenate([package.collab.vectors, collab_rows]),
            metrics=package.collab.metrics,
        ),
        content=dataclasses.replace(
            package.content,
            catalog=catalog,
            vectors=one_below_the_other(package.content.vectors, content),
            missing=one_below_the_other(
                package.content.missing, {name: ~flags for name, flags in present.items()}
            ),
        ),
        ids=dataclasses.replace(
            package.ids, catalog=catalog, codes=one_below_the_other(package.ids.codes, codes)
        ),
    )


def one_below_the_other(known: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by modality with the rows of new items at the end."""
    return {name: np.concatenate([rows, new[name]]) for name, rows in known.items()}


def extended_heads(heads: dict[str, torch.Tensor], near: np.ndarray) -> dict[str, torch.Tensor]:
    """Trained weights with rows for new items, the mean of those of their neighbours (n, k)."""

    def rows_of(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "train_count":
            return value.new_zeros(len(near))
        return torch.from_numpy(mean_of(value.float().numpy(), near)).to(value.dtype)

    length = len(heads["train_count"])
    return {
        name: torch.cat([value, rows_of(name, value)]) if per_item(name) and len(value) == length else value
        for name, value in heads.items()
    }


def refuse_unknown(items: pa.Table, present: dict[str, np.ndarray]) -> None:
    """Raise DataError if no modality says anything of an item."""
    known = np.any(list(present.values()), axis=0)
    if not known.all():
        name = items["raw_id"][int(np.argmin(known))].as_py()
        others = f" (and {more} more)" if (more := (~known).sum() - 1) else ""
        raise DataError(
            f"new items: nothing is known of {name!r}{others} that says what it is like; this recommender "
            f"goes by {' and '.join(present)}"
        )


def content_of(
    package: Package, items: pa.Table, pictures: list[Any], given: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Content vectors float32 (n, D_m) of new items by modality, and which say something of their item,
    bool (n,): ready-made ones, scaled as the catalogue's, else those of the catalogue's encoders.

    Args:
        package: what was trained.
        items: see `item_table`.
        pictures: per item, a file's path, or None.
        given: ready-made vectors (n, D_m) by modality.

    Raises:
        DataError: vectors of another shape, or not finite; a picture that cannot be read.
        ConfigError: the catalogue's vectors came from a file and none are given.
    """
    known = package.content.vectors
    content = {name: np.asarray(rows, np.float32) for name, rows in given.items()}
    for name, rows in content.items():
        fits = name in known and rows.shape == (len(items), known[name].shape[1])
        if not fits or not np.isfinite(rows).all():
            raise DataError(
                f"vectors[{name!r}] must be finite numbers of shape ({len(items)}, width of {name}), got "
                f"{rows.shape}"
            )
    named = sum(picture is not None for picture in pictures)
    if named and "image" not in known:
        logger.warning(
            "add_items: %d of %d items come with a picture, which is not used: this recommender was "
            "trained without pictures", named, len(items),
        )  # fmt: skip
    encoders = ItemEncoders(package.content)
    present: dict[str, np.ndarray] = {}
    for name in known:
        if name in content:
            content[name], present[name] = encoders.given(name, content[name], items)
        elif name == "text":
            content[name], present[name] = encoders.text(items)
        else:
            content[name], present[name] = encoders.image(items, pictures)
    return content, present


def check_id(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise DataError(f"new items: every one needs an id, a text that is not empty, got {name!r:.80}")


def check_ids(package: Package, items: pa.Table) -> None:
    new = items["raw_id"].to_pylist()
    known = set(package.items["raw_id"].to_pylist())
    for name in new:
        check_id(name)
    taken = [name for name in new if name in known]
    if taken:
        raise DataError(f"new items: {len(taken)} ids are in the catalogue, the first is {taken[0]!r}")
    if len(set(new)) < len(new):
        raise DataError("new items: an id is given twice")


def nearest(
    package: Package, content: dict[str, np.ndarray], present: dict[str, np.ndarray], neighbours: int
) -> np.ndarray:
    """Trained items nearest by mean cosine over the content modalities known of both, int64 (n, k).

    Items that were never trained lend nothing, unless there are no others; those of which nothing is known
    that is known of the new item come last.
    """
    trained = np.flatnonzero(package.adapter.heads["train_count"].numpy() > 0)
    if not len(trained):
        trained = np.arange(1, len(package.collab.vectors))
    k = min(neighbours, len(trained))
    known, new, known_there, new_there = [], [], [], []
    for name, rows in content.items():
        table = package.content.vectors[name][trained].astype(np.float64)
        centre = table.mean(axis=0)
        # What stands for a missing vector lies near the centre, in whatever direction rounding has it.
        known_there.append(~package.content.missing[name][trained])
        new_there.append(present[name])
        known.append(unit(table - centre) * known_there[-1][:, None])
        new.append(unit(rows - centre) * new_there[-1][:, None])
    known_rows, new_rows = np.concatenate(known, axis=1), np.concatenate(new, axis=1)
    of_known, of_new = (np.stack(there, axis=1).astype(np.float64) for there in (known_there, new_there))
    found = []
    size = max(1, BLOCK // len(trained))
    for start in range(0, len(new_rows), size):
        block = slice(start, start + size)
        shared = of_new[block] @ of_known.T
        similarity = new_rows[block] @ known_rows.T / np.maximum(shared, 1)
        similarity[shared == 0] = -np.inf
        found.append(np.argpartition(-similarity, k - 1, axis=1)[:, :k])
    return trained[np.concatenate(found)]


def mean_of(table: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Mean rows of neighbours (n, k), as long as these are on average, float32 (n, D).

    A plain mean of vectors that point in different directions is shorter than all of them, and shorter
    vectors score lower, so that new items would stand behind every item that was trained.
    """
    rows = table[near].astype(np.float64)
    length = np.linalg.norm(rows, axis=2).mean(axis=1, keepdims=True)
    return (unit(rows.mean(axis=1)) * length).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def joined(known: pa.Table, new: pa.Table) -> pa.Table:
    """The item tables one below the other; columns the new one lacks are empty, those of its own dropped."""
    columns = {}
    for field in known.schema:
        if field.name in new.column_names:
            below = new[field.name].cast(field.type).combine_chunks()
        elif field.name == "train_count":
            below = pa.array([0] * len(new), field.type)
        else:
            below = pa.nulls(len(new), field.type)
        columns[field.name] = pa.chunked_array([*known[field.name].chunks, below])
    return pa.table(columns)


def item_table(items: Sequence[Mapping[str, Any]], columns: list[str]) -> pa.Table:
    """New items as a table: raw_id, and the known text columns that they have.

    Raises:
        DataError: an item is not a mapping, has no id, a picture that is no path, a column that the catalogue
            does not have, or one that holds no text.
    """
    names = [name for name in columns if name not in ("raw_id", "train_count")]
    allowed = {"item_id", "image", *names}
    for item in items:
        if not isinstance(item, Mapping) or "item_id" not in item:
            raise DataError(f"new items: each must be a mapping with item_id, got {item!r:.80}")
        extra = sorted(map(str, set(item) - allowed))
        if extra:
            raise DataError(
                f"new items: {', '.join(extra)} is no column of the catalogue ({', '.join(sorted(allowed))})"
            )
        check_id(item["item_id"])
        if not isinstance(item.get("image"), str | os.PathLike | None):
            raise DataError(
                f"new items: image of {item['item_id']!r} must be a file's path, got {item['image']!r:.80}"
            )
        for name in names:
            if not isinstance(item.get(name), str | None):
                raise DataError(
                    f"new items: {name} of {item['item_id']!r} must be a text or None, got {item[name]!r:.80}"
                )
    made: dict[str, pa.Array] = {"raw_id": pa.array([item["item_id"] for item in items], pa.string())}
    for name in names:
        made[name] = pa.array([item.get(name) for item in items], pa.string())
    return pa.table(made)
