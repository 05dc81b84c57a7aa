"""What a launcher told this process, by the environment that it left: how many processes there are, which one
this is, what they may use. Loads no torch."""

from __future__ import annotations

import datetime
import os
import re

from llmrec.errors import ConfigError

MINUTES = re.compile(r"\d{1,6}(\.\d*)?")


def world_size() -> int:
    """How many processes there are, by what torchrun, accelerate or mpirun left in the environment."""
    return _number("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", default=1)


def processes_here() -> int:
    """How many of them are on this machine."""
    return _number("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", default=1)


def rank() -> int:
    """Which of them this one is, from 0."""
    return _number("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", default=0)


def is_main() -> bool:
    """Whether this is the process that writes; true without a launcher."""
    return rank() == 0


def _number(*names: str, default: int) -> int:
    """The first of these environment variables that is set."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def uses_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def uses_fsdp() -> bool:
    """Whether weights are spread over processes: the launcher asked for fully sharded data parallelism, and
    for more than one."""
    return launched_with_fsdp() and world_size() > 1


def launched_with_fsdp() -> bool:
    """Whether the launcher asked for it, of however many processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


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


def timeout() -> datetime.timedelta:
    """How long a process may keep the others waiting in work that they share: $LLMREC_TIMEOUT_MINUTES.

    Raises:
        ConfigError: the variable is no number of minutes.
    """
    text = os.environ.get("LLMREC_TIMEOUT_MINUTES", "30")
    if not MINUTES.fullmatch(text) or float(text) == 0:
        raise ConfigError(f"$LLMREC_TIMEOUT_MINUTES must be a number above 0, got {text!r}")
    return datetime.timedelta(minutes=float(text))
