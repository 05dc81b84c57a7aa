"""A GPU that computes on the CPU: real numbers, pretended devices, for machines without one.

Tensors are ordinary ones of the CPU; beside them stands a note of the device that they would lie on, kept by
storage, so that views, gradients and what autograd saves have it too. Code under test sees ``cuda`` wherever
it asks, and what torch would refuse on a real GPU for the devices of its arguments is refused here. Kernels,
speed, memory and what streams do at the same time are not pretended. One thread only: others see the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

HOST_INDICES = {"index.Tensor", "index_put_.default", "index_put.default", "_index_put_impl_.default",
                "_unsafe_index.Tensor", "_unsafe_index_put.default"}  # fmt: skip
"""Operations on a GPU that take indices from the host too."""

ANY_DEVICES = {"copy_.default", "_to_copy.default", "set_.source_Storage", "_foreach_copy_.default",
               "_has_compatible_shallow_copy_type.default"}  # fmt: skip

NO_SCALARS = ("_fused_", "cat.", "gather.", "scatter", "index_select.", "embedding", "mm.", "bmm.", "addmm")
"""Operations whose arguments must lie together even if they are single numbers."""

SHARES = {"as_tensor", "asarray", "from_numpy"}
"""What makes a tensor of memory that it shares."""


class DeviceError(RuntimeError):
    """What a real GPU would refuse."""


class Notes:
    """Which device each storage would lie on; what has no note lies on the CPU, None fits every device."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[StorageWeakRef, torch.device | None]] = {}
        self.limit = 10_000

    def of(self, value: Tensor) -> torch.device | None:
        found = self.known.get(key_of(value))
        return CPU if found is None else found[1]

    def has(self, value: Tensor) -> bool:
        return key_of(value) in self.known

    def put(self, value: Tensor, device: torch.device | None) -> None:
        # A weak reference keeps the number of a storage from being given to another.
        self.known[key_of(value)] = StorageWeakRef(storage_of(value)), device
        if len(self.known) > self.limit:
            self.known = {key: note for key, note in self.known.items() if not note[0].expired()}
            self.limit = max(10_000, 2 * len(self.known))


def storage_of(value: Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction():
        return value.untyped_storage()


def key_of(value: Tensor) -> int:
    return storage_of(value)._cdata


def plain(value: Any) -> bool:
    """Whether it is a tensor with memory of its own; what maps over a batch (vmap) has none."""
    if not isinstance(value, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    return value.layout == torch.strided


class Operations(TorchDispatchMode):
    """Refuses what a GPU would, and notes where results lie."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes
        self.inside = 0
        """How many calls by Python with tensors of the GPU are under way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2] + "." + (func._overloadname or "default")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        where = self.check(name, args, kwargs, given)
        if not given and (self.inside or torch._C._current_graph_task_id() != -1):
            where = None  # C++ asks for memory beside a tensor that it takes for the CPU's
        found = func(*args, **kwargs)
        if where is None or where == CUDA:
            for value in tree_leaves(found):
                if isinstance(value, Tensor) and not self.notes.has(value):
                    self.notes.put(value, where)
        # What fitted every device now lies where it was used.
        if name.partition(".")[0].endswith("_") and where == CUDA:
            for value in given:
                if self.notes.of(value) is None:
                    self.notes.put(value, CUDA)
        return found

    def check(self, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> torch.device | None:
        """The device of the results.

        Raises:
            DeviceError: arguments do not lie together.
        """
        notes = self.notes
        if name in ANY_DEVICES:
            return notes.of(given[0]) if given else CPU
        strict = name.startswith(NO_SCALARS)
        counted = given
        if name in HOST_INDICES:
            own = notes.of(args[0])
            indices = [value for value in tree_leaves(args[1]) if isinstance(value, Tensor)]
            if own == CPU and any(notes.of(value) == CUDA for value in indices):
                raise DeviceError(f"{name}: indices on cuda of a tensor on the cpu")
            values = [value for value in tree_leaves((args[2:], kwargs)) if isinstance(value, Tensor)]
            counted = [args[0], *values]
        devices = {notes.of(value) for value in counted if strict or value.dim() or notes.of(value) == CUDA}
        if CPU in devices and CUDA in devices:
            shapes = [f"{tuple(value.shape)} {value.dtype} on {notes.of(value)}" for value in counted]
            raise DeviceError(f"{name}: Expected all tensors to be on the same device: {'; '.join(shapes)}")
        generators = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Generator)]
        if CUDA in devices and generators:
            raise DeviceError(f"{name}: a generator of the cpu for a tensor on cuda")
        if CUDA in devices:
            return CUDA
        if CPU in devices or not given:
            return CPU
        return CPU if any(notes.of(value) == CPU for value in counted) else None


