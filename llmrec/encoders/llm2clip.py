"""LLM2CLIP text and image vectors in one space, on stock transformers modules and by name of weight.

Published as a language model for texts (``microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned``) and a CLIP
with an adapter (``microsoft/LLM2CLIP-Openai-L-14-336``), both with code of their own in the repository,
which works with few versions of transformers. None of it is run here.

Texts: the Llama without a causal mask reads  <bos> user header, blank line, text <eot>;  the mean of its last
hidden states over text and <eot> goes, scaled to length 1, through the adapter: residual blocks
LN, Linear, GELU, Linear, then LN, Linear. Pictures: CLIP's vision tower and its projection.

Source: LLM2CLIP (arXiv:2411.04997) and the published weights' names; wrapping and pooling as in llm2vec 0.2,
which the published usage calls. Differs: texts are padded on the right (relative positions do not change),
cut by tokens rather than by words where they are too long, and pooled in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaModel,
)

from llmrec import distributed
from llmrec.encoders.huggingface import load, to_numpy
from llmrec.encoders.loading import dtype_of, first_line
from llmrec.errors import ConfigError, DataError
from llmrec.folder_digest import commit_of, revision_of

TEXT_MODEL = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
CLIP_MODEL = "microsoft/LLM2CLIP-Openai-L-14-336"
MOST_TOKENS = 512
"""Longest wrapped text where the settings name no limit, in tokens (llm2vec's max_length)."""

NOT_WEIGHTS = ("logit_scale", "vision_model.embeddings.position_ids")
"""Tensors in the published file that encoding does not need."""


class TextEncoder:
    """Language model and text adapter.

    Args:
        model: Hub id or folder of the language model with its tokenizer.
        adapter: Hub id or folder of the CLIP whose text adapter follows.
        revision: commit or branch of the language model on the Hub.
        max_tokens: longest text with its wrapping, in tokens; None: 512.
        dtype: number format of the language model, see `loading.dtype_of`; the adapter is float32.
        adapter_revision: commit or branch of that CLIP on the Hub.
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str,
        revision: str | None,
        max_tokens: int | None,
        dtype: str,
        adapter_revision: str | None = None,
    ) -> None:
        where = "encode_items.text"
        self.name, self.adapter_name = model, adapter
        self.device = distributed.device()
        self.tokenizer = load(AutoTokenizer, model, revision, where)
        self.header, self.end = wrapping(self.tokenizer, model, where)
        self.max_tokens = max_tokens or MOST_TOKENS
        if self.max_tokens <= len(self.header) + 1:
            raise ConfigError(
                f"{where}.max_tokens must leave room for text beside the {len(self.header) + 1} tokens of "
                f"the chat wrapping, got {self.max_tokens}"
            )
        self.model = load_llama(model, revision, dtype, where)
        self.revision = revision_of(model, revision)
        self.adapter = load_adapter(adapter, adapter_revision, where).to(self.device)
        settings = fetch(adapter, "config.json", adapter_revision, f"{where}.adapter")
        self.adapter_revision = commit_of(settings)
        width = self.model.config.hidden_size
        if self.adapter.width != width:
            raise ConfigError(
                f"{where}.adapter: the text adapter of {adapter} takes vectors of width "
                f"{self.adapter.width}, but {model} gives {width}; name the CLIP that was trained with it"
            )

    def prepare(self, inputs: list[str]) -> list[np.ndarray]:
        """Token ids of each text in its wrapping, cut to max_tokens with <eot> kept."""
        room = self.max_tokens - len(self.header) - 1
        found = self.tokenizer(
            [text.strip() for text in inputs], add_special_tokens=False, return_attention_mask=False
        )["input_ids"]
        return [np.array([*self.header, *ids[:room], self.end], np.int32) for ids in found]

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> np.ndarray:
        """Vectors float32 (B, D)."""
        return to_numpy(self.adapter(self.pooled(batch)))

    def pooled(self, batch: list[np.ndarray]) -> Tensor:
        """Mean hidden states over text and <eot>, float32 (B, H)."""
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        width = int(lengths.max())
        tokens = torch.full((len(batch), width), self.end, dtype=torch.long)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.from_numpy(ids)
        place = torch.arange(width, device=self.device)
        real = place < lengths[:, None]
        # A mask of four dimensions is used as it is: every token sees every real one.
        seen = torch.zeros(len(batch), 1, width, width, dtype=self.model.dtype, device=self.device)
        seen.masked_fill_(~real[:, None, None, :], torch.finfo(self.model.dtype).min)
        hidden = self.model(
            input_ids=tokens.to(self.device), attention_mask=seen, use_cache=False
        ).last_hidden_state
        weight = (real & (place >= len(self.header)))[..., None].float()
        return (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": self.revision,
            "adapter": self.adapter_name,
            "adapter_revision": self.adapter_revision,
            "wrapping": self.tokenizer.decode(self.header) + "{text}" + self.tokenizer.decode([self.end]),
            "pooling": "mean over text and end of turn",
            "max_tokens": self.max_tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


class ImageEncoder:
    """The vision tower of the CLIP and its projection.

    Args:
        model: Hub id or folder.
        revision: commit or branch on the Hub.
        dtype: number format, see `loading.dtype_of`.
    """

    def __init__(self, model: str, *, revision: str | None, dtype: str) -> None:
        where = "encode_items.image"
        self.name, self.device = model, distributed.device()
        self.model = load_vision(model, revision, where)
        self.revision = commit_of(fetch(model, "config.json", revision, f"{where}.model")) or revision
        self.model.to(self.device, dtype_of(dtype, torch.float16, self.device))
        size = cast(int, self.model.config.image_size)
        self.processor = CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )

    def prepare(self, inputs: list[Image.Image]) -> list[np.ndarray]:
        """Pixels float32 (3, size, size): bicubic shortest side, centre crop, CLIP's mean and spread."""
        pixels = self.processor(images=inputs, return_tensors="pt")["pixel_values"]
        return list(pixels.to(torch.float32).numpy())

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> np.ndarray:
        """Vectors float32 (B, D)."""
        pixels = torch.from_numpy(np.stack(batch)).to(self.device, self.model.dtype)
        return to_numpy(self.model(pixel_values=pixels).image_embeds)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": self.revision,
            "pooling": "own image head",
            "preprocessing": json.loads(self.processor.to_json_string()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


class TextAdapter(nn.Module):
    """Residual blocks over a unit vector, then a projection.

    Args:
        shapes: of the published tensors, by name.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        last = max(int(name.split(".")[0]) for name in shapes)
        out, self.width = shapes[f"{last}.weight"]
        self.adaptor = nn.Sequential(
            *(AdapterBlock(self.width, shapes[f"{index}.fn.0.weight"][0]) for index in range(last - 1)),
            nn.LayerNorm(self.width),
            nn.Linear(self.width, out, bias=f"{last}.bias" in shapes),
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, H) to (B, D)."""
        return self.adaptor(F.normalize(vectors, dim=-1))


class AdapterBlock(nn.Module):
    """x + Linear(GELU(Linear(LN(x)))); the third entry of `fn` is the dropout of its training."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fn = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.0), nn.Linear(inner, width))
        self.ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.ln(x))


def wrapping(tokenizer: Any, model: str, where: str) -> tuple[list[int], int]:
    """Token ids before a text, and the one after it.

    Raises:
        ConfigError: the tokenizer does not know Llama 3's chat tokens.
    """
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    known = tokenizer.get_vocab()
    absent = [name for name in names if name not in known]
    if absent or tokenizer.bos_token_id is None:
        raise ConfigError(
            f"{where}.model: the tokenizer of {model} has no "
            f"{', '.join(absent) or 'token for the beginning'}; encoder=llm2clip "
            "needs a Llama 3 Instruct one. For other models use encoder=huggingface"
        )
    start, stop, end = (known[name] for name in names)
    role, blank = (tokenizer.encode(text, add_special_tokens=False) for text in ("user", "\n\n"))
    return [tokenizer.bos_token_id, start, *role, stop, *blank], end


def load_llama(model: str, revision: str | None, dtype: str, where: str) -> LlamaModel:
    """The language model with every weight from its file, in evaluation mode.

    Raises:
        ConfigError: it cannot be loaded.
        DataError: weights are missing, left over, or of another shape.
    """
    device = distributed.device()
    found, report = load(
        LlamaModel,
        model,
        revision,
        where,
        dtype=dtype_of(dtype, torch.bfloat16, device),
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = [
        f"{what} {sorted(str(name) for name in report[key])[0]}"
        for key, what in (
            ("missing_keys", "lacks"),
            ("unexpected_keys", "also holds"),
            ("mismatched_keys", "has another shape of"),
        )
        if report[key]
    ]
    if wrong:
        raise DataError(f"{where}.model: the weights of {model} are no plain Llama: {'; '.join(wrong)}")
    return found.eval().requires_grad_(False).to(device)


def load_adapter(model: str, revision: str | None, where: str) -> TextAdapter:
    """The text adapter of a published CLIP, float32.

    Raises:
        ConfigError: it cannot be loaded.
        DataError: weights are missing, left over, or of another shape.
    """
    weights = read_weights(model, revision, f"{where}.adapter", part="text_adapter.adaptor.")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        made = TextAdapter(shapes)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{where}.adapter: {model} has no text adapter of LLM2CLIP (text_adapter.adaptor.*: {error})"
        ) from None
    return fill(made.adaptor, weights, f"{where}.adapter: {model}", made)


def load_vision(model: str, revision: str | None, where: str) -> CLIPVisionModelWithProjection:
    """Vision tower and projection of a published CLIP, float32.

    Raises:
        ConfigError: it cannot be loaded.
        DataError: weights are missing, left over, or of another shape.
    """
    settings = json.loads(fetch(model, "config.json", revision, f"{where}.model").read_text(encoding="utf-8"))
    if "vision_config" not in settings or "projection_dim" not in settings:
        raise DataError(f"{where}.model: config.json of {model} lacks vision_config or projection_dim")
    config = CLIPVisionConfig(**{**settings["vision_config"], "projection_dim": settings["projection_dim"]})
    config._attn_implementation = "sdpa"
    weights = read_weights(model, revision, f"{where}.model", skip="text_adapter.adaptor.")
    weights = {name: tensor for name, tensor in weights.items() if name not in NOT_WEIGHTS}
    made = CLIPVisionModelWithProjection(config)
    return fill(made, weights, f"{where}.model: {model}", made)


def fill(module: nn.Module, weights: dict[str, Tensor], what: str, whole: Any) -> Any:
    """Put the weights in by name, all of them and nothing else; returns `whole`, frozen.

    Raises:
        DataError: names or shapes do not agree, with the first of each kind.
    """
    wanted = module.state_dict()
    missing, extra = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    other = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    if missing or extra or other:
        parts = [
            f"{len(names)} {kind}, the first is {names[0]}"
            for names, kind in ((missing, "missing"), (extra, "left over"), (other, "of another shape"))
            if names
        ]
        raise DataError(f"{what}: tensors do not fit LLM2CLIP's published layout: {'; '.join(parts)}")
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return whole.eval().requires_grad_(False)


def read_weights(
    model: str, revision: str | None, where: str, *, part: str = "", skip: str | None = None
) -> dict[str, Tensor]:
    """Tensors of a model's safetensors file or files whose names begin with `part`, which is cut off.

    Raises:
        ConfigError: no such file.
        DataError: a damaged file.
    """
    folder = Path(model)
    index = "model.safetensors.index.json"
    if folder.is_dir() and (folder / index).is_file():
        names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    found = {}
    for name in names:
        file = fetch(model, name, revision, where)
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    if key.startswith(part) and not (skip and key.startswith(skip)):
                        found[key.removeprefix(part)] = handle.get_tensor(key)
        except SafetensorError as error:
            raise DataError(f"{where}: {file} is damaged ({first_line(error)}); get it again") from None
    return found


def fetch(model: str, name: str, revision: str | None, where: str) -> Path:
    """A file of a model: in a folder, or in the Hub's cache, or from the Hub.

    Raises:
        ConfigError: there is no such file.
    """
    if Path(model).is_dir():
        if (Path(model) / name).is_file():
            return Path(model) / name
        raise ConfigError(f"{where}={model!r} has no {name}; give the folder of a published LLM2CLIP model")
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"{where}={model!r}: no such folder, and {name} is not on the Hub, not public, or not downloaded "
            f"yet; run `hf download {model}` while online, or give a local folder ({first_line(error)})"
        ) from None
