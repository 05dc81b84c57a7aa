"""Cross-entropy over the whole catalogue without ever holding all logits.

Logits of n queries against N items are n x N numbers, which for one training step is far more than
any cache and soon more than memory. Here the queries go through in chunks; a chunk's logits live
in a small buffer that stays in cache, and its gradients are taken before the next chunk overwrites
them, so each logit is computed once. The idea is that of fused linear cross-entropy kernels; the
arithmetic is plain torch, so it runs on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_CELLS = {"cpu": 1 << 19, "gpu": 1 << 26}
"""Logits held at once: 2 MB fits a CPU's cache, 256 MB keeps a GPU busy."""

MIN_CHUNK = 16
"""Fewest queries in a chunk, whatever the catalogue: below, matrix products become slow."""


def item_cross_entropy(
    queries: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    chunk_size: int | None = None,
    skip_row_0: bool = True,
) -> Tensor:
    """Sum over queries of -log softmax of the target's score among items 1..N.

    Scores are the inner products ``queries @ items.T``; row 0 of `items` (padding) takes no part
    and gets a zero gradient, unless asked otherwise. Sums are float32, or float64 for float64 inputs;
    half-precision products accumulate in float32. Gradients are computed together with the value and only
    for the inputs that need them; the result cannot be differentiated twice.

    Args:
        queries: (n, D).
        items: (N + 1, D).
        target: item ids 1..N, int64 (n,).
        chunk_size: queries handled at once; None chooses by device and catalogue size.
        skip_row_0: False lets row 0 compete as if it were an item (the published MME-SID does).

    Returns:
        Scalar, in float32 or float64.
    """
    return _catalogue_loss(queries, items, target, chunk_size, skip_row_0, binary=False)


def item_binary_cross_entropy(
    queries: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    chunk_size: int | None = None,
    skip_row_0: bool = True,
) -> Tensor:
    """Sum over queries and items of -log s(score) for targets and -log(1 - s(score)) for all others.

    Arguments and memory as `item_cross_entropy`.
    """
    return _catalogue_loss(queries, items, target, chunk_size, skip_row_0, binary=True)


def _catalogue_loss(
    queries: Tensor, items: Tensor, target: Tensor, chunk_size: int | None, skip_row_0: bool, *, binary: bool
) -> Tensor:
    if chunk_size is None:
        cells = CHUNK_CELLS["cpu" if queries.device.type == "cpu" else "gpu"]
        chunk_size = max(cells // max(len(items) - 1, 1), MIN_CHUNK)
    with torch.autocast(queries.device.type, enabled=False):
        return _CatalogueLoss.apply(
            queries, items, target, chunk_size, int(skip_row_0), binary, torch.is_grad_enabled()
        )


class _CatalogueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, items, target, chunk_size, first_row, binary, grad_enabled):
        """Value, and the gradients of the value kept for backward."""
        for_queries, for_items = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        dtype = torch.promote_types(torch.promote_types(queries.dtype, items.dtype), torch.float32)
        low = dtype_of_products(queries, items, dtype)
        rows, table, index = queries.to(low), items[first_row:].to(low), target - first_row
        chunk_size = min(chunk_size, max(len(rows), 1))
        logits = table.new_empty((chunk_size, len(table)), dtype=dtype)
        shares = torch.empty_like(logits)
        total = logits.new_zeros(())
        query_grad = torch.empty_like(rows, dtype=dtype) if for_queries else None
        item_grad = torch.zeros_like(items, dtype=dtype) if for_items else None
        for first in range(0, len(rows), chunk_size):
            chunk = rows[first : first + chunk_size]
            logit, share = logits[: len(chunk)], shares[: len(chunk)]
            product(chunk, table.T, out=logit)
            if binary:
                torch.sigmoid(logit, out=share)
                log_norm = torch.nn.functional.softplus(logit).sum(1)
            else:
                torch.softmax(logit, dim=1, out=share)
                # log sum exp, read off the largest entry, whose share (at least 1 / N) is well conditioned
                log_norm = logit.amax(1) - share.amax(1).log()
            total += (log_norm - logit.gather(1, index[first : first + len(chunk), None])[:, 0]).sum()
            if for_queries:
                product(share.to(low), table, out=query_grad[first : first + len(chunk)])
            if for_items:
                add_product(item_grad[first_row:], share.to(low).T, chunk)
        if for_queries:
            query_grad -= table[index]
        if for_items:
            item_grad.index_add_(0, target, rows.to(dtype), alpha=-1)
        ctx.save_for_backward(query_grad, item_grad)
        ctx.dtypes = queries.dtype, items.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scaled = [
            None if found is None else (found * grad).to(dtype)
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return *scaled, None, None, None, None, None


def dtype_of_products(queries: Tensor, items: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Half precision only where a device multiplies it into float32 sums; else the sums' dtype."""
    if queries.dtype == items.dtype and queries.dtype.itemsize == 2 and queries.is_cuda:
        return queries.dtype
    return dtype


def product(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """``out = left @ right``, summed in out's dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right, out_dtype=out.dtype))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, summed in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)
