"""From settings and artefacts to the MME-SID module, for training and for scoring alike."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaModel

from llmrec import distributed
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.finetune import flex as flex_attention
from llmrec.finetune import low_rank
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.fusion import EqualWeights, FrequencyGate, ItemScores
from llmrec.finetune.item_inputs import CodeSums, OwnTable, ProjectedVectors
from llmrec.finetune.methods import WITH_CODES, item_tokens, modalities_of
from llmrec.finetune.model import MMESID
from llmrec.finetune.prompt import Prompt, tokenize, tokenize_words

# We load the decoder without its language-model head; PEFT users load it with one, where the decoder
# is called `model`.
DECODER_PREFIX = "base_model.model."
CAUSAL_LM_PREFIX = "base_model.model.model."

MIN_FLEX_HEAD = 16
"""Narrowest attention head that FlexAttention's kernels take on a GPU."""

NOT_LOADABLE = (OSError, ValueError, StrictDataclassError)
"""What transformers raises where a model is not there, or its config.json cannot be that of a model."""

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
        tokenizer = AutoTokenizer.from_pretrained(config.base_model, revision=config.revision)
    except NOT_LOADABLE as error:
        raise ConfigError(_cannot_load("tokenizer", config.base_model, error)) from None
    return tokenize(config.prompt, tokenizer)


