"""Number formats of matrix products: lower ones for encoders and decoders, never for distances and
losses (but for the gradients of InfoNCE's products)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch


@contextlib.contextmanager
def matrix_precision(
    precision: Literal["float32", "tf32", "bfloat16"], device: torch.device
) -> Iterator[None]:
    """Number format of matrix products inside: float32, tf32 (CUDA alone), or bfloat16 by autocast."""
    products = "high" if precision == "tf32" else torch.get_float32_matmul_precision()
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with float32_products(products), half:
        yield


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in no less than float32 inside, whatever stands around."""
    with float32_products("highest"), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """What torch may make of float32 products inside: highest, high or medium."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
