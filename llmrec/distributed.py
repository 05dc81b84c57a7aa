"""Processes and devices: thin over accelerate. Imports torch only when asked to.

Stages run in the main process alone unless marked `every_process`; the others wait and then load
the result from disk.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llmrec import launched, machine
from llmrec.errors import ConfigError, TrainingError

logger = logging.getLogger("llmrec")

PATIENCE = datetime.timedelta(days=7)
LOST = re.compile(r"connection (closed|reset) by|timed out waiting|broken pipe", re.IGNORECASE)

MEETING_SECONDS = 20.0
"""Of waiting for other processes to begin, before it is said."""

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

    Collective calls fail after `launched.timeout`. On the CPU, torch gets this process's share of the
    physical cores; `accelerate launch` would leave it one thread.

    Raises:
        ConfigError: the launcher was told what cannot be done here, or started more processes than fit.
    """
    import torch
    from accelerate import PartialState

    launched.refuse_other_parallelism()
    _correct_launchers_fsdp()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "`accelerate launch --cpu` starts one process whatever --num_processes says; on a CPU use "
            "`torchrun --nproc_per_node N` (or mpirun) for more"
        )
    gpus, here = torch.cuda.device_count(), launched.processes_here()
    bound = gpus == 1 and os.environ.get("CUDA_VISIBLE_DEVICES")  # some launchers show each its own alone
    if not on_cpu and 0 < gpus < here and not bound:
        raise ConfigError(
            f"{here} processes were started on this machine and it has {gpus} GPUs; start one for each, with "
            f"--num_processes {gpus} on one machine"
        )
    options: dict[str, Any] = {"timeout": launched.timeout()}
    if launched.uses_deepspeed() and not torch.cuda.is_available():
        # Asked for a CPU, accelerate leaves DeepSpeed out; without, it takes the CPU as it finds no GPU.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        options["backend"] = "gloo"
        on_cpu = False
    else:
        on_cpu = on_cpu or not torch.cuda.is_available()
    with meeting_others():
        found = PartialState(cpu=on_cpu, **options)
    if (started := launched.world_size()) > 1 and found.num_processes == 1:
        raise ConfigError(
            f"{started} processes were started by a launcher that does not bring them together on GPUs; "
            "use `accelerate launch` or `torchrun`"
        )
    # With a GPU too, where the main process works alone for minutes: launchers leave it one thread.
    torch.set_num_threads(num_threads())
    return found


def _correct_launchers_fsdp() -> None:
    if launched.launched_with_fsdp() and launched.world_size() == 1:
        # One process has nothing to spread, and accelerate would do it all the same, in a way of its own.
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    if launched.uses_fsdp():
        # Else transformers loads weights in one process only, and the others shard what they lack.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


@contextlib.contextmanager
def meeting_others() -> Iterator[None]:
    """While processes wait for each other, in vain where a launcher's variables are left over: say so after a
    while, and end at once when asked, since no Python runs that could do it in an orderly way."""
    if launched.world_size() == 1:
        yield
        return
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    what = "waiting for all of %d processes at %s; if no others were started, unset WORLD_SIZE and RANK"
    said = threading.Timer(MEETING_SECONDS, logger.warning, (what, launched.world_size(), where))
    said.daemon = True
    said.start()
    asked = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in asked}
    try:
        yield
    finally:
        said.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def num_threads() -> int:
    """Threads for this process on a CPU: what `launched.asked_threads` says, or its share of the cores.

    Raises:
        ConfigError: as `asked_threads`.
    """
    return launched.asked_threads() or max(1, machine.cores() // launched.processes_here())


def wait() -> None:
    """Wait until every process gets here, however long; nothing to do when there is one."""
    if launched.world_size() > 1:
        import torch

        torch.distributed.barrier(group=_patient_group())


@functools.cache
def _patient_group() -> Any:
    """All processes, for waiting while the main one trains by itself, which takes hours."""
    import torch

    state()
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


@functools.cache
def _host_group() -> Any:
    """All processes, for what they tell each other beside the work of their devices."""
    import torch

    state()
    return torch.distributed.new_group(backend="gloo", timeout=launched.timeout())


def lost_another(error: RuntimeError) -> bool:
    """Whether an error is no fault of this process but says that another one ended or hangs."""
    if launched.world_size() == 1:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or bool(LOST.search(str(error)))


def check_equal(number: int, what: str) -> None:
    """Raise TrainingError unless a number is the same in all processes, which must all call."""
    if launched.world_size() == 1:
        return
    import torch

    ends = torch.tensor([number, -number], dtype=torch.int64)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group=_host_group())
    most, least = int(ends[0]), -int(ends[1])
    if most != least:
        raise TrainingError(
            f"processes disagree on the {what}: {least} and {most}; the run folder must be one that all "
            "machines share, and show each of them the same. Start again"
        )


class Agreement:
    """What any process wants, known to all of them one call later, so that nobody waits for anybody.

    Every process must make the same calls.
    """

    def __init__(self) -> None:
        self.shared: Any = None
        self.work: Any = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process set it at the call before; with one process, at this one."""
        if launched.world_size() == 1:
            return flags
        import torch

        before = self.settle()
        self.shared = torch.tensor(flags, dtype=torch.int32)
        group, largest = _host_group(), torch.distributed.ReduceOp.MAX
        self.work = torch.distributed.all_reduce(self.shared, largest, group=group, async_op=True)
        return before or (False,) * len(flags)

    def settle(self) -> tuple[bool, ...]:
        """What was asked at the last call; nothing is on its way any more."""
        if self.work is None:
            return ()
        self.work.wait()
        self.work = None
        return tuple(bool(flag) for flag in self.shared.tolist())


def device() -> Any:
    """The torch device of this process."""
    return state().device
