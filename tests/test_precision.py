"""Lower precision: of products alone, of weights as they are, and only while something learns."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from llmrec.precision import full_precision, matrix_precision, tf32


def test_bfloat16_products_are_of_the_weights_as_they_are():
    """Autocast keeps its copies of weights until it ends, unless told otherwise."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(8, 8), torch.randn(4, 8)
    with matrix_precision("bfloat16", rows.device):
        before = layer(rows)
        before.float().sum().backward()
        layer.weight.data.add_(1.0)
        after = layer(rows)
    assert before.dtype == after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), layer(rows), rtol=0.05, atol=0.05)
    assert (after - before).abs().max() > 0.5


def test_what_a_caller_set_for_one_backend_is_theirs_afterwards():
    """Torch raises where it is asked for the format of all backends while one of them has another."""
    code = """
import itertools, torch
from llmrec.precision import float32_products, full_precision
ask_all = torch.get_float32_matmul_precision
backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
formats = {"highest": "ieee", "high": "tf32"}
for backend, theirs, inside in itertools.product(backends, ("tf32", "ieee", "none"), formats):
    backend.fp32_precision = theirs
    with float32_products(inside):
        assert (backend.fp32_precision, ask_all()) == (formats[inside], inside)
        with full_precision(torch.device("cpu")):
            assert (backend.fp32_precision, ask_all()) == ("ieee", "highest")
        assert (backend.fp32_precision, ask_all()) == (formats[inside], inside)
    assert backend.fp32_precision == theirs
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_caller_set_for_all_backends_is_theirs_afterwards():
    before = torch.get_float32_matmul_precision()
    try:
        for theirs in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(theirs)
            with full_precision(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == theirs
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("kind", "inside"), [("cpu", "highest"), ("cuda", "high")])
def test_tf32_is_for_gpus_and_ends(kind, inside):
    with tf32(torch.device(kind), True):
        assert torch.get_float32_matmul_precision() == inside
    with tf32(torch.device(kind), False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"