class PretendGpu(TorchFunctionMode):
    """While it is active, whatever names the device ``cuda`` gets a tensor of the CPU with a note."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes()
        self.operations = Operations(self.notes)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.attribute(func, args[0])
        special = SPECIAL.get(func)
        if special is not None:
            return special(self, func, *args, **kwargs)
        wanted = kwargs.get("device")
        device = None if wanted is None else as_device(wanted)
        if device is not None and device.type not in ("cpu", "cuda"):  # meta
            return func(*args, **kwargs)
        if device is not None:
            kwargs["device"] = CPU
        if device == CUDA and isinstance(kwargs.get("generator"), torch.Generator):
            raise DeviceError(f"{name}: a generator of the cpu for a tensor on cuda")
        kwargs.pop("pin_memory", None)
        here = device == CUDA or (device is None and self.any_cuda((args, kwargs)))
        with self.within(here):
            found = func(*args, **kwargs)
        if device is not None:
            if name in SHARES or self.any_tensor_is(found, args):
                raise AssertionError(f"{name} must be treated by itself")
            if isinstance(found, Tensor):
                self.notes.put(found, device)
        elif here:
            for value in tree_leaves(found):
                if plain(value) and self.notes.of(value) is None:
                    self.notes.put(value, CUDA)
        return found

    @contextlib.contextmanager
    def within(self, here: bool) -> Iterator[None]:
        self.operations.inside += here
        try:
            yield
        finally:
            self.operations.inside -= here

    def any_cuda(self, given: Any) -> bool:
        return any(plain(value) and self.notes.of(value) == CUDA for value in tree_leaves(given))

    def groups(self, real: Callable) -> Callable:
        """What optimisers sort tensors by: they ask a function of C++'s, which knows the CPU alone."""

        def grouped(lists: list[list[Tensor | None]], with_indices: bool = False) -> dict:
            found = real(lists, with_indices)
            return {
                (self.notes.of(group[0][0][0]) or CUDA, dtype): group for (_, dtype), group in found.items()
            }

        return grouped

    @staticmethod
    def any_tensor_is(found: Any, args: Any) -> bool:
        return any(found is value for value in tree_leaves(args) if isinstance(value, Tensor))

    def attribute(self, func: Callable, value: Any) -> Any:
        getter = getattr(func, "__self__", None)
        device = None
        if plain(value) and getter in DEVICE_ATTRIBUTES:
            real = func(value)
            if getter is torch.Tensor.device and real.type == "meta":
                return real
            device = self.notes.of(value) or CUDA
            return DEVICE_ATTRIBUTES[getter](device) if device == CUDA else real
        return func(value)

    def moved(self, value: Tensor, device: torch.device | None, *args: Any, **kwargs: Any) -> Tensor:
        """The tensor on a device: itself, or a copy with a note."""
        now = self.notes.of(value)
        if device is None or value.is_meta or device.type == "meta":
            where: list[Any] = [] if device is None or device == now else [device]
            found: Tensor = value.to(*where, *args, **kwargs)
            if device is None and now == CUDA and not self.notes.has(found):
                self.notes.put(found, now)
            return found
        if device == now:
            found = value.to(*args, **kwargs)
            if found is not value:
                self.notes.put(found, now)
            return found
        if kwargs.get("non_blocking") and device == CPU and now == CUDA:
            raise DeviceError("a copy to the host that nobody waits for")
        found = value.to(*args, **{**kwargs, "copy": True})
        self.notes.put(found, device)
        return found


def as_device(value: Any) -> torch.device:
    if isinstance(value, int):
        return CUDA
    found = torch.device(value) if isinstance(value, str) else value
    return CUDA if found.type == "cuda" else found


