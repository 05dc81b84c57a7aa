"""How a step is computed: one process, DDP, DeepSpeed or FSDP, behind one small interface over accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from llmrec.evaluation.rank import Scorer
from llmrec.finetune import build
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.model import MMESID
from llmrec.finetune.packing import PackedRows
from llmrec.finetune.scoring import scorer_of


class Engine:
    """Forward, backward and update of a model on whatever accelerate was launched with.

    Args:
        config: settings.
        model: on its device.

    Attributes:
        inner: the optimiser itself, for learning rates and checkpoints.
        sharded: whether weights or optimiser states are spread over processes.
    """

    def __init__(self, config: FinetuneConfig, model: MMESID) -> None:
        self.config = config
        self.model = model
        # bfloat16 is the model's own affair: wrappers would turn what is trained into bfloat16 too.
        self.accelerator = Accelerator(mixed_precision="no")
        self.kind = self.accelerator.distributed_type
        self.sharded = self.kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.parameters = build.trainable(model)
        self.inner = optimizer_of(config, list(self.parameters.values()))
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None:
            plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": config.clip_norm,
                "zero_allow_untested_optimizer": True,
            }
        self.wrapped, self.optimizer = self.accelerator.prepare(model, self.inner)

    def forward_backward(self, groups: list[PackedRows], scale: float, *, last: bool) -> Tensor:
        """Add the gradients of scale * loss; the loss. The last call of a step shares them over processes."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        hold = contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)
        with hold:
            loss = self.wrapped("loss", groups)
            # With DeepSpeed the last backward pass also clips and updates.
            self.accelerator.backward(loss * scale)
        return loss.detach()

    def step(self) -> None:
        """Clip the gradients, update the weights, forget the gradients."""
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def whole_weights(self, *, write: bool = False) -> Iterator[None]:
        """Inside, the model's trained weights are whole in every process.

        Args:
            write: keep what the main process changes.
        """
        if not any(hasattr(parameter, "ds_id") for parameter in self.parameters.values()):
            yield
            return
        import deepspeed

        rank = 0 if write else None
        with deepspeed.zero.GatheredParameters(list(self.parameters.values()), modifier_rank=rank):
            yield

    def scorer(self) -> Scorer:
        """The model as it is now, as a scorer; every process must call it equally often if `sharded`."""
        return scorer_of(self.model, self.config, run=self.wrapped if self.sharded else None)


def optimizer_of(config: FinetuneConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the trained weights."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)
