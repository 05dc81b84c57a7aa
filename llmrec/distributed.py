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
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llmrec.errors import ConfigError, TrainingError

logger = logging.getLogger("llmrec")

PATIENCE = datetime.timedelta(days=7)
LOST = re.compile(r"connection (closed|reset) by|timed out waiting|broken pipe", re.IGNORECASE)

MEETING_SECONDS = 20.0
"""Of waiting for other processes to begin, before it is said."""
MINUTES = re.compile(r"\d{1,6}(\.\d*)?")

_drawing = threading.RLock()
"""Held by the thread that draws random numbers which must be the same every time."""

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

    refuse_other_parallelism()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "`accelerate launch --cpu` starts one process whatever --num_processes says; on a CPU use "
            "`torchrun --nproc_per_node N` (or mpirun) for more"
        )
    if _launched_with_fsdp() and world_size() == 1:
        # One process has nothing to spread, and accelerate would do it all the same, in a way of its own.
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    if uses_fsdp():
        # Else transformers loads weights in one process only, and the others shard what they lack.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    gpus, here = torch.cuda.device_count(), processes_here()
    bound = gpus == 1 and os.environ.get("CUDA_VISIBLE_DEVICES")  # some launchers show each its own alone
    if not on_cpu and 0 < gpus < here and not bound:
        raise ConfigError(
            f"{here} processes were started on this machine and it has {gpus} GPUs; start one for each, with "
            f"--num_processes {gpus} on one machine"
        )
    options: dict[str, Any] = {"timeout": timeout()}
    if uses_deepspeed() and not torch.cuda.is_available():
        # Asked for a CPU, accelerate leaves DeepSpeed out; without, it takes the CPU as it finds no GPU.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        options["backend"] = "gloo"
        on_cpu = False
    else:
        on_cpu = on_cpu or not torch.cuda.is_available()
    with meeting_others():
        found = PartialState(cpu=on_cpu, **options)
    if world_size() > 1 and found.num_processes == 1:
        raise ConfigError(
            f"{world_size()} processes were started by a launcher that does not bring them together on GPUs; "
            "use `accelerate launch` or `torchrun`"
        )
    # With a GPU too, where the main process works alone for minutes: launchers leave it one thread.
    torch.set_num_threads(num_threads())
    return found


def refuse_other_parallelism() -> None:
    """Raise ConfigError if the launcher was told to cut models in pieces that nothing here knows of."""
    for what, name in ("Megatron-LM", "MEGATRON_LM"), ("a parallelism config", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"accelerate was launched with {what}, which is not supported here; name a profile in place "
                "of its default one, such as --config_file recipes/accelerate/ddp.yaml"
            )


def left_aside(precision: str) -> list[str]:
    """What accelerate was told by its command line or default profile and has no effect on fine-tuning.

    Args:
        precision: of fine-tuning, 'fp32' or 'bf16'.
    """
    asked = {
        "mixed_precision": (
            os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
            ("no", precision),
            f"finetune.precision={precision} says what is computed in what",
        ),
        "dynamo_backend": (
            os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(),
            ("no",),
            "finetune.compile=true compiles what pays",
        ),
        "gradient_accumulation_steps": (
            os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
            ("1",),
            "finetune.batch_size is what a step takes, in passes of finetune.micro_batch_tokens",
        ),
    }
    return [
        f"accelerate's {name}={value} is left aside: {instead}"
        for name, (value, same, instead) in asked.items()
        if value not in same
    ]


@contextlib.contextmanager
def meeting_others() -> Iterator[None]:
    """While processes wait for each other, in vain where a launcher's variables are left over: say so after a
    while, and end at once when asked, since no Python runs that could do it in an orderly way."""
    if world_size() == 1:
        yield
        return
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    what = "waiting for all of %d processes at %s; if no others were started, unset WORLD_SIZE and RANK"
    said = threading.Timer(MEETING_SECONDS, logger.warning, (what, world_size(), where))
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


def uses_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def uses_fsdp() -> bool:
    """Whether weights are spread over processes: the launcher asked for fully sharded data parallelism, and
    for more than one."""
    return _launched_with_fsdp() and world_size() > 1


def _launched_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def num_threads() -> int:
    """Threads for this process on a CPU: what `asked_threads` says, or its share of the cores.

    Raises:
        ConfigError: as `asked_threads`.
    """
    from llmrec import machine

    return asked_threads() or max(1, machine.cores() // processes_here())


def asked_threads() -> int | None:
    """$LLMREC_NUM_THREADS, or else $OMP_NUM_THREADS; None where neither says anything.

    The second is left aside under a launcher: accelerate and torchrun write 1 into it for whoever said
    nothing, and one that was asked for looks the same.

    Raises:
        ConfigError: $LLMREC_NUM_THREADS is no whole number of at least 1.
    """
    text = os.environ.get("LLMREC_NUM_THREADS")
    if text is not None:
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"$LLMREC_NUM_THREADS must be a whole number of at least 1, got {text!r}")
        return int(text)
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ:
        return None
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": 2 inside of the 4
    return int(outermost) if outermost.isdecimal() and int(outermost) else None


def world_size() -> int:
    """How many processes there are, by what torchrun, accelerate or mpirun left in the environment."""
    return _number("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", default=1)


def processes_here() -> int:
    """How many of them are on this machine."""
    return _number("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", default=1)


def rank() -> int:
    """Which of them this one is, from 0."""
    return _number("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", default=0)


def _number(*names: str, default: int) -> int:
    """The first of these environment variables that is set."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


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


@functools.cache
def _host_group() -> Any:
    """All processes, for what they tell each other beside the work of their devices."""
    import torch

    state()
    return torch.distributed.new_group(backend="gloo", timeout=timeout())


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


def check_equal(number: int, what: str) -> None:
    """Raise TrainingError unless a number is the same in all processes, which must all call."""
    if world_size() == 1:
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
        if world_size() == 1:
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


@contextlib.contextmanager
def drawing_alone() -> Iterator[None]:
    """Inside, random numbers may be seeded and drawn: no other thread is there, as all of them draw from the
    same generators. Afterwards those of Python, NumPy and torch go on as they would have: a search that draws
    its settings must not draw the same ones after every training."""
    import numpy as np

    with _drawing:
        plain, arrays = random.getstate(), np.random.get_state()
        try:
            with _torch_as_it_was():
                yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)


def _torch_as_it_was() -> contextlib.AbstractContextManager:
    """Afterwards torch's random numbers, those of this process's GPU included, go on as they were; what does
    not need torch need not load it."""
    if "torch" not in sys.modules:
        return contextlib.nullcontext()
    import torch

    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else [])


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """Inside, torch makes float32 numbers, on the CPU unless told a device, keeps gradients, and computes in
    the precision of what it is given, whatever it was told before (a notebook that began with
    `torch.set_grad_enabled(False)`, `set_default_device("cuda")` or an autocast); afterwards as before."""
    if "torch" not in sys.modules:
        yield
        return
    import torch

    with contextlib.ExitStack() as told:
        told.enter_context(torch.inference_mode(False))
        told.enter_context(torch.enable_grad())
        if (dtype := torch.get_default_dtype()) != torch.float32:
            told.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            told.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                told.enter_context(torch.autocast(kind, enabled=False))
        yield
