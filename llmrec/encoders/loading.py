"""What the encoders that load trained models share: number format and quiet loading."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging


def dtype_of(setting: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The number format to compute in.

    Args:
        setting: float32, bfloat16, float16, or auto (float32 on a CPU, else `stored`).
        stored: format of the weights.
        device: where the model runs.
    """
    if setting != "auto":
        return getattr(torch, setting)
    return torch.float32 if device.type == "cpu" else stored


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep model libraries from reporting what we check and report ourselves.

    open_clip logs through the root logger, and that call would also install a handler for
    everybody; the NullHandler prevents it.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    level, bars = root.level, transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of a library's message, short enough for ours."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
