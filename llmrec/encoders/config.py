"""Settings of encode_items."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from llmrec.config import Settings, StageSettings, require
from llmrec.errors import DataError

if TYPE_CHECKING:
    from llmrec.interactions import Interactions

TextEncoderName = Literal["tfidf", "huggingface", "openclip", "llm2clip", "precomputed", "none"]
ImageEncoderName = Literal["classical", "huggingface", "openclip", "llm2clip", "precomputed", "none"]

UNREAD = ("none", "precomputed")
"""Encoders that read no texts or pictures."""

NO_TEXT = ("raw_id", "image_path", "train_count")
"""Columns of the items that do not describe them."""

PICTURES = "pictures"
PILLOW_PIXELS = 89_478_485
"""Pillow warns of a decompression bomb beyond this (its MAX_IMAGE_PIXELS)."""

TEXT_FIELDS: dict[str, set[str]] = {
    "precomputed": {"path", "normalise", "missing"},
    "tfidf": {"columns", "template", "dim", "seed", "normalise", "missing"},
    "huggingface": {
        *("model", "revision", "columns", "template", "pooling", "max_tokens"),
        *("batch_size", "dtype", "normalise", "missing"),
    },
    "openclip": {
        *("model", "pretrained", "columns", "template", "batch_size", "dtype", "normalise", "missing"),
    },
    "llm2clip": {
        *("model", "revision", "adapter", "adapter_revision", "columns", "template", "max_tokens"),
        *("batch_size", "dtype", "normalise", "missing"),
    },
}
"""Fields that take effect, by text encoder. ``none`` switches the whole group off, whatever it holds, so
that one setting takes a modality out of a recipe."""

IMAGE_FIELDS: dict[str, set[str]] = {
    "precomputed": {"path", "normalise", "missing"},
    "classical": {"dim", "seed", "max_pixels", "on_error", "normalise", "missing"},
    "huggingface": {
        *("model", "revision", "pooling", "batch_size", "dtype"),
        *("max_pixels", "on_error", "normalise", "missing"),
    },
    "openclip": {
        *("model", "pretrained", "batch_size", "dtype", "max_pixels", "on_error", "normalise", "missing"),
    },
    "llm2clip": {
        *("model", "revision", "batch_size", "dtype", "max_pixels", "on_error", "normalise", "missing"),
    },
}
"""Fields that take effect, by image encoder."""

assert {*TEXT_FIELDS, "none"} == {*get_args(TextEncoderName)}, "TEXT_FIELDS must name every text encoder"
assert {*IMAGE_FIELDS, "none"} == {*get_args(ImageEncoderName)}, "IMAGE_FIELDS must name every image encoder"


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(Settings, path="encode_items.text"):
    """How item texts become vectors."""

    encoder: TextEncoderName = "tfidf"
    """tfidf: TF-IDF and truncated SVD, no download; huggingface: any transformers AutoModel;
    openclip: the text side of a CLIP; llm2clip: the paper's, a Llama with an adapter into CLIP's space;
    precomputed: vectors from a file; none: no text."""

    model: str | None = None
    """huggingface: Hub id or local folder; openclip: a model name such as ViT-bigG-14 (others with 1280
    numbers: ViT-bigG-14-quickgelu, ViT-bigG-14-CLIPA, PE-Core-bigG-14-448), or hf-hub:owner/name, or
    local-dir:folder; llm2clip: the language model, none: the paper's
    (microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned)."""

    adapter: str | None = None
    """llm2clip: Hub id or local folder of the CLIP with the text adapter; none: the paper's
    (microsoft/LLM2CLIP-Openai-L-14-336)."""

    adapter_revision: str | None = None
    """llm2clip: commit or branch of the adapter's CLIP on the Hub; none: the newest."""

    revision: str | None = None
    """huggingface, llm2clip: commit or branch of the model on the Hub; none: the newest."""

    pretrained: str | None = None
    """openclip: name of the weights, such as laion2b_s39b_b160k, or a .safetensors file."""

    path: str | None = None
    """precomputed: .parquet (columns item_id, vector) or .safetensors (tensor vectors)."""

    columns: tuple[str, ...] | None = None
    """Item columns that make up the text, joined by '. ' in this order; none: title, then every other
    text column."""

    template: str | None = None
    """Instead of columns: the text with column names in braces, such as '{title} by {brand}'."""

    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """huggingface: mean of the real tokens, the first, or the last one; auto: the model's own text
    head if it has one (CLIP, SigLIP), else mean."""

    max_tokens: int | None = None
    """huggingface, llm2clip: longest text in tokens, the rest is cut off; none: what the model takes, at most
    512."""

    dim: int = 128
    """tfidf: width after the SVD; fewer if the texts do not span as many directions."""

    seed: int = 0
    """tfidf: seed of the randomised SVD."""

    batch_size: int = 64
    """huggingface, openclip, llm2clip: texts per forward pass."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """huggingface, openclip, llm2clip: number format of the model; auto: float32 on a CPU, else as the
    weights are stored (openclip: float16; llm2clip: bfloat16 for texts, float16 for pictures)."""

    normalise: bool = False
    """Scale every vector to length 1."""

    missing: Literal["mean", "zero"] = "mean"
    """Vector of items without text: the mean of the others, or zeros."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoder(self, "encode_items.text", TEXT_FIELDS)
        require(
            self.columns is None or self.template is None,
            "encode_items.text.columns must be none where text.template is set, since the template names "
            f"its columns, got columns={self.columns}",
        )
        require(
            self.columns is None or len(set(self.columns)) == len(self.columns) > 0,
            f"encode_items.text.columns must be different column names, at least one, got {self.columns}",
        )
        require(
            self.template is None or bool(re.search(r"\{[^{}]+\}", self.template)),
            f"encode_items.text.template must hold a column name in braces, got {self.template!r}",
        )
        require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"encode_items.text.max_tokens must be >= 1 token, got {self.max_tokens}",
        )


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(Settings, path="encode_items.image"):
    """How item pictures become vectors."""

    encoder: ImageEncoderName = "classical"
    """classical: colour histogram, gradient histogram and PCA, no download; huggingface: any
    transformers vision model or CLIP; openclip: the image side of a CLIP; llm2clip: the paper's CLIP;
    precomputed: vectors from a file; none: no pictures."""

    model: str | None = None
    """huggingface: Hub id or local folder; openclip: a model name such as ViT-bigG-14 (others with 1280
    numbers: see the text's), or hf-hub:owner/name, or local-dir:folder; llm2clip: none: the paper's
    (microsoft/LLM2CLIP-Openai-L-14-336)."""

    revision: str | None = None
    """huggingface, llm2clip: commit or branch of the model on the Hub; none: the newest."""

    pretrained: str | None = None
    """openclip: name of the weights, such as laion2b_s39b_b160k, or a .safetensors file."""

    path: str | None = None
    """precomputed: .parquet (columns item_id, vector) or .safetensors (tensor vectors)."""

    pooling: Literal["auto", "mean", "cls"] = "auto"
    """huggingface: mean of all patches, the class token among them if the model has one, or the first token;
    auto: the model's own image head (CLIP, SigLIP), else its trained pooler, else mean."""

    dim: int = 128
    """classical: width after the PCA; fewer if the pictures do not span as many directions."""

    seed: int = 0
    """classical: seed of the PCA where it is randomised."""

    batch_size: int = 64
    """huggingface, openclip, llm2clip: pictures per forward pass."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """huggingface, openclip, llm2clip: number format of the model; auto: float32 on a CPU, else as the
    weights are stored (openclip: float16; llm2clip: bfloat16 for texts, float16 for pictures)."""

    max_pixels: int = 50_000_000
    """Largest picture that is decoded, width times height; a larger one counts as broken."""

    on_error: Literal["error", "missing"] = "error"
    """A picture that cannot be read stops the run, or counts as missing."""

    normalise: bool = False
    """Scale every vector to length 1."""

    missing: Literal["mean", "zero"] = "mean"
    """Vector of items without a picture: the mean of the others, or zeros."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoder(self, "encode_items.image", IMAGE_FIELDS)
        require(
            1 <= self.max_pixels <= PILLOW_PIXELS,
            f"encode_items.image.max_pixels must be 1 to {PILLOW_PIXELS} (Pillow's own limit), "
            f"got {self.max_pixels}",
        )


