"""What stages hand over to each other: plain data that checks itself, saves and loads.

Tables are parquet, tensors safetensors, numbers JSON. Every tensor file carries the catalogue
hash in its header. Arrays here are NumPy, so that reading an artefact costs no torch import.

Shape letters of the whole package: B batch, T history, N items, U users, D embedding,
H base-model width, L levels, K codes, M modalities, S sources.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.errors import ArtifactMismatchError
from llmrec.files import load_arrays, read_json, read_jsonl, save_arrays, write_json, write_jsonl

Modality = Literal["collab", "text", "image"]
Split = Literal["train", "valid", "test"]

BRIEF = 4
"""Most entries that `brief` shows one by one."""
LONGEST = 60
"""Most letters of anything else."""

SPLIT_CODES: dict[str, int] = {"train": 0, "valid": 1, "test": 2, "context": 3}
"""Values of the split column. ``context``: shown as history, never trained on nor ranked."""


def catalog_of(raw_ids: list[str]) -> str:
    """sha256 of the item order; two artefacts fit together only if theirs are equal."""
    return hashlib.sha256("\n".join(raw_ids).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Items to predict and the histories they are predicted from, as index ranges.

    The history of target e is ``interactions.item[start[e]:stop[e]]`` (may be empty). All int64 (E,).
    """

    user: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    item: np.ndarray

    def __len__(self) -> int:
        return len(self.item)

    def take(self, index: np.ndarray) -> Targets:
        """The chosen targets, in that order."""
        return Targets(
            user=self.user[index], start=self.start[index], stop=self.stop[index], item=self.item[index]
        )


class Sequences(NamedTuple):
    """Part of what users did: those of user u are ``item[offset[u]:offset[u + 1]]``, with their times."""

    offset: np.ndarray
    """int64 (U + 1,)"""
    item: np.ndarray
    """int64 (n,)"""
    time: np.ndarray
    """int64 (n,)"""


class Shown:
    """What artefacts look like in a notebook: fields with their sizes, not a million ids."""

    def __repr__(self) -> str:
        shown = (f"{field.name}={brief(getattr(self, field.name))}" for field in fields(cast(Any, self)))
        return f"{type(self).__name__}({', '.join(shown)})"


