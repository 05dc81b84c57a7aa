"""A GPU that knows shapes, dtypes and devices and computes nothing, for machines without one.

Tensors on it are torch's fake tensors. What meets what on which device, and which dtypes are multiplied, is
checked by the same code as on a real GPU; values, kernels and gradients are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class FakeGpu(TorchFunctionMode):
    """While it is active, whatever names the device "cuda", or has a tensor there, is faked."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(on_gpu, tree_leaves((args, kwargs)))):
            return self.run(func, *args, **kwargs)
        return func(*args, **kwargs)

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """The function with all it makes faked."""
        with self.mode:
            return function(*args, **kwargs)

    def move(self, module: nn.Module) -> nn.Module:
        """The module with parameters and buffers on the fake GPU, in place; shared ones stay shared."""
        moved: dict[int, torch.Tensor] = {}

        def there(value: torch.Tensor) -> torch.Tensor:
            if id(value) not in moved:
                faked = self.run(lambda: self.mode.from_tensor(value.detach()).to("cuda"))
                if isinstance(value, nn.Parameter):
                    faked = nn.Parameter(faked, requires_grad=value.requires_grad)
                moved[id(value)] = faked
            return moved[id(value)]

        for part in module.modules():
            for kind in (part._parameters, part._buffers):
                for name, value in kind.items():
                    if value is not None:
                        kind[name] = there(value)
        return module


def on_gpu(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(value, FakeTensor)
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """A fake GPU, with automatic mixed precision as on a real one, and nothing compiled for it."""
    gpu = FakeGpu()
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
        torch.compiler.set_stance("force_eager"),
        gpu,
    ):
        yield gpu
