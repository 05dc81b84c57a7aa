"""Text and image vectors from open_clip models.

A model is a built-in name with the name or file of its weights, or brings its own weights
(``hf-hub:owner/name``, ``local-dir:folder``). Pictures go through the model's own evaluation
transform, texts through its own tokenizer, which cuts them to the context length (often 77).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError

from llmrec import distributed
from llmrec.encoders.loading import dtype_of, first_line, quiet
from llmrec.errors import ConfigError


class OpenClipEncoder:
    """One side of an open_clip model; `TextEncoder` and `ImageEncoder` say which.

    Args:
        side: text or image.
        model: a built-in name, ``hf-hub:owner/name`` or ``local-dir:folder``.
        pretrained: weights of a built-in name: a tag or a ``.safetensors`` file.
        dtype: number format of the matrix products (autocast; weights stay float32).
    """

    def __init__(self, side: str, *, model: str, pretrained: str | None, dtype: str) -> None:
        self.side, self.name, self.pretrained = side, model, pretrained
        self.device = distributed.device()
        self.dtype = dtype_of(dtype, torch.float16, self.device)
        self.model, self.transform, self.tokenizer = load(model, pretrained, f"encode_items.{side}")
        self.model.to(self.device)

    def prepare(self, inputs: list[Any]) -> list[np.ndarray]:
        """Pixels float32 (3, height, width) of RGB pictures, or token ids of texts, padded."""
        if self.side == "text":
            return list(self.tokenizer(inputs).numpy())
        return [self.transform(picture).numpy() for picture in inputs]

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> np.ndarray:
        """Vectors float32 (B, D)."""
        inputs = torch.from_numpy(np.stack(batch)).to(self.device)
        encode = self.model.encode_text if self.side == "text" else self.model.encode_image
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            vectors = encode(inputs)
        return vectors.float().cpu().numpy()

    def describe(self) -> dict[str, Any]:
        shared = {
            "model": self.name,
            "pretrained": self.pretrained,
            "pooling": f"own {self.side} head",
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.side == "text":
            return {**shared, "max_tokens": self.model.context_length}
        return {**shared, "preprocessing": " ".join(str(self.transform).split())}


def load(model: str, pretrained: str | None, where: str) -> tuple[Any, Any, Any]:
    """Model in evaluation mode, evaluation transform of pictures, tokenizer.

    Raises:
        ConfigError: an unknown name, or weights that are absent, of another model, or not safetensors.
    """
    check_names(model, pretrained, where)
    try:
        with quiet():
            found, _, transform = open_clip.create_model_and_transforms(
                model, pretrained=pretrained, require_pretrained=True, device="cpu"
            )
            tokenizer = open_clip.get_tokenizer(model)
    # open_clip reports unknown, absent and unfitting weights as RuntimeError, absent folders as OSError.
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{where}: open_clip cannot load model={model!r}, pretrained={pretrained!r} "
            f"({first_line(error)}). Check the names; without a network give a downloaded "
            ".safetensors file as pretrained, or model=local-dir:FOLDER"
        ) from None
    return found.eval().requires_grad_(False), transform, tokenizer


def check_names(model: str, pretrained: str | None, where: str) -> None:
    """Refuse what open_clip would not know or would read by unpickling."""
    if model.startswith("hf-hub:"):
        return
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"{where}.model: {folder} must be a folder with .safetensors weights, found none"
            )
        return
    known = open_clip.list_models()
    if model not in known:
        close = difflib.get_close_matches(model, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "open_clip.list_models() lists them"
        raise ConfigError(f"{where}.model must be a model that open_clip knows, got {model!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    name = pretrained or ""
    if name in tags or (name.endswith(".safetensors") and Path(name).is_file()):
        return
    raise ConfigError(
        f"{where}.pretrained must be a .safetensors file that exists, or one of "
        f"{', '.join(tags) or '(no published weights)'} for {model}, got {pretrained!r}"
    )