def brief(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, pa.Table):
        return f"table of {value.num_rows:,} rows"
    if isinstance(value, dict) and len(value) <= BRIEF:
        return "{" + ", ".join(f"{key}: {brief(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (dict, list, tuple)) and len(value) > BRIEF:
        return f"{type(value).__name__} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@dataclass(frozen=True, kw_only=True, repr=False)
class Interactions(Shown):
    """Who interacted with what, in time order, split; made by prepare_data.

    Users are 0..U-1 and items 1..N inside the package; people see ``user_raw_ids`` and the
    ``raw_id`` column of ``items``. The interactions of user u are ``item[offset[u]:offset[u + 1]]``.
    """

    stage: ClassVar[str] = "prepare_data"

    user_raw_ids: list[str]
    items: pa.Table
    """One row per item in id order: raw_id, title, train_count, optional text columns, image_path."""
    offset: np.ndarray
    """int64 (U + 1,)"""
    item: np.ndarray
    """int64 (n,), item ids 1..N"""
    timestamp: np.ndarray
    """int64 (n,), as given (position in the file where the source has none)"""
    split: np.ndarray
    """int8 (n,), see SPLIT_CODES; train rows come first in every user"""
    summary: dict[str, Any]
    """Counts, filters, tie figures and warnings, for the report."""
    image_root: Path | None = None
    """Folder that image_path is relative to."""
    images: dict[str, bytes] = field(default_factory=dict)
    """Files to be written below the artefact's own folder (sample market), by image_path."""
    true_scores: np.ndarray | None = None
    """float32 (U, N + 1): true probability of each user's next item at the test target, where known."""

    def __post_init__(self) -> None:
        users, rows = len(self.user_raw_ids), len(self.item)
        if len(self.offset) != users + 1 or self.offset[0] != 0 or self.offset[-1] != rows:
            raise ArtifactMismatchError(
                f"interactions: offset must run from 0 to {rows} in {users + 1} entries"
            )
        if not (len(self.timestamp) == len(self.split) == rows):
            raise ArtifactMismatchError("interactions: item, timestamp and split differ in length")
        if rows and (self.item.min() < 1 or self.item.max() > self.num_items):
            raise ArtifactMismatchError(
                f"interactions: item ids must lie in 1..{self.num_items}, "
                f"got {self.item.min()}..{self.item.max()}"
            )
        counts = np.bincount(self.item[self.split == 0], minlength=self.num_items + 1)
        if not np.array_equal(counts, self.train_count):
            raise ArtifactMismatchError("items.train_count does not match the train split")

    @property
    def num_users(self) -> int:
        return len(self.user_raw_ids)

    @property
    def num_items(self) -> int:
        """N, without the padding row."""
        return self.items.num_rows

    @property
    def raw_ids(self) -> list[str]:
        """Raw item ids; entry i belongs to item i + 1."""
        return self.items["raw_id"].to_pylist()

    @property
    def titles(self) -> list[str]:
        """Item titles ('' where missing); entry i belongs to item i + 1."""
        return self.items["title"].to_pylist()

    @property
    def catalog(self) -> str:
        return catalog_of(self.raw_ids)

    @property
    def train_count(self) -> np.ndarray:
        """Interactions per item in the train split, int64 (N + 1,), entry 0 is 0."""
        return np.concatenate([[0], self.items["train_count"].to_numpy()]).astype(np.int64)

    @property
    def knows_times(self) -> bool:
        """Whether timestamps are times, not the places of a user's interactions."""
        return not self.summary.get("times_are_positions", self.summary.get("source") == "sequences")

    def image_file(self, item_id: int) -> Path | None:
        """Where the picture of an item lies, or None if it has none."""
        path = self.items["image_path"][item_id - 1].as_py()
        return self.image_root / path if path and self.image_root else None

    def pictures_digest(self) -> str | None:
        """Hash of names and sizes of the items' picture files; None if there are none, or some are gone."""
        paths = [path for path in self.items["image_path"].to_pylist() if path]
        if not paths or self.image_root is None:
            return None
        digest = hashlib.sha256()
        for path in paths:
            try:
                size = (self.image_root / path).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None
            digest.update(f"{path}\0{size}\0".encode())
        return digest.hexdigest()

    def sequences(self, *splits: Split) -> Sequences:
        """The interactions of these splits alone, by user and time."""
        keep = np.isin(self.split, [SPLIT_CODES[split] for split in splits])
        cumulative = np.concatenate([[0], np.cumsum(keep)])
        return Sequences(cumulative[self.offset], self.item[keep], self.timestamp[keep])

    def targets(
        self, *splits: Split, max_history: int | None = None, max_targets: int | None = None
    ) -> Targets:
        """Every interaction of a split, or of several, as a target, in user and time order.

        Args:
            splits: which interactions are targets. A train target's history is everything before
                it, so the first one of a user has an empty history.
            max_history: context length in items. Kept targets of one user share windows, each of the
                `max_history` items before its last target, so that their histories are prefixes of each
                other: a target sees 1 to `max_history` items. None: unlimited.
            max_targets: keep only the last so many targets of each user. None: all.
        """
        row = np.flatnonzero(np.isin(self.split, [SPLIT_CODES[split] for split in splits]))
        user = np.searchsorted(self.offset, row, side="right") - 1
        last = np.append(user[1:] != user[:-1], True)
        if max_targets is not None and len(row):
            end = np.flatnonzero(last)[np.cumsum(last) - last]
            keep = end - np.arange(len(row)) < max_targets
            row, user, last = row[keep], user[keep], last[keep]
        start = self.offset[user]
        if max_history is not None and len(row):
            last_row = row[np.flatnonzero(last)[np.cumsum(last) - last]]
            windows_later = (last_row - row) // max_history
            start = np.maximum(start, last_row - (windows_later + 1) * max_history)
        return Targets(user=user, start=start, stop=row, item=self.item[row])

    def save(self, folder: Path) -> None:
        user = np.repeat(np.arange(self.num_users), np.diff(self.offset))
        names = np.array(list(SPLIT_CODES))
        pq.write_table(
            pa.table(
                {
                    "user_id": user,
                    "item_id": self.item,
                    "timestamp": self.timestamp,
                    "split": pa.array(names[self.split]).dictionary_encode(),
                }
            ),
            folder / "interactions.parquet",
        )
        pq.write_table(pa.table({"raw_id": self.user_raw_ids}), folder / "users.parquet")
        pq.write_table(self.items, folder / "items.parquet")
        root = None if self.image_root is None or self.images else str(self.image_root)
        write_json(
            folder / "summary.json",
            {"catalog": self.catalog, "image_root": root, **self.summary},
        )
        for path, content in self.images.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        if self.true_scores is not None:
            save_arrays(folder / "true_scores.safetensors", self.catalog, scores=self.true_scores)

    @classmethod
    def load(cls, folder: str | Path) -> Interactions:
        folder = Path(folder)
        table = pq.read_table(folder / "interactions.parquet")
        users = pq.read_table(folder / "users.parquet")["raw_id"].to_pylist()
        split = table["split"].cast(pa.string()).to_numpy(zero_copy_only=False)
        counts = np.bincount(table["user_id"].to_numpy(), minlength=len(users))
        summary = read_json(folder / "summary.json")
        catalog, root = summary.pop("catalog"), summary.pop("image_root")
        items = pq.read_table(folder / "items.parquet")
        truth = folder / "true_scores.safetensors"
        loaded = cls(
            user_raw_ids=users,
            items=items,
            offset=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            item=table["item_id"].to_numpy().copy(),  # arrow's own memory is read-only
            timestamp=table["timestamp"].to_numpy().copy(),
            split=np.select([split == name for name in SPLIT_CODES], list(SPLIT_CODES.values())).astype(
                np.int8
            ),
            summary=summary,
            image_root=Path(root) if root else folder,
            true_scores=load_arrays(truth, catalog)["scores"] if truth.exists() else None,
        )
        if loaded.catalog != catalog:
            raise ArtifactMismatchError(f"{folder}: items.parquet is not the table it was saved with")
        return loaded


@dataclass(frozen=True, kw_only=True, repr=False)
class CollabEmbeddings(Shown):
    """Collaborative item vectors and the sequence model that learned them; made by train_collab."""

    stage: ClassVar[str] = "train_collab"

    catalog: str
    provider: str
    """Name of the sequence model, or ``precomputed``."""
    vectors: np.ndarray
    """float32 (N + 1, D), row 0 zero"""
    model: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments that rebuild the model; empty for ready-made vectors."""
    state: dict[str, np.ndarray] = field(default_factory=dict)
    """The model's weights; empty for ready-made vectors."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Validation metrics of the epoch kept, number of epochs, items never trained, and ``trained_on``, the
    splits that the model learned from (not known of ready-made vectors)."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """One row per epoch: epoch, train_loss, valid ndcg@10 and recall@10, seconds."""

    @property
    def knows_valid(self) -> bool:
        """Whether the model learned from validation items, so that these can measure nothing made of it."""
        return "valid" in self.metrics.get("trained_on", ())

    def __post_init__(self) -> None:
        check_item_rows(self.vectors, "collab embeddings")

    def save(self, folder: Path) -> None:
        save_arrays(folder / "item_embeddings.safetensors", self.catalog, vectors=self.vectors)
        if self.state:
            save_arrays(folder / "model.safetensors", self.catalog, **self.state)
        content = {"catalog": self.catalog, "provider": self.provider, "model": self.model}
        write_json(folder / "provider.json", content)
        write_json(folder / "metrics.json", self.metrics)
        write_jsonl(folder / "log.jsonl", self.log)

    @classmethod
    def load(cls, folder: str | Path) -> CollabEmbeddings:
        folder = Path(folder)
        content = read_json(folder / "provider.json")
        weights = folder / "model.safetensors"
        return cls(
            vectors=load_arrays(folder / "item_embeddings.safetensors", content["catalog"])["vectors"],
            state=load_arrays(weights, content["catalog"]) if weights.exists() else {},
            metrics=read_json(folder / "metrics.json"),
            log=read_jsonl(folder / "log.jsonl"),
            **content,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class ContentEmbeddings(Shown):
    """Text and image vectors of the items, whichever were asked for; made by encode_items."""

    stage: ClassVar[str] = "encode_items"

    catalog: str
    vectors: dict[str, np.ndarray]
    """By modality ('text', 'image'): float32 (N + 1, D_m), row 0 zero"""
    missing: dict[str, np.ndarray]
    """By modality: bool (N + 1,), items without text or picture; entry 0 is False"""
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By modality: encoder name, model id, revision, pooling, preprocessing, width, counts, settings."""
    fitted: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """By modality: what an encoder learned from these items and needs for others (TF-IDF, PCA)."""

    def __post_init__(self) -> None:
        for modality, vectors in self.vectors.items():
            check_item_rows(vectors, f"{modality} embeddings")
            if self.missing[modality].shape != (len(vectors),):
                raise ArtifactMismatchError(f"{modality}: one missing flag per item is needed")

    def save(self, folder: Path) -> None:
        for modality, vectors in self.vectors.items():
            save_arrays(
                folder / f"{modality}.safetensors",
                self.catalog,
                vectors=vectors,
                missing=self.missing[modality],
            )
        for modality, arrays in self.fitted.items():
            save_arrays(folder / f"{modality}_fitted.safetensors", self.catalog, **arrays)
        content = {"catalog": self.catalog, "encoders": self.encoders, "fitted": list(self.fitted)}
        write_json(folder / "encoders.json", content)

    @classmethod
    def load(cls, folder: str | Path) -> ContentEmbeddings:
        folder = Path(folder)
        content = read_json(folder / "encoders.json")
        arrays = {
            modality: load_arrays(folder / f"{modality}.safetensors", content["catalog"])
            for modality in content["encoders"]
        }
        fitted = {
            modality: load_arrays(folder / f"{modality}_fitted.safetensors", content["catalog"])
            for modality in content.pop("fitted")
        }
        return cls(
            vectors={modality: found["vectors"] for modality, found in arrays.items()},
            missing={modality: found["missing"] for modality, found in arrays.items()},
            fitted=fitted,
            **content,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class SemanticIds(Shown):
    """Codes of every item and the code embeddings behind them; made by learn_semantic_ids."""

    stage: ClassVar[str] = "learn_semantic_ids"

    catalog: str
    codes: dict[str, np.ndarray]
    """By modality: int64 (N + 1, L); row 0 is 0 and never used (code 0 is a real code)"""
    codebooks: dict[str, np.ndarray]
    """By modality: float32 (L, K, D), the trained code embeddings"""
    quality: dict[str, Any] = field(default_factory=dict)
    """Utilisation, perplexity, dead codes, collisions, reconstruction, Kendall's tau."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """One row per logged epoch: epoch, total loss and its parts by modality."""
    state: dict[str, np.ndarray] = field(default_factory=dict)
    """Weights of the frozen quantiser, for items added later."""
    model: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments that rebuild the quantiser."""

    def __post_init__(self) -> None:
        for modality, codes in self.codes.items():
            levels, size, _ = self.codebooks[modality].shape
            if codes.ndim != 2 or codes.shape[1] != levels or codes.min() < 0 or codes.max() >= size:
                raise ArtifactMismatchError(
                    f"{modality}: codes must be (N + 1, {levels}) with values 0..{size - 1}, got shape "
                    f"{codes.shape} with values {codes.min()}..{codes.max()}"
                )

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.codes)

    def save(self, folder: Path) -> None:
        for modality, codes in self.codes.items():
            save_arrays(
                folder / f"{modality}.safetensors",
                self.catalog,
                codes=codes,
                codebooks=self.codebooks[modality],
            )
        save_arrays(folder / "quantizer.safetensors", self.catalog, **self.state)
        content = {"catalog": self.catalog, "modalities": list(self.codes), "model": self.model}
        write_json(folder / "semantic_ids.json", content)
        write_json(folder / "quality.json", self.quality)
        write_jsonl(folder / "log.jsonl", self.log)

    @classmethod
    def load(cls, folder: str | Path) -> SemanticIds:
        folder = Path(folder)
        content = read_json(folder / "semantic_ids.json")
        catalog = content["catalog"]
        arrays = {
            modality: load_arrays(folder / f"{modality}.safetensors", catalog)
            for modality in content["modalities"]
        }
        return cls(
            catalog=catalog,
            codes={modality: found["codes"] for modality, found in arrays.items()},
            codebooks={modality: found["codebooks"] for modality, found in arrays.items()},
            quality=read_json(folder / "quality.json"),
            log=read_jsonl(folder / "log.jsonl"),
            state=load_arrays(folder / "quantizer.safetensors", catalog),
            model=content["model"],
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Shown):
    """Metrics and one row per ranked user; made by evaluate."""

    stage: ClassVar[str] = "evaluate"

    catalog: str
    metrics: dict[str, Any]
    """num_users, rows (method -> metric -> value), groups and more; see evaluation/report.py."""
    rankings: pa.Table
    """One row per ranked user: raw ids, rank and top items per method."""
    html: str
    """The report page; stands alone offline."""

    def save(self, folder: Path) -> None:
        write_json(folder / "metrics.json", {"catalog": self.catalog, **self.metrics})
        pq.write_table(self.rankings, folder / "rankings.parquet")
        (folder / "report.html").write_text(self.html, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        folder = Path(folder)
        metrics = read_json(folder / "metrics.json")
        return cls(
            catalog=metrics.pop("catalog"),
            metrics=metrics,
            rankings=pq.read_table(folder / "rankings.parquet"),
            html=(folder / "report.html").read_text(encoding="utf-8"),
        )


def check_item_rows(vectors: np.ndarray, what: str, *, num_items: int | None = None) -> None:
    """Raise unless vectors are finite float32 (N + 1, D) with an all-zero row 0."""
    if vectors.ndim != 2 or vectors.shape[1] == 0 or vectors[0].any():
        raise ArtifactMismatchError(
            f"{what} must be (num_items + 1, dim) with an all-zero padding row 0, "
            f"got shape {tuple(vectors.shape)}"
        )
    if vectors.dtype != np.float32:
        raise ArtifactMismatchError(f"{what} must be float32, got {vectors.dtype}")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ArtifactMismatchError(
            f"{what}: {len(bad)} rows hold NaN or infinity, the first is item {bad[0]}"
        )
    if num_items is not None and len(vectors) != num_items + 1:
        raise ArtifactMismatchError(f"{what} have {len(vectors)} rows, expected {num_items + 1}")


def check_same_catalog(*artifacts: Any) -> None:
    """Raise unless all artefacts were made for one item order."""
    first = artifacts[0]
    for other in artifacts[1:]:
        if other.catalog != first.catalog:
            raise ArtifactMismatchError(
                f"{first.stage} and {other.stage} were made for different catalogues "
                f"({first.catalog[:12]} and {other.catalog[:12]}); recompute the older one from the "
                "same prepare_data folder"
            )
