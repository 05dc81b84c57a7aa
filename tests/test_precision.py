"""Lower precision: of products alone, of weights as they are, and only while something learns."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from llmrec.precision import matrix_precision, tf32


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


def test_what_a_caller_set_for_one_backend_is_left_alone():
    """Afterwards torch raises where it is asked for that of all of them, for good."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch knows no format of one backend")
    code = (
        "import torch; from llmrec.precision import matrix_precision\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "for precision in ('float32', 'bfloat16'):\n"
        "    with matrix_precision(precision, torch.device('cpu')): pass\n"
        "print(torch.backends.cuda.matmul.fp32_precision)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "tf32"


@pytest.mark.parametrize(("kind", "inside"), [("cpu", "highest"), ("cuda", "high")])
def test_tf32_is_for_gpus_and_ends(kind, inside):
    with tf32(torch.device(kind), True):
        assert torch.get_float32_matmul_precision() == inside
    with tf32(torch.device(kind), False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"