def load_base(config: FinetuneConfig, prompt: Prompt) -> nn.Module:
    """The base model: mini from its config, trained in full, or pretrained with fresh LoRA matrices."""
    if config.is_mini:
        return LlamaModel(
            LlamaConfig(
                vocab_size=prompt.vocab_size,
                num_hidden_layers=config.mini.num_layers,
                hidden_size=config.mini.hidden_size,
                intermediate_size=config.mini.intermediate_size,
                num_attention_heads=config.mini.num_heads,
                attn_implementation="sdpa",  # type: ignore[call-arg]
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    options: dict[str, Any] = {"dtype": torch.bfloat16 if config.precision == "bf16" else torch.float32}
    if config.quantize == "nf4":
        options["quantization_config"] = four_bits()
        if torch.cuda.is_available():
            options["device_map"] = {"": torch.cuda.current_device()}
    try:
        base = AutoModel.from_pretrained(
            config.base_model, revision=config.revision, attn_implementation="sdpa", **options
        )
    except NOT_LOADABLE as error:
        raise ConfigError(_cannot_load("base model", config.base_model, error)) from None
    return add_lora(base, config)


def four_bits() -> BitsAndBytesConfig:
    """NF4 with double quantisation, computing in bfloat16 (QLoRA, 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_lora(base: nn.Module, config: FinetuneConfig) -> PeftModel:
    """Freeze a decoder and put trainable float32 LoRA matrices on its linear layers."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout_rate,
        target_modules=list(config.lora_targets),
        bias="none",
        revision=config.revision,
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise ConfigError(
            f"finetune.lora_targets={', '.join(config.lora_targets)} do not fit {config.base_model}: {error}"
        ) from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    low_rank.fuse(model)
    if config.precision == "bf16":
        # Autocast casts what goes in; PEFT would make it float32 before.
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = False
    return model


def lora_weights(
    model: PeftModel, config: FinetuneConfig, trained: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LoRA matrices and config as plain PEFT expects them on the causal language model.

    Args:
        model: the decoder with LoRA.
        config: settings.
        trained: its trained weights by name, whole.
    """
    state = get_peft_model_state_dict(model, state_dict=trained)
    renamed = {CAUSAL_LM_PREFIX + name.removeprefix(DECODER_PREFIX): value for name, value in state.items()}
    plain = model.peft_config["default"].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in plain.items()}
    plain |= {
        "base_model_name_or_path": config.base_model,
        "revision": getattr(model.config, "_commit_hash", None) or config.revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "peft_type": "LORA",
    }
    return renamed, plain


def set_lora_weights(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Inverse of `lora_weights`; a missing or foreign matrix is an error."""
    renamed = {DECODER_PREFIX + name.removeprefix(CAUSAL_LM_PREFIX): value for name, value in state.items()}
    if renamed.keys() != get_peft_model_state_dict(model).keys():
        raise ArtifactMismatchError("the LoRA matrices do not fit the base model; was it exchanged?")
    set_peft_model_state_dict(model, renamed)


def item_vectors(
    config: FinetuneConfig, collab: CollabEmbeddings, content: ContentEmbeddings, ids: SemanticIds
) -> dict[str, np.ndarray]:
    """Frozen vectors of the modalities that have semantic IDs and that the method uses, as encoded."""
    known = {"collab": collab.vectors, **content.vectors}
    return {name: known[name] for name in modalities_of(config, ids.modalities)}


def build_model(
    config: FinetuneConfig,
    base: nn.Module,
    prompt: Prompt,
    vectors: dict[str, np.ndarray],
    ids: SemanticIds,
    train_count: Tensor,
    device: torch.device,
) -> MMESID:
    """Put the parts together on a device.

    Args:
        config: settings.
        base: the decoder, see `load_base`.
        prompt: the prompt in its token ids.
        vectors: float32 (N + 1, D_m) by modality, scaled; those that the method does not use are left out.
        ids: codes and codebooks.
        train_count: int64 (N + 1,).
        device: where everything is put.
    """
    width = base.config.hidden_size
    vectors = {name: vectors[name] for name in modalities_of(config, tuple(vectors))}
    frozen = {name: torch.from_numpy(array).to(device) for name, array in vectors.items()}
    codebooks = {name: torch.from_numpy(ids.codebooks[name]) for name in vectors}
    if config.random_codes:
        codebooks = {name: torch.randn_like(table) * 0.02 for name, table in codebooks.items()}
    code_dims = sorted({codebooks[name].shape[-1] for name in vectors})
    if config.method in WITH_CODES and code_dims != [width] and not config.project_codes:
        raise ConfigError(
            f"code embeddings are {', '.join(map(str, code_dims))} wide and the base model {width}: set "
            f"learn_semantic_ids.code_dim={width}, or finetune.project_codes=true"
        )
    if config.fusion_used == "frequency" and (train_count[1:] == train_count[1]).all():
        raise ConfigError(
            f"all items have {int(train_count[1])} training interactions, so there is no frequency to "
            "fuse by; set finetune.fusion=equal"
        )
    codes = {name: torch.from_numpy(ids.codes[name]).to(device) for name in vectors}
    tokens = item_tokens(config, frozen, codes, codebooks, width)
    if config.fusion_used == "target":
        scores = ItemScores(frozen, nn.ModuleDict(), nn.Identity(), width, config.target_std)
    else:
        if config.concat_mode == "feature":
            raise ConfigError(
                "finetune.fusion must be target with concat_mode='feature', whose maps are narrower than the "
                f"model, got {config.fusion!r}"
            )
        sources = 1 + len(vectors)
        gate: nn.Module
        if config.fusion_used == "frequency":
            gate = FrequencyGate(
                train_count,
                sources,
                config.fusion_temperature,
                add_first=config.fusion_weights == "modalities",
            )
        else:
            weight = 1.0 if config.fusion_used == "sum" else None
            gate = EqualWeights(len(train_count) - 1, sources, weight)
        scores = ItemScores(frozen, tokens.projections, gate, width, config.target_std)
    stream, flex = engine(config, device, head_width(base))
    set_up_base(config, base, flex)
    model = MMESID(
        base,
        tokens,
        scores,
        torch.tensor(prompt.instruction, dtype=torch.long),
        torch.tensor(prompt.response, dtype=torch.long),
        share_instruction=stream or (config.share_instruction and config.layout == "packed"),
        stream=stream,
        flex=flex,
        min_slots=2 if config.pad_quirk else 0,
        loss=config.loss,
        mask_pad=config.mask_pad,
        precision=config.precision,
        dropout_rate=config.dropout_rate,
        alignment_weight=config.ctrl_weight if config.ctrl_stage == "joint" else 0.0,
    )
    if distributed.uses_fsdp() and distributed.world_size() > 1:
        # The base is moved block by block as it is spread: a whole one may not fit.
        for part in (model.item_tokens, model.item_scores):
            part.to(device)
        model.instruction, model.response = model.instruction.to(device), model.response.to(device)
        return model
    return model.to(device)


def head_width(base: nn.Module) -> int:
    """Width of one attention head of a decoder."""
    known = base.config
    return getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads


def engine(config: FinetuneConfig, device: torch.device, head: int) -> tuple[bool, bool]:
    """Whether tokens form a stream and whether FlexAttention runs on it.

    Args:
        config: settings.
        device: where the model runs.
        head: width of its attention heads.

    Raises:
        ConfigError: what was asked for does not work on this device.
    """
    gpu = device.type not in ("cpu", "meta")
    can = (gpu or distributed.uses_fsdp()) and config.share_instruction
    stream = can if config.rows == "auto" else config.rows == "stream"
    stream = stream or config.attention == "flex" or (config.checkpoint_activations and can_share(config))
    wide = head >= MIN_FLEX_HEAD
    flex = (gpu and stream and wide) if config.attention == "auto" else config.attention == "flex"
    if flex and gpu and not wide:
        raise ConfigError(
            f"finetune.attention='flex' needs attention heads of {MIN_FLEX_HEAD} numbers at least, and "
            f"{config.base_model} has {head}; leave it out"
        )
    if distributed.uses_fsdp() and distributed.world_size() > 1 and not stream:
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


def set_up_base(config: FinetuneConfig, base: nn.Module, flex: bool) -> None:
    """Attention, kernels, checkpointing and compilation of the base model, in place.

    Raises:
        ConfigError: a library is missing, or the base model does not fit.
    """
    inner = decoder_of(base)
    # Whether the model takes FlexAttention is asked of transformers by its own name for it.
    inner.set_attn_implementation("flex_attention" if flex else "sdpa")
    if flex:
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


def decoder_of(base: nn.Module) -> nn.Module:
    """The base model without LoRA's wrapper."""
    return base.get_base_model() if isinstance(base, PeftModel) else base


def check_context(config: FinetuneConfig, base: nn.Module, tokens: int) -> None:
    """Refuse prompts that the base model's attention window or positions cannot hold.

    Dense masks of ours replace the base model's own ones, sliding windows included.

    Args:
        config: settings.
        base: the decoder.
        tokens: length of the longest prompt.
    """
    known = base.config
    limits = [getattr(known, "max_position_embeddings", None)]
    kinds = getattr(known, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(known, "use_sliding_window", True)
    if slides:
        limits.append(getattr(known, "sliding_window", None))
    limit = min((value for value in limits if value), default=None)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"the longest prompt has {tokens:,} tokens and {config.base_model} sees {limit:,} at once; set "
            "finetune.max_history"
        )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; shared ones once."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def parameter_counts(model: MMESID) -> dict[str, int]:
    """Trainable parameters by part, and all parameters of the base model."""

    def count(parameters: Any) -> int:
        return sum(parameter.numel() for parameter in parameters)

    def sized(kind: type) -> int:
        return sum(count(part.parameters()) for part in tokens.parts.values() if isinstance(part, kind))

    tokens = model.item_tokens
    gate = model.item_scores.gate
    return {
        "base_trainable": count(trainable(model.base).values()),
        "base_total": count(model.base.parameters()),
        "projections": sized(ProjectedVectors),
        "code_embeddings": sized(CodeSums),
        "own_tables": sized(OwnTable),
        "item_mlp": count(tokens.mixer.parameters()),
        "target_table": model.item_scores.target_table.numel(),
        "gate": count(gate.parameters()),
        "trainable": count(trainable(model).values()),
    }


def flops_per_token(model: MMESID) -> float:
    """Floating-point operations a token costs in the base model's linear layers, forward and backward: 4 for
    a frozen weight, 6 for a trained one."""
    return float(
        sum(
            (6 if module.weight.requires_grad else 4) * module.in_features * module.out_features
            for module in model.base.modules()
            if isinstance(module, nn.Linear)
        )
    )


def settings_of(config: FinetuneConfig, prompt: Prompt, base: nn.Module) -> dict[str, Any]:
    """What `scoring.load_scorer` needs beside the weights."""
    return {
        "config": asdict(config),
        "prompt": asdict(prompt),
        "revision": getattr(base.config, "_commit_hash", None) or config.revision,
        "hidden_size": base.config.hidden_size,
    }


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the {what} of finetune.base_model={name!r} cannot be loaded: {reason}. Give a local folder with "
        "config.json, tokenizer and safetensors weights, or a Hub id (gated models need `hf auth login`)"
    )
