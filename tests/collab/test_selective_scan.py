"""The selective scan: against a loop over time, in value and gradient, however time is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmrec.collab import selective_scan as module
from llmrec.collab.selective_scan import selective_scan


def inputs(rows: int, length: int, width: int = 3, states: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    delta = torch.nn.functional.softplus(draw(rows, length, width) - 1)
    made = [draw(rows, length, width), delta, -torch.exp(draw(width, states))]
    made += [draw(rows, length, states), draw(rows, length, states)]
    return [tensor.requires_grad_() for tensor in made]


def loop(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state = torch.zeros(len(u), *a.shape, dtype=u.dtype)
    out = []
    for step in range(u.shape[1]):
        decay = torch.exp(delta[:, step, :, None] * a)
        state = decay * state + (delta[:, step] * u[:, step])[..., None] * b[:, step, None]
        out.append((state * c[:, step, None]).sum(-1))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("length", [1, 2, 7, 24, 25, 60, 130])
@pytest.mark.parametrize("cells", [10, 10**6])
def test_values_and_gradients_equal_a_loop_over_time(length, cells, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CELLS", {"cpu": cells, "gpu": cells})
    given = inputs(3, length)
    weight = torch.randn(3, length, 3, dtype=torch.float64)
    found, expected = selective_scan(*given), loop(*given)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad((out * weight).sum(), given) for out in (found, expected)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_gradients_equal_finite_differences(monkeypatch):
    monkeypatch.setattr(module, "MIN_CHUNK", 2)
    assert torch.autograd.gradcheck(selective_scan, inputs(2, 7))


def test_fast_decays_stay_finite_where_their_product_underflows():
    u, delta, _a, b, c = (tensor.detach().float() for tensor in inputs(1, 200))
    given = [
        u,
        delta + 5,
        -torch.arange(1.0, 33.0).repeat(3, 1),
        b[..., :1] * torch.ones(32),
        c[..., :1] * torch.ones(32),
    ]
    given = [tensor.requires_grad_() for tensor in given]
    out = selective_scan(*given)
    torch.testing.assert_close(out, loop(*given), rtol=1e-5, atol=1e-6)
    for grad in torch.autograd.grad(out.sum(), given):
        assert grad.isfinite().all()


def test_a_step_of_size_zero_changes_nothing():
    u, delta, a, b, c = (tensor.detach() for tensor in inputs(1, 6))
    paused = delta.clone()
    paused[:, 3] = 0
    keep = [0, 1, 2, 4, 5]
    without = selective_scan(u[:, keep], delta[:, keep], a, b[:, keep], c[:, keep])
    torch.testing.assert_close(selective_scan(u, paused, a, b, c)[:, keep], without)


def test_half_precision_is_summed_in_float32():
    given = [tensor.detach() for tensor in inputs(2, 40)]
    half = [tensor.bfloat16() for tensor in given]
    found = selective_scan(*half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.double(), loop(*[tensor.double() for tensor in half]), rtol=2e-2, atol=2e-2
    )


@pytest.mark.gpu
def test_the_compiled_kernels_agree():
    pytest.importorskip("mamba_ssm")
    given = [tensor.detach().float().cuda() for tensor in inputs(3, 60, width=8, states=4)]
    plain = selective_scan(*[tensor.cpu() for tensor in given])
    torch.testing.assert_close(selective_scan(*given).cpu(), plain, rtol=1e-4, atol=1e-4)
