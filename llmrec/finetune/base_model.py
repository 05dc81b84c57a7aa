"""The base model: its prompt, its weights, and the kernels it runs with.

PEFT and FlexAttention, which take seconds to import, are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaModel

from llmrec import distributed, launched
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.prompt import Prompt, tokenize, tokenize_words

MIN_FLEX_HEAD = 16
"""Narrowest attention head that FlexAttention's kernels take on a GPU."""

NOT_LOADABLE = (OSError, ValueError, StrictDataclassError)
"""What transformers raises where a model is not there, or its config.json cannot be that of a model."""

MINI_POSITIONS = 1 << 20
"""Of a base that is trained from nothing: rotary positions have no weights, so memory is the only bound."""

MOST_GRAPHS = 64
"""Compiled forms of a block; beyond them torch would go on without compiling, and FlexAttention unfused."""


def load_prompt(config: FinetuneConfig) -> Prompt:
    """The prompt in the base model's token ids; without a response if the model is read out at items."""
    prompt = _whole_prompt(config)
    return replace(prompt, response=[]) if config.readout == "item" else prompt


def _whole_prompt(config: FinetuneConfig) -> Prompt:
    if config.is_mini:
        return tokenize_words(config.prompt)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.base_model, revision=config.revision, trust_remote_code=False
        )
    except NOT_LOADABLE as error:
        raise ConfigError(_cannot_load("tokenizer", config.base_model, error)) from None
    return tokenize(config.prompt, tokenizer)


