"""What stages hand over to each other: plain data that checks itself, saves and loads.

Tables are parquet, tensors safetensors, numbers JSON. Every tensor file carries the catalogue
hash in its header. Arrays here are NumPy, so that reading an artefact costs no torch import.
Two artefacts are equal when they are one object; `llmrec.contents` says whether folders hold the same.

Shape letters of the whole package: B batch, T history, N items, U users, D embedding,
H base-model width, L levels, K codes, M modalities, S sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.errors import ArtifactMismatchError
from llmrec.files import load_arrays, read_json, read_jsonl, save_arrays, write_json, write_jsonl
from llmrec.shown import Shown


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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
    """Validation metrics of the epoch kept, number of epochs, items never trained, mean length of the item
    vectors, and ``trained_on``, the splits that the model learned from (not known of ready-made vectors)."""
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


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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

    @staticmethod
    def files(folder: str | Path, modalities: Iterable[str]) -> dict[str, str]:
        """Where `save` writes what describes the codes, as '', and each modality's codes."""
        folder = Path(folder)
        codes = {modality: str(folder / f"{modality}.safetensors") for modality in modalities}
        return {"": str(folder / "semantic_ids.json"), **codes}

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


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
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

    def __str__(self) -> str:
        """The headline table."""
        from llmrec.evaluation.table import format_table

        return format_table(self.metrics)

    def _repr_html_(self) -> str:
        from llmrec.evaluation.table import html_table

        return html_table(self.metrics)

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
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ArtifactMismatchError(
            f"{what} must be of shape (num_items + 1, dim), got {tuple(vectors.shape)}"
        )
    if vectors.dtype != np.float32:
        raise ArtifactMismatchError(f"{what} must be float32, got {vectors.dtype}")
    if vectors[0].any():
        raise ArtifactMismatchError(
            f"{what}: row 0 is padding and must be zero, got values up to {np.abs(vectors[0]).max():.3g}; "
            "items are rows 1 to num_items"
        )
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
