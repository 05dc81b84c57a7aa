"""Vectors of items that came later, by the encoders that made the catalogue's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec.artifacts import ContentEmbeddings
from llmrec.config import from_dict
from llmrec.encoders.config import ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import image_encoder, item_texts, say_something, text_encoder
from llmrec.encoders.encoder import Encoder, encode_pictures, encode_texts, finish
from llmrec.encoders.pictures import read_picture
from llmrec.errors import ConfigError


class ItemEncoders:
    """The text and image encoders of a catalogue, loaded when first needed.

    Args:
        content: what encode_items made of the catalogue.
    """

    def __init__(self, content: ContentEmbeddings) -> None:
        self.content = content
        self.loaded: dict[str, Encoder] = {}

    def text(self, items: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Vectors float32 (n, D) of items, and which have a text (the others get what such items got before).

        Args:
            items: one row per item with the text columns of the catalogue; absent columns count as empty.

        Raises:
            ConfigError: the catalogue's text vectors came from a file.
        """
        config = self._as_recorded(TextEncoderConfig, "text")
        columns = self._about("text")["columns"]
        for name in columns:
            if name not in items.column_names:
                items = items.append_column(name, pa.nulls(len(items), pa.string()))
        if config.template is None:
            config = replace(config, columns=tuple(columns))
        texts, _ = item_texts(config, items)
        present = say_something(texts)
        chosen = [text for text, there in zip(texts, present) if there]
        if not chosen:
            return self._finish("text", np.zeros((0, 1), np.float32), present, items)
        if "text" not in self.loaded:
            if config.encoder == "tfidf":
                from llmrec.encoders.tfidf import FittedTfidf

                self.loaded["text"] = FittedTfidf(self.content.fitted["text"])
            else:
                self.loaded["text"] = text_encoder(config, chosen)
        vectors = encode_texts(self.loaded["text"], chosen, config.batch_size)
        known = vectors.any(axis=1)  # of words that were never seen TF-IDF makes nothing
        present[present] = known
        return self._finish("text", vectors[known], present, items)

    def image(self, items: pa.Table, pictures: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors float32 (n, D) of items, and which have a picture that can be read.

        Args:
            items: one row per item, with raw_id.
            pictures: per item, a file's path, or None.

        Raises:
            ConfigError: the catalogue's image vectors came from a file.
            DataError: a picture cannot be read and the settings say so.
        """
        config = self._as_recorded(ImageEncoderConfig, "image")
        present = np.array([picture is not None for picture in pictures], dtype=bool)
        chosen = np.flatnonzero(present).tolist()
        if not chosen:
            return self._finish("image", np.zeros((0, 1), np.float32), present, items)
        if "image" not in self.loaded:
            self.loaded["image"] = image_encoder(config)
        names = items["raw_id"].to_pylist()

        def read(source: int) -> Any:
            return read_picture(
                pictures[source],
                names[source],
                max_pixels=config.max_pixels,
                on_error=config.on_error,
                advice="Give another picture, or leave it out of this item",
            )

        vectors, readable = encode_pictures(self.loaded["image"], chosen, read, config.batch_size)
        if config.encoder == "classical" and len(vectors):
            from llmrec.encoders.classical import project

            vectors = project(vectors, self.content.fitted["image"])
        present[chosen] = readable
        return self._finish("image", vectors, present, items)

    def given(self, modality: str, vectors: np.ndarray, items: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Vectors float32 (n, D) of items that come ready-made, scaled as the catalogue's, and which are not
        zero."""
        present = np.asarray(vectors.any(axis=1))
        return self._finish(modality, vectors[present], present, items)

    def _as_recorded(self, kind: Any, name: str) -> Any:
        """The encoder's settings, at the commits that the catalogue's vectors were made with."""
        about = self._about(name)
        config = from_dict(kind, about["settings"])
        commits = {of: about[of] for of in ("revision", "adapter_revision") if about.get(of)}
        return replace(config, **commits)

    def _finish(
        self, modality: str, vectors: np.ndarray, present: np.ndarray, items: pa.Table
    ) -> tuple[np.ndarray, np.ndarray]:
        about = self.content.encoders[modality]
        if not len(vectors):  # nobody knows how wide none are
            vectors = np.zeros((0, self._width(modality)), np.float32)
        rows, missing = finish(
            vectors, present, normalise=about["normalised"], missing="zero", what=f"new items, {modality}",
            raw_ids=items["raw_id"].to_pylist(),
        )  # fmt: skip
        known = self.content.missing[modality]
        if missing.any() and about["missing"] == "mean":
            rows[missing] = self.content.vectors[modality][1:][~known[1:]].mean(axis=0, dtype=np.float64)
        return rows[1:], present

    def _width(self, modality: str) -> int:
        return self.content.vectors[modality].shape[1]

    def _about(self, modality: str) -> dict[str, Any]:
        about = self.content.encoders[modality]
        if about["encoder"] == "precomputed":
            raise ConfigError(
                f"the catalogue's {modality} vectors came from a file, so new items need theirs from you: "
                f"give vectors={{{modality!r}: ...}}"
            )
        return about
