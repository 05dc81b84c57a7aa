"""Losses of MM-RQ-VAE: maximum mean discrepancy between two sets of vectors, InfoNCE, and LETTER's
collaborative loss.

Sources: MME-SID Eq. 9 to 12. The value of `mmd` is that of the multiple-kernel MMD in the
transfer-learning library tllib with one Gaussian kernel and alpha = 0.5, which the published code
calls. Theirs forms all differences, (2B, 2B, D) numbers; here distances come from inner products,
so three B x B matrices pass through memory one after the other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmrec.precision import full_precision


def mmd(x: Tensor, y: Tensor, *, estimator: Literal["tllib", "unbiased"] = "tllib") -> Tensor:
    """Squared maximum mean discrepancy of two samples of equal size under a Gaussian kernel.

    With F the rows of x and y together, D_ij = |F_i - F_j|^2 and k_ij = exp(-D_ij / mean(D)), where
    the mean takes all (2B)^2 pairs and is not differentiated:

        1 / (B (B - 1)) sum_{i != j} [k(x_i, x_j) + k(y_i, y_j)] - 2 / B^2 sum_{ij} k(x_i, y_j)

    It compares sets: reordering the rows of one side changes nothing.

    Args:
        x: (B, D), B at least 2.
        y: (B, D).
        estimator: tllib adds the constant 2 / (B - 1), as that library does; unbiased does not.

    Returns:
        Scalar. Gradients are computed with the value; it cannot be differentiated twice.
    """
    assert x.shape == y.shape and len(x) >= 2, (x.shape, y.shape)
    with full_precision(x.device):
        value = _Mmd.apply(x, y, torch.is_grad_enabled())
    return value + 2 / (len(x) - 1) if estimator == "tllib" else value


class _Mmd(torch.autograd.Function):
    """Unbiased value, and the gradients for the sides that need one.

    Both sides are moved to the joint mean (distances do not change, rounding shrinks) and scaled by
    s = sqrt(2 / mean(D)), so that k = exp(-|a - b|^2 / 2) and dk/da = k (b - a).
    """

    @staticmethod
    def forward(ctx, x, y, grad_enabled):
        for_x, for_y = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        size = len(x)
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        a, b = x.to(dtype), y.to(dtype)
        centre = (a.mean(dim=0) + b.mean(dim=0)) / 2
        a, b = a - centre, b - centre
        # The mean over all pairs of |F_i - F_j|^2 is twice the mean of |F_i|^2, since the mean of F is 0.
        mean = (a.square().sum() + b.square().sum()) / size
        scale = (2 / mean.clamp_min(torch.finfo(dtype).tiny)).sqrt()
        a, b = with_norms(a * scale), with_norms(b * scale)
        same, across = 1 / (size * (size - 1)), 2 / size**2
        value, grad_x, grad_y = mean.new_zeros(()), None, None
        for side, wanted in ((a, for_x), (b, for_y)):
            kernel = gaussian(side, side)
            if not wanted:
                value += same * (kernel.sum() - size)
                continue
            total, pull = sum_and_pull(kernel, side, side)
            value += same * (total - size)
            if side is a:
                grad_x = 2 * same * pull
            else:
                grad_y = 2 * same * pull
        kernel = gaussian(a, b)
        if for_x:
            total, pull = sum_and_pull(kernel, a, b)
            grad_x -= across * pull
        if for_y:
            total, pull = sum_and_pull(kernel.T, b, a)
            grad_y -= across * pull
        value -= across * (total if for_x or for_y else kernel.sum())
        ctx.save_for_backward(
            (grad_x * scale).to(x.dtype) if for_x else None, (grad_y * scale).to(y.dtype) if for_y else None
        )
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_x, grad_y = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad_output,
            None if grad_y is None else grad_y * grad_output,
            None,
        )


def with_norms(rows: Tensor) -> Tensor:
    """Rows (n, D) followed by two columns: minus half their squared norms, and ones."""
    half = rows.square().sum(dim=1, keepdim=True) / -2
    return torch.cat([rows, half, torch.ones_like(half)], dim=1)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2), (n, m), for rows that `with_norms` made; one matrix product."""
    swapped = torch.cat([b[:, :-2], b[:, -1:], b[:, -2:-1]], dim=1)
    return (a @ swapped.T).clamp_(max=0).exp_()


def sum_and_pull(kernel: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the kernel, and its gradient with respect to the rows of a: sum_j k_ij (b_j - a_i), (n, D)."""
    product = kernel @ b
    row_sum = product[:, -1:]
    return row_sum.sum(), product[:, :-2] - row_sum * a[:, :-2]


def info_nce(anchor: Tensor, other: Tensor, temperature: float) -> Tensor:
    """-log softmax of the cosine of each anchor with its own partner among all partners of the batch.

    One direction, as in MME-SID Eq. 11 and 12: the anchors choose, the partners are chosen from.

    Args:
        anchor: (B, D).
        other: (B, D), row i belongs to anchor i.
        temperature: divides the cosines.

    Returns:
        Mean over the batch, scalar.
    """
    dtype = torch.promote_types(torch.promote_types(anchor.dtype, other.dtype), torch.float32)
    with full_precision(anchor.device):
        cosine = F.normalize(anchor.to(dtype), dim=-1) @ F.normalize(other.to(dtype), dim=-1).T
    return F.cross_entropy(cosine / temperature, torch.arange(len(anchor), device=anchor.device))


def collaborative(vectors: Tensor, teacher: Tensor) -> Tensor:
    """-log softmax of the inner product of each item with its own collaborative vector among the batch's.

    Source: LETTER (Wang et al., CIKM 2024), as in HonghuiBao2000/LETTER@0d4a115 RQ-VAE/models/rqvae.py.

    Args:
        vectors: sums of the items' code embeddings, (B, D).
        teacher: their collaborative vectors, (B, D), as they are.

    Returns:
        Mean over the batch, scalar.
    """
    with full_precision(vectors.device):
        similarity = vectors @ teacher.T
    return F.cross_entropy(similarity, torch.arange(len(vectors), device=vectors.device))
