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
        self.accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
        self.kind = self.accelerator.distributed_type
        self.sharded = self.kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.inner = optimizer_of(config, list(build.trainable(model).values()))
        self.wrapped, self.optimizer = self.accelerator.prepare(model, self.inner)

    def forward_backward(self, groups: list[PackedRows], scale: float, *, last: bool) -> Tensor:
        """Add the gradients of scale * loss; the loss. The last call of a step shares them over processes."""
        hold = contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)
        with hold:
            with self.accelerator.autocast():
                loss = self.wrapped("loss", groups)
            self.accelerator.backward(loss * scale)
        return loss.detach()

    def step(self) -> None:
        """Clip the gradients, update the weights, forget the gradients."""
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, the model's trained weights are whole in every process."""
        yield

    def scorer(self) -> Scorer:
        """The model as it is now, as a scorer."""
        return scorer_of(self.model, self.config)


def optimizer_of(config: FinetuneConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the trained weights."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)
