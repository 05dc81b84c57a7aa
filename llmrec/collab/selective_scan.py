"""The selective scan of Mamba in plain PyTorch, parallel over chunks of time.

    h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t,    y_t = sum_n C_t[n] h_t[:, n],    h_0 = 0

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3;
state-spaces/mamba mamba_ssm/ops/selective_scan_interface.py (zero-order hold for A, first-order for B).

Time is cut into chunks of Q steps, which all run side by side from a zero state; the states between chunks
then follow in T / Q steps and are added, decayed by exp(A cumsum(delta)). So a history of T items takes
about 2 sqrt(T) dependent steps and work linear in T. Decays are never divided by (their product underflows).
States, (B, T, E, N) numbers, are the bulk of memory: rows go through in blocks that stay in the cache, and
the backward pass computes them again instead of keeping them. Its adjoint is the same scan, reversed.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrec.machine import running_sum

BLOCK_CELLS = {"cpu": 1 << 19, "gpu": 1 << 27}
"""Numbers of one state tensor held at once: 2 MB on a CPU, 512 MB on a GPU."""

LOG2_E = 1 / math.log(2)
"""exp(x) is 2 ** (LOG2_E x), of which torch computes three times as many in a second (3.5 and 1.2 billion on
one core of an AMD EPYC, Zen 4)."""

MIN_CHUNK = 24
"""Shortest chunk of time: below, one loop over all steps is as fast."""


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The outputs y, (B, T, E), in the dtype of u; sums are float32, or float64 for float64 inputs.

    Uses the kernels of `mamba_ssm` where it is installed and the tensors are on a GPU.

    Args:
        u: inputs (B, T, E).
        delta: step sizes (B, T, E), at least 0; with 0 a step leaves the state as it is.
        a: decay rates (E, N), negative.
        b: input maps (B, T, N).
        c: output maps (B, T, N).
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    kernels = mamba_kernels() if u.is_cuda and dtype == torch.float32 else None
    with torch.autocast(u.device.type, enabled=False):
        inputs = [tensor.to(dtype) for tensor in (u, delta, a, b, c)]
        if kernels is not None:
            u_, delta_, a_, b_, c_ = inputs
            columns = [tensor.transpose(1, 2).contiguous() for tensor in (u_, delta_, b_, c_)]
            found = kernels.selective_scan_fn(columns[0], columns[1], a_, columns[2], columns[3])
            return found.transpose(1, 2).to(u.dtype)
        return _SelectiveScan.apply(*inputs).to(u.dtype)


def mamba_kernels() -> ModuleType | None:
    """The compiled scan of mamba_ssm, or None where it is not installed."""
    try:
        from mamba_ssm.ops import selective_scan_interface
    except ImportError:
        return None
    return selective_scan_interface


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, a, b, c):
        ctx.save_for_backward(u, delta, a, b, c)
        out = torch.empty_like(u)
        for rows in blocks(u, a):
            chunks = Chunks(u[rows], delta[rows], a, b[rows], c[rows])
            states, _ = chunks.states()
            out[rows] = chunks.join(over_states(states, chunks.c))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        u, delta, a, b, c = ctx.saved_tensors
        grads = [torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(a), b.clone(), c.clone()]
        for rows in blocks(u, a):
            chunks = Chunks(u[rows], delta[rows], a, b[rows], c[rows])
            found = chunks.gradients(chunks.cut(grad[rows]))
            for place in (0, 1, 3, 4):
                grads[place][rows] = chunks.join(found[place])
            grads[2] += found[2]
        return tuple(grads)


def decays(steps: Tensor, a: Tensor) -> Tensor:
    """exp(a steps), (..., E, N) from (..., E)."""
    return (steps[..., None] * (a * LOG2_E)).exp2_()


def over_states(values: Tensor, weight: Tensor) -> Tensor:
    """sum_n values[..., e, n] weight[..., n], (..., E); on a CPU products and sums take a third of the time
    of torch's batched product with a vector."""
    if values.device.type == "cpu":
        return (values * weight[..., None, :]).sum(-1)
    return torch.matmul(values, weight[..., None])[..., 0]


def blocks(u: Tensor, a: Tensor) -> list[slice]:
    """Rows of a batch in blocks whose states fit the budget."""
    size = rows_per_block(u.shape[1], a)
    return [slice(first, first + size) for first in range(0, len(u), size)]


