"""Number formats of matrix products: lower ones where a stage's settings say so, full ones for what asks for
them whatever stands around (codes and losses of semantic IDs)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch


@contextlib.contextmanager
def matrix_precision(
    precision: Literal["float32", "tf32", "bfloat16"], device: torch.device
) -> Iterator[None]:
    """Number format of matrix products inside: float32, tf32 (CUDA alone), or bfloat16 by autocast.

    Weights may change inside: they are converted whenever they are used. (What autocast would keep of them
    until its end would stay as it was before the first step.)
    """
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
    with tf32(device, precision == "tf32"), half:
        yield


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in no less than float32 inside, whatever stands around."""
    with float32_products("highest"), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def tf32(device: torch.device, wanted: bool) -> Iterator[None]:
    """Inside, a GPU multiplies float32 matrices in TF32 (10 bits of mantissa), if wanted."""
    if not wanted or device.type != "cuda":
        yield
        return
    with float32_products("high"):
        yield


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """What torch may make of float32 products inside: highest, high or medium.

    Afterwards it is as it was, also where a caller has set a format for one of torch's backends alone; torch
    then refuses to say one for all.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:
        of_all = None
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if of_all is not None:
            torch.set_float32_matmul_precision(of_all)
        for backend, was in zip(backends, before):
            backend.fp32_precision = was