def to(gpu: PretendGpu, func: Callable, value: Tensor, *given: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` in its three forms."""
    args = list(given)
    device = kwargs.pop("device", None)
    if args and isinstance(args[0], Tensor):
        other = args.pop(0)
        device = gpu.notes.of(other)
        args.insert(0, other.dtype)
    elif "other" in kwargs:
        other = kwargs.pop("other")
        device = gpu.notes.of(other)
        args.insert(0, other.dtype)
    elif args and (isinstance(args[0], (str, torch.device)) or type(args[0]) is int):
        device = args.pop(0)
    elif args and args[0] is None:
        args.pop(0)
    if args and args[0] is None:
        args.pop(0)
    # to(device, dtype, non_blocking, copy) and to(dtype, non_blocking, copy)
    names = ["dtype", "non_blocking", "copy"]
    if args and not isinstance(args[0], torch.dtype):
        names = names[1:]
    kwargs |= dict(zip(names, args))
    kwargs = {name: one for name, one in kwargs.items() if one is not None}
    if not plain(value):
        return func(value, *([] if device is None else [device]), **kwargs)
    return gpu.moved(value, None if device is None else as_device(device), **kwargs)


def cpu(gpu: PretendGpu, func: Callable, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return gpu.moved(value, CPU, **kwargs)


def cuda(gpu: PretendGpu, func: Callable, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return gpu.moved(value, CUDA, **{name: given for name, given in kwargs.items() if name != "device"})


def pinned(gpu: PretendGpu, func: Callable, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if gpu.notes.of(value) != CPU:
        raise DeviceError("cannot pin a tensor that is not on the cpu")
    return value.clone()


def numpy(gpu: PretendGpu, func: Callable, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    if gpu.notes.of(value) == CUDA:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return func(value, *args, **kwargs)


def as_tensor(gpu: PretendGpu, func: Callable, data: Any, *args: Any, **kwargs: Any) -> Tensor:
    device = kwargs.pop("device", None)
    found = func(data, *args, **kwargs)
    if isinstance(data, Tensor) and found is not data and gpu.notes.of(data) != CPU:
        gpu.notes.put(found, gpu.notes.of(data))
    return found if device is None else gpu.moved(found, as_device(device))


def copied(gpu: PretendGpu, func: Callable, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = func(value, *args, **kwargs)
    if plain(value) and gpu.notes.of(value) != CPU:
        gpu.notes.put(found, gpu.notes.of(value))
    return found


def backward(gpu: PretendGpu, func: Callable, loss: Tensor, gradient: Any = None, retain_graph: Any = None,
             create_graph: bool = False, inputs: Any = None) -> None:  # fmt: skip
    """With functions of Python's own on the way, which ask for devices too."""
    with gpu:
        torch.autograd.backward(loss, gradient, retain_graph, create_graph, inputs=inputs)


SPECIAL: dict[Any, Callable] = {
    torch.Tensor.to: to,
    torch.Tensor.cpu: cpu,
    torch.Tensor.cuda: cuda,
    torch.Tensor.pin_memory: pinned,
    torch.Tensor.numpy: numpy,
    torch.Tensor.__array__: numpy,
    torch.as_tensor: as_tensor,
    torch.asarray: as_tensor,
    torch.Tensor.__deepcopy__: copied,
    torch.Tensor.backward: backward,
}

DEVICE_ATTRIBUTES = {
    torch.Tensor.device: lambda device: device,
    torch.Tensor.is_cuda: lambda device: device == CUDA,
    torch.Tensor.is_cpu: lambda device: device == CPU,
}


class Autocast(torch.autocast):
    """That of the CPU in place of the GPU's; their lists of operations are much alike."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def of_cpu(function: Callable) -> Callable:
    return lambda kind="cpu", *rest: function("cpu" if kind == "cuda" else kind, *rest)


def missing() -> str | None:
    """What this torch lacks of the parts that are used here, which another version may have elsewhere."""
    wanted = {
        "torch._C._functorch": "is_functorch_wrapped_tensor",
        "torch._C": "_current_graph_task_id",
        "torch.utils.checkpoint": "_allowed_determinism_checks_to_fns",
        "torch.optim.optimizer": "_group_tensors_by_device_and_dtype",
        "torch.nn.utils.clip_grad": "_group_tensors_by_device_and_dtype",
    }
    found = (f"{module}.{name}" for module, name in wanted.items() if not hasattr(sys.modules[module], name))
    return next(found, None)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """A pretended GPU."""
    gpu = PretendGpu()
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
        "synchronize": None, "empty_cache": None, "max_memory_allocated": 0, "memory_allocated": 0,
        "reset_peak_memory_stats": None, "mem_get_info": (1 << 36, 1 << 36), "get_device_name": "pretended",
        "is_bf16_supported": True, "manual_seed_all": None, "manual_seed": None, "set_rng_state": None,
        "set_device": None, "get_device_capability": (9, 0),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, _a=answer, **__: _a))
        stack.enter_context(mock.patch.object(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()))
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, of_cpu(getattr(torch, name))))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(torch.optim.Optimizer, name):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, name, lambda self: None))
        for module in map(importlib.import_module, ("torch.optim.optimizer", "torch.nn.utils.clip_grad")):
            name = "_group_tensors_by_device_and_dtype"
            stack.enter_context(mock.patch.object(module, name, gpu.groups(getattr(module, name))))
        # What a checkpointed pass computes again is compared without devices, which C++ would name.
        stack.enter_context(
            mock.patch.dict(
                "torch.utils.checkpoint._allowed_determinism_checks_to_fns",
                default=lambda value: {"shape": value.shape, "dtype": value.dtype},
            )
        )
        # cuDNN's form of recurrent weights.
        stack.enter_context(mock.patch.object(torch.nn.RNNBase, "flatten_parameters", lambda self: None))
        stack.enter_context(gpu.operations)
        stack.enter_context(gpu)
        yield gpu
