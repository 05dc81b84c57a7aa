"""What Python and torch hold once for the whole process: random generators, default types, precision. Inside
`drawing_alone` and `usual_torch` they may be changed, and are as before afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Iterator

_drawing = threading.RLock()
"""Held by the thread that draws random numbers which must be the same every time."""


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
