"""LoRA matrices on a base model, in PEFT's modules and format."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.finetune import low_rank
from llmrec.finetune.config import FinetuneConfig
from llmrec.folder_digest import revision_of

# We load the decoder without its language-model head; PEFT users load it with one, where the decoder
# is called `model`.
DECODER_PREFIX = "base_model.model."
CAUSAL_LM_PREFIX = "base_model.model.model."


def add_lora(base: nn.Module, config: FinetuneConfig) -> PeftModel:
    """Freeze a decoder and put trainable float32 LoRA matrices on its linear layers.

    Raises:
        ConfigError: it has no linear layers of a name; PEFT passes over those where others are there.
    """
    linear = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear)]
    absent = [
        name for name in config.lora_targets if not any(f".{one}".endswith(f".{name}") for one in linear)
    ]
    if absent:
        there = dict.fromkeys(name.rpartition(".")[2] for name in linear)
        raise ConfigError(
            f"finetune.lora_targets: {config.base_model} has no linear layers called {', '.join(absent)}, "
            f"but {', '.join(there)}; give some of these"
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout_rate,
        target_modules=list(config.lora_targets),
        bias="none",
        revision=config.revision,
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that it is giving up.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
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
        "revision": revision_of(config.base_model, config.revision),
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
