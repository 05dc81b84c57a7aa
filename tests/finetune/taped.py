"""CUDA graphs as far as a CPU can stand in for them: operations noted down with their tensors, and done again
into the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def memory(values: Any) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in tensors(values) if value.numel()}


def detached(values: Any) -> Any:
    return tree_map(lambda value: value.detach() if isinstance(value, torch.Tensor) else value, values)


class Tape(TorchDispatchMode):
    """Operations in order, without those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function._schema.is_mutable or not memory(result) & memory((args, kwargs)):
            self.operations.append((function, *map(detached, (args, kwargs, result))))
        return result


def record(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """In place of `graphs.cuda_graph`: what is recorded computes nothing, and Python is not asked again."""
    tape = Tape()
    with tape:
        function()
    for operation, _, _, result in tape.operations:
        if not operation._schema.is_mutable:
            for value in tensors(result):
                if value.is_floating_point():
                    value.fill_(float("nan"))

    def replay() -> None:
        # What was noted down lies below autocast, which must not cast it once more.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for operation, args, kwargs, there in tape.operations:
                result = operation(*args, **kwargs)
                if not operation._schema.is_mutable:
                    for old, new in zip(tensors(there), tensors(result)):
                        old.copy_(new)

    return replay
