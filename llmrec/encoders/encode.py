"""encode_items: content vectors of every item, text and image, each by the encoder the settings name."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as types

from llmrec import distributed
from llmrec.artifacts import ContentEmbeddings
from llmrec.config import as_dict, given, unhandled
from llmrec.encoders.cache import VectorCache
from llmrec.encoders.config import (
    NO_TEXT,
    EncodeItemsConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    model_folders_of,
)
from llmrec.encoders.encoder import Encoder, encode_pictures, encode_texts, finish
from llmrec.encoders.pictures import read_picture
from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ConfigError, DataError
from llmrec.folder_digest import model_digest
from llmrec.interactions import Interactions
from llmrec.manifest import sha256
from llmrec.running import resume_folder

logger = logging.getLogger("llmrec")

Encoded = tuple[np.ndarray, np.ndarray, dict[str, Any], dict[str, np.ndarray]]
"""Vectors (N + 1, D), missing items (N + 1,), what made them, and what was fitted to them."""


@distributed.every_process
def encode_items(config: EncodeItemsConfig, data: Interactions) -> ContentEmbeddings:
    """Encode the texts and pictures of all items; processes share the work of trained encoders.

    Raises:
        ConfigError: a column or model that does not exist.
        DataError: no item has text or a picture, or a file is broken.
    """
    made = {}
    if config.text.encoder != "none":
        made["text"] = encode_text(config.text, data)
    if config.image.encoder != "none":
        made["image"] = encode_image(config.image, data)
    for modality, (_, _, about, _) in made.items():
        logger.info(
            "encode_items: %s by %s, width %d, %d of %d items have none",
            modality, about["encoder"], about["width"], about["num_missing"], data.num_items,
        )  # fmt: skip
    return ContentEmbeddings(
        catalog=data.catalog,
        vectors={modality: vectors for modality, (vectors, _, _, _) in made.items()},
        missing={modality: missing for modality, (_, missing, _, _) in made.items()},
        encoders={modality: about for modality, (_, _, about, _) in made.items()},
        fitted={modality: fitted for modality, (_, _, _, fitted) in made.items() if fitted},
    )


def encode_text(config: TextEncoderConfig, data: Interactions) -> Encoded:
    """Text vectors; an item without a letter or digit in its text counts as missing."""
    if config.encoder == "precomputed":
        return precomputed("text", config, data)
    texts, columns = item_texts(config, data.items)
    present = say_something(texts)
    if not present.any():
        raise DataError(
            f"encode_items.text: none of the {data.num_items} items has text in {', '.join(columns)}; "
            "choose other columns, or set encode_items.text.encoder=none"
        )
    chosen = [text for text, there in zip(texts, present) if there]
    encoder = text_encoder(config, chosen)
    fitted: dict[str, np.ndarray] = getattr(encoder, "fitted", dict)()
    # What is fitted to texts gives one text other vectors among others.
    among = hashlib.sha256("\0".join(chosen).encode()).hexdigest() if fitted else ""
    cache = cache_of(encoder, config, seed=config.seed, among=among)
    vectors = encode_texts(encoder, chosen, config.batch_size, cache)
    about = {"columns": columns, "template": config.template, **encoder.describe()}
    return assemble("text", config, data, vectors, present, about, fitted)


def encode_image(config: ImageEncoderConfig, data: Interactions) -> Encoded:
    """Image vectors; an item without a picture counts as missing."""
    if config.encoder == "precomputed":
        return precomputed("image", config, data)
    raw_ids = data.raw_ids
    named = np.array([bool(path) for path in data.items["image_path"].to_pylist()])
    if data.image_root is None or not named.any():
        raise DataError(
            f"encode_items.image: none of the {data.num_items} items has a picture; name an image column in "
            "prepare_data, or set encode_items.image.encoder=none"
        )
    sources = np.flatnonzero(named).tolist()
    encoder = image_encoder(config)

    def read(source: int) -> Any:
        file = data.image_file(source + 1)
        assert file is not None
        return read_picture(file, raw_ids[source], max_pixels=config.max_pixels, on_error=config.on_error)

    def key(source: int) -> str:
        file = data.image_file(source + 1)
        assert file is not None
        return sha256(file) if file.is_file() else hashlib.sha256(str(file).encode()).hexdigest()

    # A smaller limit makes pictures unreadable whose vectors are known; on_error decides if the run goes on.
    cache = cache_of(encoder, config, max_pixels=config.max_pixels, on_error=config.on_error)
    vectors, readable = encode_pictures(encoder, sources, read, config.batch_size, cache, key)
    broken = int((~readable).sum())
    if broken == len(sources):
        raise DataError(
            f"encode_items.image: none of the {broken} pictures below {data.image_root} can be read; set "
            "encode_items.image.on_error=error to see why, or encode_items.image.encoder=none"
        )
    if broken:
        logger.warning("encode_items: %d pictures cannot be read and count as missing", broken)
    about = {"num_unreadable": broken, **encoder.describe()}
    fitted: dict[str, np.ndarray] = {}
    if config.encoder == "classical":
        from llmrec.encoders.classical import reduce

        vectors, statistics, fitted = reduce(vectors, dim=config.dim, seed=config.seed)
        about |= statistics
    named[named] = readable
    return assemble("image", config, data, vectors, named, about, fitted)


def cache_of(
    encoder: Encoder, config: TextEncoderConfig | ImageEncoderConfig, **limits: int | str
) -> VectorCache:
    """Vectors that this run made before it was stopped, if they are of the same weights and limits; else an
    empty cache."""
    about = {"encoder": config.encoder, **encoder.describe(), **limits}
    folders = {name: Path(folder) for name, folder in model_folders_of(config).items()}
    weights = {name: model_digest(folder) for name, folder in folders.items() if folder.is_dir()}
    if config.pretrained is not None and Path(config.pretrained).is_file():
        weights["pretrained"] = sha256(Path(config.pretrained))
    return VectorCache(resume_folder(), about | {"files": weights})


def text_encoder(config: TextEncoderConfig, texts: list[str]) -> Encoder:
    """The encoder the settings name; TF-IDF is fitted on texts."""
    if config.encoder == "tfidf":
        from llmrec.encoders.tfidf import TfidfEncoder

        return TfidfEncoder(texts, dim=config.dim, seed=config.seed)
    if config.encoder == "huggingface":
        from llmrec.encoders.huggingface import TextEncoder

        return TextEncoder(
            given(config.model),
            revision=config.revision,
            pooling=config.pooling,
            max_tokens=config.max_tokens,
            dtype=config.dtype,
        )
    if config.encoder == "llm2clip":
        from llmrec.encoders import llm2clip

        return llm2clip.TextEncoder(
            config.model or llm2clip.TEXT_MODEL,
            adapter=config.adapter or llm2clip.CLIP_MODEL,
            revision=config.revision,
            adapter_revision=config.adapter_revision,
            max_tokens=config.max_tokens,
            dtype=config.dtype,
        )
    if config.encoder == "openclip":
        from llmrec.encoders.openclip import OpenClipEncoder

        return OpenClipEncoder(
            "text", model=given(config.model), pretrained=config.pretrained, dtype=config.dtype
        )
    assert config.encoder != "precomputed" and config.encoder != "none", "which encode nothing"
    unhandled(config.encoder)


def image_encoder(config: ImageEncoderConfig) -> Encoder:
    """The encoder the settings name."""
    if config.encoder == "classical":
        from llmrec.encoders.classical import ClassicalEncoder

        return ClassicalEncoder()
    if config.encoder == "huggingface":
        from llmrec.encoders.huggingface import ImageEncoder

        return ImageEncoder(
            given(config.model), revision=config.revision, pooling=config.pooling, dtype=config.dtype
        )
    if config.encoder == "llm2clip":
        from llmrec.encoders import llm2clip

        return llm2clip.ImageEncoder(
            config.model or llm2clip.CLIP_MODEL, revision=config.revision, dtype=config.dtype
        )
    if config.encoder == "openclip":
        from llmrec.encoders.openclip import OpenClipEncoder

        return OpenClipEncoder(
            "image", model=given(config.model), pretrained=config.pretrained, dtype=config.dtype
        )
    assert config.encoder != "precomputed" and config.encoder != "none", "which encode nothing"
    unhandled(config.encoder)


def precomputed(modality: str, config: TextEncoderConfig | ImageEncoderConfig, data: Interactions) -> Encoded:
    """Vectors made elsewhere, joined by raw id."""
    vectors, missing = read_vectors(given(config.path), data.raw_ids, f"encode_items.{modality}")
    present = ~missing[1:]
    return assemble(modality, config, data, vectors[1:][present], present, {"path": config.path}, {})


def assemble(
    modality: str,
    config: TextEncoderConfig | ImageEncoderConfig,
    data: Interactions,
    vectors: np.ndarray,
    present: np.ndarray,
    about: dict[str, Any],
    fitted: dict[str, np.ndarray],
) -> Encoded:
    """Item rows and their description, from the vectors of the items that have one.

    Args:
        vectors: float32 (n, D), in item order.
        present: bool (N,), n of them true.
        about: what the encoder says of itself.
        fitted: what it learned from these items.
    """
    rows, missing = finish(
        vectors,
        present,
        normalise=config.normalise,
        missing=config.missing,
        what=f"encode_items.{modality}",
        raw_ids=data.raw_ids,
    )
    shared = {
        "encoder": config.encoder,
        "width": rows.shape[1],
        "normalised": config.normalise,
        "num_items": data.num_items,
        "num_missing": int(missing.sum()),
        "missing": config.missing,
        "settings": as_dict(config),
    }
    return rows, missing, {**shared, **about}, fitted


def say_something(texts: list[str]) -> np.ndarray:
    """Which texts hold a letter or digit, bool (n,); items with the others count as missing."""
    return np.array([re.search(r"\w", text) is not None for text in texts], dtype=bool)


def item_texts(config: TextEncoderConfig, items: pa.Table) -> tuple[list[str], list[str]]:
    """The text of every item and the columns it was made from.

    Raises:
        ConfigError: a column that does not exist or holds no text.
    """
    available = [
        field.name
        for field in items.schema
        if field.name not in NO_TEXT and (types.is_string(field.type) or types.is_large_string(field.type))
    ]
    if config.template is not None:
        columns = list(dict.fromkeys(re.findall(r"\{([^{}]+)\}", config.template)))
    else:
        columns = list(config.columns or available)
    unknown = [name for name in columns if name not in available]
    if unknown:
        setting = "columns" if config.template is None else "template"
        raise ConfigError(
            f"encode_items.text.{setting} must name text columns of the items ({', '.join(available)}), "
            f"got {', '.join(unknown)}"
        )
    rows = zip(*(clean(items[name]) for name in columns))
    if config.template is None:
        return [". ".join(part for part in row if part) for row in rows], columns
    return [fill(config.template, dict(zip(columns, row))) for row in rows], columns


def fill(template: str, values: dict[str, str]) -> str:
    """The template with values in place of names; '' if all values are empty."""
    if not any(values.values()):
        return ""
    return " ".join(re.sub(r"\{([^{}]+)\}", lambda match: values[match[1]], template).split())


def clean(column: pa.ChunkedArray) -> list[str]:
    """Texts of a column with single spaces, '' where null."""
    return [" ".join((text or "").split()) for text in column.to_pylist()]
