"""What machine figures were measured on, in one line."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

PROCESS = Path("/proc") / "self"
CGROUPS = Path("/sys") / "fs" / "cgroup"

if TYPE_CHECKING:
    import torch


def describe() -> str:
    """Processor, cores, memory, accelerator, and versions of Python and torch."""
    import torch

    parts = [
        processor(),
        f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores",
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    ]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def cores() -> int:
    """Cores that this process may use: the physical ones, or as many as it was given of them, by its
    affinity or by the share of time that a container is granted (``docker run --cpus 2``)."""
    # Where the system does not tell, as on macOS, all of them.
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    here = min(psutil.cpu_count(logical=False) or given or 1, given or 1)
    return max(1, math.ceil(min(here, granted())))


def granted() -> float:
    """Cores' worth of time that Linux control groups grant this process; infinity where none limits it."""
    files: list[tuple[Path, ...]] = []
    for line in _text_of(PROCESS / "cgroup").splitlines():  # number:controllers:group
        controllers, _, group = line.partition(":")[2].partition(":")
        if not controllers:  # version 2: every group above may limit it too
            inner = CGROUPS / group.lstrip("/")
            folders = [inner, *inner.parents]
            files += [(folder / "cpu.max",) for folder in folders[: folders.index(CGROUPS) + 1]]
        elif "cpu" in controllers.split(","):
            files.append((CGROUPS / "cpu" / "cpu.cfs_quota_us", CGROUPS / "cpu" / "cpu.cfs_period_us"))
    limits = [" ".join(map(_text_of, pair)).split() for pair in files]
    granted = [int(found[0]) / int(found[1]) for found in limits if len(found) == 2 and found[0].isdecimal()]
    return min(granted, default=math.inf)


def _text_of(path: Path) -> str:
    """What a file of the kernel holds; nothing where there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations per second of a large square matrix product, the best of a few, measured now.

    Args:
        device: where.
        dtype: of the factors.
        size: rows and columns; None: enough to keep the device busy for some milliseconds.
    """
    import torch

    gpu = device.type != "cpu"
    size = size or (8192 if gpu else 1024)
    left, right = (
        torch.linspace(-1, 1, size * size, device=device, dtype=torch.float32).view(size, size).to(dtype)
        for _ in range(2)
    )
    best = float("inf")
    for _ in range(10 if gpu else 4):
        finish(device)
        begun = time.perf_counter()
        left @ right
        finish(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def finish(device: torch.device) -> None:
    """Wait until a GPU has done all its work. Calls return before that, so clocks are read after this one."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def make_room() -> None:
    """Free the memory of models that are no longer used. Parts of a model refer to each other, so they stay
    until Python's garbage collector runs."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Most bytes used since `reset_peak_memory`: allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()


def peak_gpu_memory() -> int | None:
    """Most bytes allocated on this process's GPU since `reset_peak_memory`; None without one."""
    if "torch" not in sys.modules or not sys.modules["torch"].cuda.is_available():
        return None
    return int(sys.modules["torch"].cuda.max_memory_allocated())


def peak_resident_memory() -> int:
    """Most bytes this process held since `reset_peak_memory`, or since it began where that does nothing."""
    status = PROCESS / "status"
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Forget earlier peaks, so that a stage is not charged with what ran before it (Linux and GPUs)."""
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    listing = Path("/proc") / "cpuinfo"
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


LONGEST_TRIANGLE = 4096
"""Numbers on an axis up to which sums up to each of them are made by a product with a triangle of ones."""


def running_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums along an axis up to each of its numbers: torch's cumsum, but where a GPU must add up in the same
    order every time ($LLMREC_DETERMINISTIC), for which torch 2.11 has none."""
    import torch

    if not (values.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values.cumsum(dim)
    count = values.shape[dim]
    if count > LONGEST_TRIANGLE:
        return values.cpu().cumsum(dim).to(values.device)
    triangle = torch.ones(count, count, dtype=torch.float64, device=values.device).triu()
    return (values.movedim(dim, -1).double() @ triangle).to(values.dtype).movedim(-1, dim)
