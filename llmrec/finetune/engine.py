"""How a step is computed: one process, DDP, DeepSpeed or FSDP, behind one small interface over accelerate."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llmrec import launched
from llmrec.errors import ConfigError
from llmrec.evaluation.rank import Scorer
from llmrec.finetune import base_model, build
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.model import MMESID
from llmrec.finetune.optimizer_states import States, read_states, whole, write_master, write_states
from llmrec.finetune.passes import Pass
from llmrec.finetune.scoring import scorer_of

logger = logging.getLogger("llmrec")


def refuse_other_precision() -> None:
    """Raise ConfigError if this process has an Accelerator already that casts what it is given."""
    if is_initialized() and (precision := AcceleratorState().mixed_precision) != "no":
        raise ConfigError(
            f"this process has made an Accelerator(mixed_precision={precision!r}), and accelerate allows one "
            "precision per process; fine-tune in another process, or make that one with mixed_precision='no' "
            "(finetune.precision is what a model is trained in here)"
        )


class Engine:
    """Forward, backward and update of a model on whatever accelerate was launched with.

    Args:
        config: settings.
        model: on its device.

    Attributes:
        inner: the optimiser itself, for learning rates and checkpoints.
        sharded: whether weights or optimiser states are spread over processes.
        resumable: whether the optimiser's states can be kept.
    """

    def __init__(self, config: FinetuneConfig, model: MMESID) -> None:
        self.config = config
        self.model = model
        # bfloat16 is the model's own affair: wrappers would turn what is trained into bfloat16 too.
        # Buffers are equal by construction, and large: DDP would send them around in every step.
        refuse_other_precision()
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        for sentence in launched.left_aside(config.precision):
            logger.warning("finetune: %s", sentence)
        # What the launcher says of these would change results with the launcher, or the time for nothing.
        self.accelerator = Accelerator(
            mixed_precision="no",
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[ddp],
        )
        self.fsdp = launched.uses_fsdp()
        self.deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed and config.bad_steps:
            raise ConfigError(
                "finetune.bad_steps needs steps that can be left out, and DeepSpeed updates weights by "
                "itself; set finetune.bad_steps=0, or use the fsdp2 profile"
            )
        self.sharded = self.fsdp or self.deepspeed
        # Blocks of 8-bit states lie across parameters, so they cannot be put together again by parameter.
        self.resumable = not (self.sharded and config.optimizer == "adamw_8bit")
        if self.fsdp:
            base_model.shard(model, model.base)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.parameters = build.trainable(model)
        self.inner = optimizer_of(config, list(self.parameters.values()))
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None:
            plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.clip_norm,
                "zero_allow_untested_optimizer": True,
            }
        self.wrapped: Any = model
        self.optimizer: Any = self.inner
        if not self.fsdp:
            with warnings.catch_warnings():
                # torch renames the argument, and accelerate knows it by its old name.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                self.wrapped, self.optimizer = self.accelerator.prepare(model, self.inner)
        if can_record(config, model):
            model.record_base()

    def forward_backward(self, given: Pass, scale: float, *, last: bool) -> Tensor:
        """Add the gradients of scale * loss; the loss. The last call of a step shares them over processes."""
        arguments = given.groups, given.weight, given.pairs, given.targets
        if self.fsdp:
            cast(FSDPModule, self.model).set_requires_gradient_sync(last)
            loss = self.wrapped("loss", *arguments)
            (loss * scale).backward()
            return loss.detach()
        self.accelerator.gradient_state._set_sync_gradients(last)
        hold = contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)
        with hold:
            loss = self.wrapped("loss", *arguments)
            # With DeepSpeed the last backward pass also clips and updates.
            self.accelerator.backward(loss * scale)
        return loss.detach()

    def step(self, loss: Tensor) -> Tensor:
        """Clip the gradients, update the weights unless the loss or a gradient is NaN or infinite, forget.

        Args:
            loss: of all processes, ().

        Returns:
            Whether it is, bool () on the device. DeepSpeed has updated the weights by then all the same.
        """
        clip = self.config.clip_norm
        if self.fsdp:
            norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip))
        elif self.deepspeed:
            norm = torch.as_tensor(self.wrapped.get_global_grad_norm(), device=loss.device)
        else:
            norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), clip)
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        if self.deepspeed:
            self.optimizer.step()
        elif isinstance(self.inner, torch.optim.AdamW) and not self.fsdp:
            # The fused kernels skip the update on the device, so that the CPU need not wait for it.
            vars(self.inner).update(grad_scale=None, found_inf=bad.float())
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return bad

    def weights(self) -> dict[str, Tensor]:
        """What is trained, whole and copied, by name; every process must call."""
        with self._gathered():
            return {name: whole(value).detach().clone() for name, value in self.parameters.items()}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Inverse of `weights`; every process must call with the same."""
        with torch.no_grad(), self._gathered(write=True):
            for name, parameter in self.parameters.items():
                value = weights[name].to(parameter.device)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
        for name, parameter in self.parameters.items():
            write_master(parameter, weights[name].to(parameter.device))

    def optimizer_states(self) -> States:
        """What the optimiser remembers, in the main process; every process must call if `sharded`."""
        return read_states(list(self.parameters.values()), self.inner)

    def set_optimizer_states(self, states: States) -> None:
        """Inverse of `optimizer_states`; every process must call with the same."""
        write_states(list(self.parameters.values()), self.inner, states)

    def _gathered(self, *, write: bool = False) -> contextlib.AbstractContextManager:
        """Inside, weights that DeepSpeed spread over processes are whole."""
        if not any(hasattr(parameter, "ds_id") for parameter in self.parameters.values()):
            return contextlib.nullcontext()
        import deepspeed

        rank = 0 if write else None
        return deepspeed.zero.GatheredParameters(list(self.parameters.values()), modifier_rank=rank)

    def close(self) -> None:
        """Let models be loaded whole again; after ZeRO-3 transformers would spread them over processes."""
        if launched.uses_deepspeed():
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()

    def scorer(self) -> Scorer:
        """The model as it is now, as a scorer; every process must call it equally often if `sharded`."""
        return scorer_of(self.model, self.config, run=self.wrapped if self.sharded else None)


def can_record(config: FinetuneConfig, model: MMESID) -> bool:
    """Whether the base model's passes can be recorded as CUDA graphs.

    Not where processes share weights or gradients, which then move while a pass runs; nor where activations
    are computed twice, or positions depend on how long a prompt is, which is read on the host.
    """
    shared = launched.uses_deepspeed() or launched.uses_fsdp() or torch.distributed.is_initialized()
    on_gpu = model.instruction.device.type == "cuda" and model.stream
    rope = getattr(model.base.config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    fixed = not {part.get("rope_type") for part in parts} & {"dynamic", "longrope"}
    return config.cuda_graphs and not config.checkpoint_activations and not shared and on_gpu and fixed


def optimizer_of(config: FinetuneConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the trained weights."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)
