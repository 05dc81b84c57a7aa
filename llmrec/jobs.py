"""Several trainings side by side, each a process with its share of the machine."""

from __future__ import annotations

import argparse
import os


def add_argument(parser: argparse.ArgumentParser) -> None:
    """``--jobs``, of a command that trains cells."""
    parser.add_argument(
        "--jobs", type=positive, help="cells trained at a time (one a GPU, or without any one a core)"
    )


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r:.40}")
    return int(text)


def default() -> int:
    """How many fit: one per GPU, or else one per core."""
    return len(gpus()) or os.cpu_count() or 1


def share(job: int, jobs: int) -> dict[str, str]:
    """Environment of one of several processes: its share of the cores, and of several GPUs one.

    Args:
        job: its number, counted from 0.
        jobs: how many run at a time.
    """
    threads = os.environ.get("LLMREC_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    found = {"LLMREC_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    if len(visible := gpus()) > 1:
        found["CUDA_VISIBLE_DEVICES"] = visible[job % len(visible)]
    return found


def gpus() -> list[str]:
    """The GPUs that this process may use, as $CUDA_VISIBLE_DEVICES names them."""
    import torch

    number = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:number] if named else [str(gpu) for gpu in range(number)]