def rows_per_block(length: int, a: Tensor) -> int:
    """Rows whose states, of `length` steps each, fit the budget; at least 1."""
    return max(BLOCK_CELLS["cpu" if a.device.type == "cpu" else "gpu"] // max(length * a.numel(), 1), 1)


class Chunks:
    """One block of rows, cut into chunks of time: tensors (Q, G, ...), G = rows x chunks."""

    def __init__(self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        self.rows, self.length = u.shape[:2]
        self.size = min(self.length, max(MIN_CHUNK, math.isqrt(self.length)))
        self.number = -(-self.length // self.size) if self.length else 0
        self.a = a
        self.u, self.delta, self.b, self.c = (self.cut(tensor) for tensor in (u, delta, b, c))
        self.decay = decays(self.delta, a)

    def cut(self, tensor: Tensor) -> Tensor:
        """(R, T, F) to (Q, R * chunks, F), zeros at the end, where delta = 0 changes nothing."""
        padded = F.pad(tensor, (0, 0, 0, self.number * self.size - self.length))
        return padded.unflatten(1, (self.number, self.size)).permute(2, 0, 1, 3).flatten(1, 2)

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of `cut`."""
        return (
            tensor.unflatten(1, (self.rows, self.number)).permute(1, 2, 0, 3).flatten(1, 2)[:, : self.length]
        )

    def states(self) -> tuple[Tensor, Tensor]:
        """States after every step, (Q, G, E, N), and before the first of every chunk, (G, E, N)."""
        states = (self.delta * self.u)[..., None] * self.b[:, :, None]
        for step in range(1, self.size):
            states[step].addcmul_(self.decay[step], states[step - 1])
        before = torch.zeros_like(states[0])
        if self.number > 1:
            decayed = decays(running_sum(self.delta, 0), self.a)
            by_chunk = before.unflatten(0, (self.rows, self.number))
            ends = states[-1].unflatten(0, (self.rows, self.number))
            rates = decayed[-1].unflatten(0, (self.rows, self.number))
            for chunk in range(1, self.number):
                torch.addcmul(
                    ends[:, chunk - 1], rates[:, chunk - 1], by_chunk[:, chunk - 1], out=by_chunk[:, chunk]
                )
            states.addcmul_(decayed, before)
        return states, before

    def adjoints(self, grad: Tensor) -> Tensor:
        """Gradients of the loss by the states, (Q, G, E, N): the same scan from the end."""
        found = grad[..., None] * self.c[:, :, None]
        for step in range(self.size - 2, -1, -1):
            found[step].addcmul_(self.decay[step + 1], found[step + 1])
        if self.number > 1:
            total = running_sum(self.delta, 0)
            decayed = decays(total[-1] - total, self.a)
            after = torch.zeros_like(found[0])
            by_chunk = after.unflatten(0, (self.rows, self.number))
            starts = found[0].unflatten(0, (self.rows, self.number))
            rates = decayed[0].unflatten(0, (self.rows, self.number))
            first = self.decay[0].unflatten(0, (self.rows, self.number))
            for chunk in range(self.number - 1, 0, -1):
                start = torch.addcmul(starts[:, chunk], rates[:, chunk], by_chunk[:, chunk])
                torch.mul(first[:, chunk], start, out=by_chunk[:, chunk - 1])
            found.addcmul_(decayed, after)
        return found

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients by u, delta, a, b and c from the gradient by y, (Q, G, E)."""
        states, before = self.states()
        by_c = torch.matmul(grad[..., None, :], states)[..., 0, :]
        by_state = self.adjoints(grad)
        scaled = self.delta * self.u
        by_scaled = over_states(by_state, self.b)
        by_b = torch.matmul(scaled[..., None, :], by_state)[..., 0, :]
        by_exponent = by_state.mul_(self.decay)
        by_exponent[1:] *= states[:-1]
        by_exponent[0] *= before
        by_a = (by_exponent * self.delta[..., None]).sum((0, 1))
        by_delta = by_exponent.mul_(self.a).sum(-1)
        return by_scaled * self.delta, by_delta + by_scaled * self.u, by_a, by_b, by_c
