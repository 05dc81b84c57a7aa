"""The chunked catalogue cross-entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmrec import item_softmax as module
from llmrec.item_softmax import item_cross_entropy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def world(n=23, num_items=57, width=8, dtype=torch.float64, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(0)
    queries = (scale * torch.randn(n, width, generator=generator, dtype=torch.float64)).to(device, dtype)
    items = torch.randn(num_items + 1, width, generator=generator, dtype=torch.float64).to(device, dtype)
    target = torch.randint(1, num_items + 1, (n,), generator=generator).to(device)
    return queries.requires_grad_(), items.requires_grad_(), target


def oracle(queries, items, target):
    return F.cross_entropy(queries @ items[1:].T, target - 1, reduction="sum")


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 23, 100])
def test_value_and_gradients_equal_torchs_cross_entropy(chunk_size, device):
    queries, items, target = world(device=device)
    loss = item_cross_entropy(queries, items, target, chunk_size=chunk_size)
    found = torch.autograd.grad(3.0 * loss, (queries, items))
    expected_loss = oracle(queries, items, target)
    expected = torch.autograd.grad(3.0 * expected_loss, (queries, items))
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_gradcheck_passes_in_float64():
    queries, items, target = world(n=5, num_items=7, width=3)
    assert torch.autograd.gradcheck(
        lambda q, w: item_cross_entropy(q, w, target, chunk_size=2), (queries, items)
    )


def test_padding_row_has_no_share_and_no_gradient():
    queries, items, target = world()
    changed = items.detach().clone()
    changed[0] = 1e3
    changed.requires_grad_()
    loss = item_cross_entropy(queries, changed, target)
    assert loss.item() == item_cross_entropy(queries, items, target).item()
    loss.backward()
    assert not changed.grad[0].any()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_float32_stays_finite_and_close_for_extreme_scores(scale):
    queries, items, target = world(dtype=torch.float32, scale=scale)
    loss = item_cross_entropy(queries, items, target)
    expected = oracle(queries.double(), items.double(), target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_half_precision_sums_in_float32_and_returns_half_gradients(device):
    queries, items, target = world(dtype=torch.bfloat16, device=device)
    loss = item_cross_entropy(queries, items, target, chunk_size=4)
    loss.backward()
    exact_queries = queries.detach().double().requires_grad_()
    exact_items = items.detach().double().requires_grad_()
    expected = oracle(exact_queries, exact_items, target)
    expected.backward()
    assert loss.dtype == torch.float32
    assert queries.grad.dtype == items.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(items.grad.double(), exact_items.grad, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(queries.grad.double(), exact_queries.grad, rtol=2e-2, atol=1e-2)


def test_autocast_does_not_lower_its_precision():
    queries, items, target = world(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = item_cross_entropy(queries, items, target)
    assert inside.item() == item_cross_entropy(queries, items, target).item()


def test_only_the_gradients_asked_for_are_computed():
    queries, items, target = world()
    (only,) = torch.autograd.grad(item_cross_entropy(queries, items.detach(), target), (queries,))
    both, _ = torch.autograd.grad(item_cross_entropy(queries, items, target), (queries, items))
    assert torch.equal(only, both)
    with torch.no_grad():
        loss = item_cross_entropy(queries, items, target)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, oracle(queries, items, target).detach(), rtol=0, atol=1e-10)


def test_no_tensor_of_queries_times_items_is_ever_made():
    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
            return result

    queries, items, target = world(n=400, num_items=300)
    with LargestTensor() as largest:
        item_cross_entropy(queries, items, target, chunk_size=20).backward()
    assert 20 * 300 <= largest.size <= 400 * 300 // 10


def test_chunks_fill_a_buffer_that_few_queries_make_small_and_without_gradients_are_all_that_is_made(
    monkeypatch,
):
    made, real = [], module.product

    def product(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        made.append((*out.shape, out.untyped_storage().nbytes() // out.element_size()))
        real(left, right, out=out)

    monkeypatch.setattr(module, "product", product)
    monkeypatch.setitem(module.CHUNK_CELLS, "cpu", 512)
    for number, expected in ((100, [*[(32, 16, 512)] * 3, (4, 16, 512)]), (4, [(4, 16, 64)])):
        made.clear()
        with torch.no_grad():
            item_cross_entropy(*world(n=number, num_items=16))
        assert made == expected


def test_no_queries_cost_nothing():
    queries, items, target = world(n=0)
    loss = item_cross_entropy(queries, items, target)
    loss.backward()
    assert loss.item() == 0
    assert not items.grad.any()


def test_differentiating_twice_is_refused():
    queries, items, target = world()
    loss = item_cross_entropy(queries, items, target).square()
    (first,) = torch.autograd.grad(loss, (queries,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_padding_item_cannot_be_a_target():
    queries, items, target = world()
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        item_cross_entropy(queries, items, target * 0)