@dataclass(frozen=True, kw_only=True)
class EncodeItemsConfig(StageSettings, path="encode_items"):
    """Content vectors of the items, one set per modality (MME-SID section 4.1)."""

    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)

    def incidental_fields(self) -> tuple[str, ...]:
        """Settings that change how the result is computed, but not the result, except for rounding."""
        return ("text.batch_size", "image.batch_size")

    def source_files(self) -> dict[str, str]:
        """The users' own files that the result depends on, by setting."""
        found: dict[str, str] = {}
        for modality, config in self._read().items():
            found |= vector_files(f"{modality}.path", config.path)
            if config.pretrained is not None and config.pretrained.endswith(".safetensors"):
                found[f"{modality}.pretrained"] = config.pretrained
        return found

    def model_folders(self) -> dict[str, str]:
        """Models that may lie in folders of the user's, by setting."""
        return {
            f"{modality}.{name}": folder
            for modality, config in self._read().items()
            for name, folder in model_folders_of(config).items()
        }

    def _read(self) -> dict[str, TextEncoderConfig | ImageEncoderConfig]:
        """The groups of settings that are not switched off, by modality."""
        groups: dict[str, TextEncoderConfig | ImageEncoderConfig] = {"text": self.text, "image": self.image}
        return {modality: config for modality, config in groups.items() if config.encoder != "none"}

    def check_data(self, data: Interactions) -> None:
        """Refuse data without a single text, or picture, for an encoder that reads them.

        Raises:
            DataError: says what is missing.
        """
        if self.image.encoder not in UNREAD and data.items["image_path"].null_count == data.num_items:
            raise DataError(
                f"encode_items.image.encoder={self.image.encoder}: none of the {data.num_items} items has a "
                "picture that is there; see prepare_data's warnings, or set encode_items.image.encoder=none"
            )
        texts = [name for name in data.items.column_names if name not in NO_TEXT]
        if self.text.encoder not in UNREAD and not any(any(data.items[name].to_pylist()) for name in texts):
            raise DataError(
                f"encode_items.text.encoder={self.text.encoder}: none of the {data.num_items} items has a "
                "text; name prepare_data.title_column or text_columns, or set encode_items.text.encoder=none"
            )

    def source_digests(self, *inputs: Any) -> dict[str, str]:
        """Of the pictures that the items name."""
        (data,) = inputs
        if self.image.encoder in UNREAD or (digest := data.pictures_digest()) is None:
            return {}
        return {PICTURES: digest}


