"""Text and image vectors from any transformers AutoModel, in a local folder or on the Hub.

Weights are read from safetensors only and code from a model's repository is never run. Texts are
padded on the right by us, with an attention mask, so tokenizers without a padding token work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from llmrec import distributed
from llmrec.encoders.loading import dtype_of, first_line, quiet
from llmrec.errors import ConfigError, DataError
from llmrec.folder_digest import revision_of

MOST_TOKENS = 512
"""Longest text where the settings name no limit, in tokens."""

LOAD_ERRORS = (
    *(OSError, ValueError, KeyError, ImportError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)
"""What ``from_pretrained`` raises for what users do, see `load`."""

TOKENIZE_AT_ONCE = 4096


class TextEncoder:
    """A language model or sentence encoder with pooling over its last hidden states.

    Args:
        model: Hub id or local folder.
        revision: commit or branch on the Hub.
        pooling: mean, cls, last over the real tokens (special tokens are real), or auto.
        max_tokens: longest text, in tokens; None: what the model takes, at most 512.
        dtype: number format, see `loading.dtype_of`.
    """

    def __init__(
        self, model: str, *, revision: str | None, pooling: str, max_tokens: int | None, dtype: str
    ) -> None:
        where = "encode_items.text"
        self.tokenizer = load(AutoTokenizer, model, revision, where)
        self.model, self.name, _ = load_model(model, revision, dtype, where)
        self.device = distributed.device()
        self.revision = revision_of(model, revision)
        self.own_head = hasattr(self.model, "get_text_features")
        if self.own_head and pooling != "auto":
            raise ConfigError(
                f"{where}.pooling must be auto with {model}, which has a text head of its own, "
                f"got {pooling!r}"
            )
        self.pooling = "own text head" if self.own_head else {"auto": "mean"}.get(pooling, pooling)
        if self.model.config.is_encoder_decoder:
            self.model = self.model.get_encoder()
        limit = token_limit(self.model, self.tokenizer)
        if max_tokens is not None and limit is not None and max_tokens > limit:
            raise ConfigError(f"{where}.max_tokens must be at most {limit} with {model}, got {max_tokens}")
        self.max_tokens = max_tokens or min(limit or MOST_TOKENS, MOST_TOKENS)
        # SigLIP was trained on texts padded to full length, without a mask, and reads the last token.
        self.full_length = self.own_head and self.model.config.model_type.startswith("siglip")
        self.padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def prepare(self, inputs: list[str]) -> list[np.ndarray]:
        """Token ids of each text, special tokens included, cut to max_tokens."""
        found = []
        for start in range(0, len(inputs), TOKENIZE_AT_ONCE):
            tokens = self.tokenizer(
                inputs[start : start + TOKENIZE_AT_ONCE],
                truncation=True,
                max_length=self.max_tokens,
                return_attention_mask=False,
            )["input_ids"]
            found += [np.array(ids, np.int32) for ids in tokens]
        return found

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> np.ndarray:
        """Vectors float32 (B, D)."""
        lengths = np.array([len(ids) for ids in batch])
        width = self.max_tokens if self.full_length else max(1, int(lengths.max()))
        mask = np.arange(width) < lengths[:, None]
        tokens = np.full(mask.shape, self.padding, np.int64)
        tokens[mask] = np.concatenate(batch)
        inputs = {"input_ids": torch.from_numpy(tokens).to(self.device)}
        if not self.full_length:
            inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(self.device)
        if self.own_head:
            return to_numpy(features_of(self.model.get_text_features(**inputs)))
        # Decoders would keep all keys and values.
        known = {"use_cache": False} if getattr(self.model.config, "use_cache", False) else {}
        hidden = self.model(**inputs, **known).last_hidden_state
        return to_numpy(pool(hidden, inputs["attention_mask"], self.pooling))

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": self.revision,
            "pooling": self.pooling,
            "max_tokens": self.max_tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


class ImageEncoder:
    """A vision model, or the image side of a dual encoder such as CLIP.

    Args:
        model: Hub id or local folder.
        revision: commit or branch on the Hub.
        pooling: mean, cls, or auto (own image head, else trained pooler, else mean).
        dtype: number format, see `loading.dtype_of`.
    """

    def __init__(self, model: str, *, revision: str | None, pooling: str, dtype: str) -> None:
        where = "encode_items.image"
        self.processor = load(AutoImageProcessor, model, revision, where)
        self.model, self.name, untrained = load_model(model, revision, dtype, where)
        self.device = distributed.device()
        self.revision = revision_of(model, revision)
        self.own_head = hasattr(self.model, "get_image_features")
        if self.own_head and pooling != "auto":
            raise ConfigError(
                f"{where}.pooling must be auto with {model}, which has an image head of its own, "
                f"got {pooling!r}"
            )
        # A pooler that the weights file lacks is random: it must not be used.
        self.pooling = pooling
        if pooling == "auto":
            self.pooling = "own image head" if self.own_head else "mean" if untrained else "pooler"
        if self.pooling == "pooler":  # whether a model has one shows only when it runs
            self.encode(self.prepare([Image.new("RGB", (64, 64))]))

    def prepare(self, inputs: list[Image.Image]) -> list[np.ndarray]:
        """Pixels float32 (3, height, width), as the model's processor wants them."""
        pixels = self.processor(images=inputs, return_tensors="pt")["pixel_values"]
        return list(pixels.to(torch.float32).numpy())

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> np.ndarray:
        """Vectors float32 (B, D)."""
        pixels = torch.from_numpy(np.stack(batch)).to(self.device, self.model.dtype)
        if self.own_head:
            return to_numpy(features_of(self.model.get_image_features(pixel_values=pixels)))
        outputs = self.model(pixel_values=pixels)
        pooled = getattr(outputs, "pooler_output", None)
        if self.pooling == "pooler" and pooled is not None:
            return to_numpy(pooled.flatten(1))
        self.pooling = "mean" if self.pooling == "pooler" else self.pooling
        hidden = outputs.last_hidden_state
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        return to_numpy(pool(hidden, torch.ones(hidden.shape[:2], device=hidden.device), self.pooling))

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": self.revision,
            "pooling": self.pooling,
            "preprocessing": json.loads(self.processor.to_json_string()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector per row of hidden (B, T, H), from the real positions of mask (B, T); float32 (B, H).

    Real positions come first in every row. Sums are in float32 whatever the model computes in.
    """
    if how == "cls":
        return hidden[:, 0].float()
    if how == "last":
        last = mask.sum(dim=1).long().clamp(min=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    weight = mask.to(torch.float32)[:, :, None]
    return (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def features_of(found: Any) -> Tensor:
    """What get_text_features and get_image_features mean: a tensor, or in newer versions its holder."""
    return found if isinstance(found, Tensor) else found.pooler_output


def to_numpy(vectors: Tensor) -> np.ndarray:
    return vectors.float().cpu().numpy()


def token_limit(model: Any, tokenizer: Any) -> int | None:
    """Most tokens the model takes, or None if it names no limit (relative positions)."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions <= 0:  # XLNet's way to name none
        positions = None
    if positions is not None:
        # RoBERTa and its kin number positions from the padding id on, so they take fewer tokens.
        table = next(
            (part for name, part in model.named_modules() if name.endswith("position_embeddings")), None
        )
        offset = getattr(table, "padding_idx", None)
        positions -= 0 if offset is None else offset + 1
    limits = [positions, tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def load_model(model: str, revision: str | None, dtype: str, where: str) -> tuple[Any, str, bool]:
    """The model in evaluation mode on this process's device.

    Returns:
        The model; its name as given; whether its pooler is absent from the weights file.

    Raises:
        ConfigError: it cannot be loaded.
        DataError: weights other than the pooler's, and than a decoder's, are absent from its file.
    """
    config = load(AutoConfig, model, revision, where)
    device = distributed.device()
    stored = getattr(config, "dtype", None) or torch.float32
    found, report = load(
        AutoModel,
        model,
        revision,
        where,
        dtype=dtype_of(dtype, stored, device),
        use_safetensors=True,
        output_loading_info=True,
    )
    absent = sorted(report["missing_keys"])
    if config.is_encoder_decoder:  # only its encoder is used, and some are published without a decoder
        absent = [name for name in absent if not name.startswith("decoder.")]
    needed = [name for name in absent if "pooler" not in name]
    if needed or report["mismatched_keys"]:
        names = needed or sorted(str(entry) for entry in report["mismatched_keys"])
        raise DataError(
            f"{where}.model: the weights of {model} lack {len(names)} tensors of its architecture, the first "
            f"is {names[0]}; get the complete model"
        )
    return found.eval().requires_grad_(False).to(device), model, bool(absent)


def load(kind: Any, model: str, revision: str | None, where: str, **options: Any) -> Any:
    """``kind.from_pretrained`` with the failures that users cause as one-line errors."""
    try:
        with quiet():
            return kind.from_pretrained(model, revision=revision, trust_remote_code=False, **options)
    # Not found or not cached: OSError. Unknown architecture or code in the repository:
    # ValueError or KeyError. A tokenizer's own library that is not installed: ImportError. Weights
    # of other shapes: RuntimeError. Half a download: SafetensorError.
    # Numbers in config.json that do not fit each other: StrictDataclassError.
    except LOAD_ERRORS as error:
        if Path(model).is_dir():
            advice = "the folder must hold a transformers model with safetensors weights"
        else:
            advice = (
                "no such folder, and it is not on the Hub, not public, or not downloaded yet; check the "
                f"name, or run `hf download {model}` while online, or give a local folder"
            )
        raise ConfigError(
            f"{where}.model={model!r} cannot be loaded by {kind.__name__}: {advice} ({first_line(error)})"
        ) from None