def load_base(
    config: FinetuneConfig, prompt: Prompt, device: torch.device | None = None, *, spread: bool = False
) -> nn.Module:
    """The base model: mini from its config, trained in full, or pretrained with fresh LoRA matrices.

    Args:
        config: settings.
        prompt: for the size of a mini base's vocabulary.
        device: where it will run; None: this process's.
        spread: it will be moved block by block, see `shard`.
    """
    if config.is_mini:
        return mini(
            {
                "vocab_size": prompt.vocab_size,
                "num_hidden_layers": config.mini.num_layers,
                "hidden_size": config.mini.hidden_size,
                "intermediate_size": config.mini.intermediate_size,
                "num_attention_heads": config.mini.num_heads,
                "max_position_embeddings": MINI_POSITIONS,
                "bos_token_id": None,
                "eos_token_id": None,
            }
        )
    if config.quantize == "nf4" and spread:
        raise ConfigError(
            "finetune.quantize=nf4 has not been tried with FSDP, which cuts 4-bit weights like others; use "
            "recipes/accelerate/ddp.yaml, or finetune.quantize=none"
        )
    options: dict[str, Any] = {"dtype": torch.bfloat16 if config.precision == "bf16" else torch.float32}
    if config.quantize == "nf4":
        options["quantization_config"] = four_bits()
    device = distributed.device() if device is None else device
    if device.type == "cuda" and (config.quantize == "nf4" or not spread):
        # Straight to the GPU: processes side by side would each fill the host's memory with a whole one.
        options["device_map"] = {"": device}
    try:
        with without_head():
            base = AutoModel.from_pretrained(
                config.base_model,
                revision=config.revision,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
    except NOT_LOADABLE as error:
        raise ConfigError(_cannot_load("base model", config.base_model, error)) from None
    if config.quantize == "nf4":
        keep_layout(base)
    from llmrec.finetune.lora import add_lora

    return add_lora(base, config)


@contextlib.contextmanager
def without_head() -> Iterator[None]:
    """Keep transformers from reporting that a decoder takes no head; other reports, such as of weights that
    are missing, are shown."""
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(tells_more)
    try:
        yield
    finally:
        log.removeFilter(tells_more)


def tells_more(record: logging.LogRecord) -> bool:
    """False for transformers' report of loading if its table names nothing but the head; else true."""
    text = record.getMessage()
    rows = [line for line in text.splitlines() if "|" in line][1:]
    return not rows or "LOAD REPORT" not in text or not all(row.startswith("lm_head.") for row in rows)


def mini(settings: dict[str, Any]) -> LlamaModel:
    """A small Llama with fresh weights, from its config."""
    return LlamaModel(LlamaConfig.from_dict({**settings, "_attn_implementation": "sdpa"}))


def four_bits() -> BitsAndBytesConfig:
    """NF4 with double quantisation, computing in bfloat16 (QLoRA, 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def keep_layout(base: nn.Module) -> None:
    """Have 4-bit weights stay as they are packed.

    On CPUs with AVX512-BF16, bitsandbytes packs them anew when they are first used in evaluation mode; from
    then on no gradient goes through them in training, and only a warning says so (seen in 0.50.2).
    """
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def head_width(base: Any) -> int:
    """Width of one attention head of a decoder."""
    known = base.config
    return getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads


def stream_and_flex(config: FinetuneConfig, device: torch.device, head: int) -> tuple[bool, bool]:
    """Whether tokens form a stream and whether FlexAttention runs on it.

    Args:
        config: settings.
        device: where the model runs.
        head: width of its attention heads.

    Raises:
        ConfigError: what was asked for does not work on this device.
    """
    gpu = device.type not in ("cpu", "meta")
    can = (gpu or launched.uses_fsdp()) and config.share_instruction
    stream = can if config.rows == "auto" else config.rows == "stream"
    stream = stream or config.attention == "flex" or (config.checkpoint_activations and can_share(config))
    wide = head >= MIN_FLEX_HEAD
    flex = (gpu and stream and wide) if config.attention == "auto" else config.attention == "flex"
    if flex and gpu and not wide:
        raise ConfigError(
            f"finetune.attention='flex' needs attention heads of {MIN_FLEX_HEAD} numbers at least, and "
            f"{config.base_model} has {head}; leave it out"
        )
    if launched.uses_fsdp() and not stream:
        raise ConfigError(
            "with FSDP a forward pass uses every weight once, so finetune.rows must be stream (or auto), "
            f"got {config.rows!r}, and finetune.share_instruction true"
        )
    for name, wanted in (
        ("attention='flex'", config.attention == "flex"),
        ("kernels='liger'", config.kernels == "liger"),
    ):
        if wanted and device.type == "cpu":
            raise ConfigError(f"finetune.{name} trains on a GPU, and there is none; leave it out")
    return stream, flex


def can_share(config: FinetuneConfig) -> bool:
    return config.share_instruction and config.rows != "padded"


def set_up_base(config: FinetuneConfig, base: Any, flex: bool) -> None:
    """Attention, kernels, checkpointing and compilation of the base model, in place.

    Raises:
        ConfigError: a library is missing, or the base model does not fit.
    """
    inner = decoder_of(base)
    # Whether the model takes FlexAttention is asked of transformers by its own name for it.
    inner.set_attn_implementation("flex_attention" if flex else "sdpa")
    if flex:
        from llmrec.finetune import flex as flex_attention

        inner.set_attn_implementation(flex_attention.NAME)
    if config.kernels == "liger":
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance
        except ImportError:
            raise ConfigError(
                "finetune.kernels='liger' needs the package liger-kernel: pip install 'llmrec[gpu]'"
            ) from None
        # Its fused loss would replace the forward pass of a decoder by that of a model with a head.
        _apply_liger_kernel_to_instance(model=inner, fused_linear_cross_entropy=False, cross_entropy=False)
    if config.checkpoint_activations:
        # transformers renamed it; both forms run without re-entering autograd.
        name = "activation_checkpointing_enable"
        getattr(inner, name if hasattr(inner, name) else "gradient_checkpointing_enable")()
    if config.compile:
        # Lengths become dynamic once a second one is seen; a step may still meet several kinds of shapes.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
        for block in inner.layers:
            block.compile()


def decoder_of(base: Any) -> Any:
    """The base model without LoRA's wrapper."""
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def shard(model: nn.Module, base: nn.Module) -> None:
    """FSDP2: spread the weights of every block of a base model, and as one group all else of the model that
    it is in, over all processes.

    By torch rather than accelerate, which knows FSDP on GPUs only, so that tests run what users run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(distributed.device().type, (launched.world_size(),))
    for block in decoder_of(base).layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def window_of(base: Any) -> int | None:
    """Tokens that a decoder's attention window and positions hold at once; None: no bound is known.

    Dense masks of ours replace the base model's own ones, sliding windows included.
    """
    known = base.config
    limits = [getattr(known, "max_position_embeddings", None)]
    kinds = getattr(known, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(known, "use_sliding_window", True)
    if slides:
        limits.append(getattr(known, "sliding_window", None))
    return min((value for value in limits if value), default=None)


def check_context(config: FinetuneConfig, base: nn.Module, tokens: int) -> None:
    """Refuse prompts that the base model's attention window or positions cannot hold.

    Args:
        config: settings.
        base: the decoder.
        tokens: length of the longest prompt.
    """
    limit = window_of(base)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"the longest prompt has {tokens:,} tokens and {config.base_model} sees {limit:,} at once; set "
            "finetune.max_history"
        )


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the {what} of finetune.base_model={name!r} cannot be loaded: {reason}. Give a local folder with "
        "config.json, tokenizer and safetensors weights, or a Hub id (gated models need `hf auth login`)"
    )
