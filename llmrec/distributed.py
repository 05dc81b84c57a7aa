"""Processes and devices: thin over accelerate. Imports torch only when asked to.

Stages run in the main process alone unless marked `every_process`; the others wait and then load
the result from disk.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import random
import re
from collections.abc import Callable
from typing import Any, TypeVar

from llmrec.errors import ConfigError

logger = logging.getLogger("llmrec")

PATIENCE = datetime.timedelta(days=7)
LOST = re.compile(r"connection (closed|reset) by|timed out waiting|broken pipe", re.IGNORECASE)

MINUTES = re.compile(r"\d{1,6}(\.\d*)?")

F = TypeVar("F", bound=Callable[..., Any])


def every_process(function: F) -> F:
    """Mark a stage whose work is shared by all processes."""
    setattr(function, "every_process", True)  # noqa: B010 (type checkers see no such attribute)
    return function


def runs_everywhere(function: Callable[..., Any]) -> bool:
    return getattr(function, "every_process", False)


@functools.cache
def state() -> Any:
    """The process group and device, made on first use (accelerate's PartialState).

    Collective calls fail after `timeout`. On the CPU, torch gets this process's share of the physical
    cores; `accelerate launch` would leave it one thread.
    """
    import torch
    from accelerate import PartialState

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "`accelerate launch --cpu` starts one process whatever --num_processes says; on a CPU use "
            "`torchrun --nproc_per_node N` (or mpirun) for more"
        )
    if uses_fsdp():
        # Else transformers loads weights in one process only, and the others shard what they lack.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    options: dict[str, Any] = {"timeout": timeout()}
    if uses_deepspeed() and not torch.cuda.is_available():
        # Asked for a CPU, accelerate leaves DeepSpeed out; without, it takes the CPU as it finds no GPU.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        options["backend"] = "gloo"
        on_cpu = False
    else:
        on_cpu = on_cpu or not torch.cuda.is_available()
    found = PartialState(cpu=on_cpu, **options)
    if found.device.type == "cpu":
        torch.set_num_threads(num_threads())
    return found


def uses_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def uses_fsdp() -> bool:
    """Whether the launcher asked for fully sharded data parallelism."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def num_threads() -> int:
    """Threads for this process on a CPU: $LLMREC_NUM_THREADS, or its share of the cores.

    Raises:
        ConfigError: the variable is no whole number of at least 1.
    """
    from llmrec import machine

    text = os.environ.get("LLMREC_NUM_THREADS")
    if text is None:
        return max(1, machine.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"$LLMREC_NUM_THREADS must be a whole number of at least 1, got {text!r}")
    return int(text)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes; true without a launcher."""
    return rank() == 0


def wait() -> None:
    """Wait until every process gets here, however long; nothing to do when there is one."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier(group=_patient_group())


@functools.cache
def _patient_group() -> Any:
    """All processes, for waiting while the main one trains by itself, which takes hours."""
    import torch

    state()
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def timeout() -> datetime.timedelta:
    """How long a process may keep the others waiting in work that they share: $LLMREC_TIMEOUT_MINUTES.

    Raises:
        ConfigError: the variable is no number of minutes.
    """
    text = os.environ.get("LLMREC_TIMEOUT_MINUTES", "30")
    if not MINUTES.fullmatch(text) or float(text) == 0:
        raise ConfigError(f"$LLMREC_TIMEOUT_MINUTES must be a number above 0, got {text!r}")
    return datetime.timedelta(minutes=float(text))


def lost_another(error: RuntimeError) -> bool:
    """Whether an error is no fault of this process but says that another one ended or hangs."""
    if world_size() == 1:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or bool(LOST.search(str(error)))


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process; every process must call, and all get the same."""
    if world_size() == 1:
        return flags
    import torch

    # As a tensor: objects would travel as pickles.
    found = torch.tensor(flags, dtype=torch.int32, device=device())
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in found.tolist())


def device() -> Any:
    """The torch device of this process."""
    return state().device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices).

    With $LLMREC_DETERMINISTIC=1, torch also takes no kernel whose sums depend on the order in which threads
    come; it fails where it has no other. On a CPU runs are equal to the last bit without it.
    """
    import numpy as np
    import torch

    if os.environ.get("LLMREC_DETERMINISTIC", "0") not in ("", "0"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