def model_folders_of(config: Settings) -> dict[str, str]:
    """Models of an encoder that may lie in folders, by setting."""
    named = {name: getattr(config, name, None) for name in ("model", "adapter")}
    return {name: folder.removeprefix("local-dir:") for name, folder in named.items() if folder}


def vector_files(setting: str, path: str | None) -> dict[str, str]:
    """A file of ready-made vectors and, where it is there, the file beside it that names its rows."""
    if path is None:
        return {}
    beside = ids_beside(Path(path))
    named = path.endswith(".safetensors") and beside.is_file()
    return {setting: path} | ({f"{setting} ids": str(beside)} if named else {})


def ids_beside(vectors: Path) -> Path:
    """Where the raw ids of a tensor file's rows stand; see `llmrec.encoders.precomputed`."""
    return vectors.with_suffix(".ids.json")


def check_encoder(config: Any, name: str, effective: dict[str, set[str]]) -> None:
    """Checks that text and image encoders share.

    Args:
        config: the text or image settings.
        name: their dotted path, for messages.
        effective: which fields take effect, by encoder.
    """
    encoder = config.encoder
    if encoder == "none":
        return
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.name == "encoder" or setting.name in effective[encoder] or value == setting.default:
            continue
        users = [other for other, names in effective.items() if setting.name in names]
        require(
            False,
            f"{name}.{setting.name} must be left at {setting.default!r} with encoder={encoder!r}, where it "
            f"has no effect (it belongs to {', '.join(users)}), got {value!r}",
        )
    needed = {"huggingface": "model", "openclip": "model", "precomputed": "path"}.get(encoder)
    require(
        needed is None or bool(getattr(config, needed)),
        f"{name}.{needed} must be set with encoder={encoder!r}, got {getattr(config, needed or 'encoder')!r}",
    )
    if encoder == "openclip":
        whole = config.model.startswith(("hf-hub:", "local-dir:"))
        require(
            whole == (config.pretrained is None),
            f"{name}.pretrained must be {'none, since the model brings its weights' if whole else 'set'} "
            f"with model={config.model!r}, got {config.pretrained!r}",
        )
    require(config.dim >= 1, f"{name}.dim must be >= 1, got {config.dim}")
    require(config.seed >= 0, f"{name}.seed must be >= 0, got {config.seed}")
    require(config.batch_size >= 1, f"{name}.batch_size must be >= 1, got {config.batch_size}")
