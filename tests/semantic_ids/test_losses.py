"""MMD against plain loops and its closed form; InfoNCE against torch's cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from llmrec.semantic_ids.losses import collaborative, info_nce, mmd


def loop_mmd(x, y, *, offset=True):
    """The definition, pair by pair; the bandwidth is not differentiated."""
    rows, size = torch.cat([x, y]), len(x)
    total = sum(float((a - b).square().sum()) for a in rows for b in rows)
    mean = total / (2 * size) ** 2

    def kernel(a, b):
        return torch.exp(-(a - b).square().sum() / mean)

    value = torch.zeros((), dtype=x.dtype)
    for i in range(size):
        for j in range(size):
            if i != j:
                value = value + (kernel(x[i], x[j]) + kernel(y[i], y[j])) / (size * (size - 1))
            value = value - 2 * kernel(x[i], y[j]) / size**2
    return value + (2 / (size - 1) if offset else 0)


def samples(size=9, dim=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dim, generator=generator, dtype=dtype)
    return x, 0.7 * torch.randn(size, dim, generator=generator, dtype=dtype) + 1.5


@pytest.mark.parametrize("size", [2, 3, 9])
def test_mmd_equals_the_sum_over_all_pairs(size):
    x, y = samples(size)
    torch.testing.assert_close(mmd(x, y), loop_mmd(x, y), rtol=0, atol=1e-12)
    unbiased = mmd(x, y, estimator="unbiased")
    torch.testing.assert_close(unbiased, loop_mmd(x, y, offset=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("estimator", ["tllib", "unbiased"])
def test_mmd_gradients_equal_those_of_the_loops(sides, estimator):
    x, y = samples(7)
    pairs = [(x.clone().requires_grad_(sides[0]), y.clone().requires_grad_(sides[1])) for _ in range(2)]
    (3 * mmd(*pairs[0], estimator=estimator)).backward()
    (3 * loop_mmd(*pairs[1], offset=estimator == "tllib")).backward()
    for got, expected in zip(*pairs):
        if got.requires_grad:
            torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-12)
        else:
            assert got.grad is None


def test_mmd_of_a_sample_with_itself_is_its_closed_form():
    x, _ = samples(8)
    distances = torch.cdist(x, x).square()
    kernel = torch.exp(-distances / distances.mean())
    size = len(x)
    off_diagonal = float(kernel.sum() - size)
    expected = 2 * off_diagonal / (size**2 * (size - 1)) + 2 / (size * (size - 1))
    assert float(mmd(x, x)) == pytest.approx(expected, abs=1e-12)


def test_mmd_compares_sets_so_row_order_does_not_matter():
    x, y = samples(12)
    shuffled = y[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(mmd(x, y), mmd(x, shuffled), rtol=0, atol=1e-13)


def test_mmd_does_not_depend_on_place_or_scale_and_stays_exact_far_from_the_origin():
    x, y = samples(16)
    expected = mmd(x, y)
    torch.testing.assert_close(mmd(100 * x + 7, 100 * y + 7), expected, rtol=0, atol=1e-11)
    far = mmd((x + 1000).float(), (y + 1000).float())
    torch.testing.assert_close(far.double(), expected, rtol=0, atol=1e-4)


def test_mmd_in_half_precision_is_computed_in_float32():
    x, y = samples(32)
    half = y.bfloat16().requires_grad_()
    value = mmd(x.bfloat16(), half)
    assert value.dtype == torch.float32
    value.backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.abs().sum() > 0
    torch.testing.assert_close(
        value.double(), mmd(x.bfloat16().double(), y.bfloat16().double()), atol=1e-5, rtol=0
    )


def test_mmd_of_equal_rows_is_a_number():
    x = torch.ones(4, 3)
    y = torch.ones(4, 3, requires_grad=True)
    value = mmd(x, y)
    value.backward()
    assert float(value) == pytest.approx(2 / 3) and not y.grad.any()


def test_minimising_mmd_moves_one_sample_onto_the_other():
    x, y = samples(64, 2)
    y = y.clone().requires_grad_()
    before = float(mmd(x, y, estimator="unbiased"))
    optimizer = torch.optim.Adam([y], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        mmd(x, y).backward()
        optimizer.step()
    after = float(mmd(x, y, estimator="unbiased"))
    assert before > 0.1 and after < 0.01
    assert (y.mean(dim=0) - x.mean(dim=0)).abs().max() < 0.4


def test_info_nce_is_cross_entropy_of_cosines_with_the_own_partner():
    anchor, other = samples(6)
    expected = 0.0
    for i in range(6):
        cosines = [float(F.cosine_similarity(anchor[i], other[j], dim=0)) / 0.2 for j in range(6)]
        expected += -cosines[i] + math.log(sum(math.exp(value) for value in cosines))
    assert float(info_nce(anchor, other, 0.2)) == pytest.approx(expected / 6, abs=1e-12)


def test_info_nce_has_one_direction_and_ignores_lengths():
    anchor, other = samples(6)
    assert float(info_nce(anchor, other, 0.1)) != pytest.approx(float(info_nce(other, anchor, 0.1)), abs=1e-6)
    torch.testing.assert_close(info_nce(5 * anchor, other, 0.1), info_nce(anchor, 3 * other, 0.1))


def test_info_nce_is_exact_inside_of_autocast():
    anchor, other = samples(6, dtype=torch.float32)
    expected = info_nce(anchor, other, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(anchor, other, 0.1), expected)


def test_info_nce_of_half_precision_vectors_is_computed_in_float32():
    """As CTRL-MM's are under autocast: cosines of 8 bits, divided by 0.1, would be off by several percent."""
    anchor, other = (rows.bfloat16() for rows in samples(6, dtype=torch.float32))
    found = info_nce(anchor, other, 0.1)
    assert found.dtype == torch.float32
    assert torch.equal(found, info_nce(anchor.float(), other.float(), 0.1))


def test_mmd_needs_two_rows_of_one_shape_on_both_sides():
    x, y = samples(4)
    for first, second in ((x[:1], y[:1]), (x, y[:3]), (x, y[:, :2])):
        with pytest.raises(AssertionError):
            mmd(first, second)


def test_the_collaborative_loss_is_that_of_a_loop_over_items():
    vectors, teacher = samples(7)
    expected = 0.0
    for row, own in zip(vectors, teacher):
        total = sum(math.exp(float(row @ other)) for other in teacher)
        expected -= math.log(math.exp(float(row @ own)) / total) / len(vectors)
    assert float(collaborative(vectors, teacher)) == pytest.approx(expected, abs=1e-12)
