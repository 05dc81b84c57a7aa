"""Tiny MME-SID modules with random weights, in float64 where a test needs exactness."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from llmrec.artifacts import SemanticIds
from llmrec.finetune import build
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.lora import add_lora
from llmrec.finetune.model import MMESID
from llmrec.finetune.prompt import Prompt

WIDTH, LEVELS, CODES = 16, 2, 4
WIDE = 64
"""Model width whose four heads FlexAttention's kernels take on a GPU."""
PROMPT = Prompt(instruction=[0, 3, 1, 4, 1], response=[5, 2, 6], vocab_size=8)


class ExactRMSNorm(nn.Module):
    """Llama's normalisation without its detour through float32, which would hide exactness."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)


def tiny_base(seed: int = 0, num_layers: int = 3, width: int = WIDTH) -> LlamaModel:
    """A float32 Llama with two key-value heads for four query heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=PROMPT.vocab_size,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaModel(config)


def vectors(num_items: int, dims: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random frozen vectors (N + 1, D) by modality, row 0 zero."""
    rng = np.random.default_rng(seed)
    made = {name: rng.normal(size=(num_items + 1, dim)).astype(np.float32) for name, dim in dims.items()}
    for table in made.values():
        table[0] = 0
    return made


def semantic_ids(
    num_items: int, modalities: tuple[str, ...], seed: int = 0, width: int = WIDTH
) -> SemanticIds:
    rng = np.random.default_rng(seed)
    return SemanticIds(
        catalog="tiny",
        codes={name: rng.integers(0, CODES, (num_items + 1, LEVELS)) for name in modalities},
        codebooks={name: rng.normal(size=(LEVELS, CODES, width)).astype(np.float32) for name in modalities},
    )


def model(
    num_items: int,
    *,
    lora: bool = False,
    dims: dict[str, int] | None = None,
    prompt: Prompt = PROMPT,
    width: int = WIDTH,
    **settings: object,
) -> MMESID:
    """MME-SID on a tiny Llama in float64, with three modalities unless said otherwise."""
    dims = dims or {"collab": 5, "text": 7, "image": 6}
    options = {"base_model": "tiny"} if lora else {}
    config = FinetuneConfig(**{"fusion_temperature": 1.0, **options, **settings})
    base = tiny_base(width=width)
    if lora:
        base = add_lora(base, config)
        for name, parameter in base.named_parameters():
            if "lora_B" in name:  # starts at zero, which would hide half of the gradient
                nn.init.normal_(parameter, std=0.3)
    train_count = torch.arange(num_items + 1)
    ids = semantic_ids(num_items, tuple(dims), width=width)
    built = build.build_model(
        config, base, prompt, vectors(num_items, dims), ids, train_count, torch.device("cpu")
    )
    for parent in list(built.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, ExactRMSNorm(child))
    return built.double()
