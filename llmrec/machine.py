"""What machine figures were measured on, in one line."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil


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


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    listing = Path("/proc") / "cpuinfo"
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
