"""A Mamba layer over partially flipped prefixes, for all prefixes of a history at once.

SIGMA's second direction reads the first l - r items of a prefix of length l in reverse and the last r in
order; only what stands at its end is needed. Run by itself, every prefix costs a scan of its own length.
But the reversed part ends with the same items x_j, ..., x_0 in every prefix, so its state is a sum over j of
terms that do not depend on the prefix:

    state after x_{m-1}, ..., x_0  =  sum_{j < m} exp(A (delta_0 + ... + delta_{j-1})) delta_j u_j B_j

which one cumulative sum gives for all m. What differs between prefixes are the first items of the flipped
order (whose convolution sees no item before them) and the last r: a few steps each. A history of T items
costs T (r + conv_width) steps in place of T^2 / 2, and fewer where its first prefixes are shorter than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrec.collab.mamba4rec import MambaCore
from llmrec.collab.selective_scan import blocks, decays, over_states
from llmrec.config import given
from llmrec.data.batches import sent
from llmrec.machine import running_sum


def flipped_ends(core: MambaCore, hidden: Tensor, kept: Tensor, real: Tensor) -> Tensor:
    """What the layer makes of the end of every flipped prefix, (B, T, D), from its input (B, T, D).

    Args:
        core: the layer.
        hidden: vectors of the items in their own order; a prefix is everything up to a position.
        kept: int64 (T,), r of the prefix that ends at each position: items at its end that are not flipped,
            at least 1, at most all, and at most one more than at the position before; on the host, which
            has to know the most of them.
        real: bool (B, T), false for padding, whose results are never used.
    """
    u, gate = core.in_proj(hidden).chunk(2, dim=-1)
    on_device = hidden.device
    length = torch.arange(1, len(kept) + 1)
    flipped = sent(length - kept, on_device)
    number = (length - kept - core.edge).clamp(min=0)
    most = int(number.max())
    places = tail_places(core.edge, kept, real)
    last = read(core, convolve(core, u, slice(None), sent(length - 1, on_device), flipped))
    tail = read(core, convolve(core, u, places.row, places.place, flipped[places.end]))
    middle = read(core, convolve_reversed(core, u, most))
    with torch.autocast(on_device.type, enabled=False):
        y = last.u * (last.delta * (last.b * last.c).sum(-1, keepdim=True) + core.D)
        # An item is worth what the steps read after it leave of it: those of the tail, and for the first
        # items also the whole middle.
        total = F.pad(running_sum(middle.delta, 1), (0, 0, 1, 0))
        delta = places.spread(tail.delta)
        rest = running_sum(delta.flip(2), 2).flip(2) - delta + last.delta[:, :, None]
        first, kept_rest = rest.split([core.edge, rest.shape[2] - core.edge], dim=2)
        rest = torch.cat([first + total[:, sent(number, on_device), None], kept_rest], dim=2)
        a = -torch.exp(core.A_log)
        weight = tail.b * last.c[places.row, places.end]
        added = DecayedTail.apply(tail.delta * tail.u, places.take(rest), weight, a)
        y = y + places.spread(added).sum(2)
        if most:
            start = int((number == 0).sum())  # prefixes before it have no middle
            after = delta[:, start:, core.edge :].sum(2) + last.delta[:, start:]
            sums = (middle.delta * middle.u, total[:, :-1], middle.b, after, last.c[:, start:])
            added = DecayedSums.apply(*sums, a, sent(number[start:] - 1, on_device))
            y = y + F.pad(added, (0, 0, start, 0))
    return core.out_proj(y * F.silu(gate))


class Read(NamedTuple):
    """What the layer derives from items: activations u, step sizes delta (..., E), maps b and c (..., N)."""

    u: Tensor
    delta: Tensor
    b: Tensor
    c: Tensor


def read(core: MambaCore, convolved: Tensor) -> Read:
    """From the convolution's output, (..., E), in its dtype."""
    u = F.silu(convolved)
    step, b, c = core.x_proj(u).split([core.rank, core.state_dim, core.state_dim], dim=-1)
    return Read(u, F.softplus(core.dt_proj(step)).to(u.dtype), b.to(u.dtype), c.to(u.dtype))


@dataclass(frozen=True)
class TailPlaces:
    """Places in the flipped order that prefixes handle by themselves, int64 (P,) each, but the last one.

    They are the first `edge` ones and the kept ones, S at most.
    """

    row: Tensor
    end: Tensor
    """Position at which the prefix ends."""
    slot: Tensor
    """Which of the S places it is."""
    place: Tensor
    """Where it stands in the flipped order."""
    shape: tuple[int, int, int]
    """(B, T, S)."""

    def spread(self, values: Tensor) -> Tensor:
        """(P, E) to (B, T, S, E), with zeros for places that a prefix does not have."""
        empty = values.new_zeros(*self.shape, values.shape[-1])
        return empty.index_put((self.row, self.end, self.slot), values)

    def take(self, values: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return values[self.row, self.end, self.slot]


def tail_places(edge: int, kept: Tensor, real: Tensor) -> TailPlaces:
    """What is computed for single prefixes.

    Args:
        edge: places at the start of the flipped order whose convolution sees fewer items than it could.
        kept: int64 (T,) on the host, items at the end of each prefix that are not flipped; R is the most.
        real: bool (B, T), false for padding. A GPU computes that, too: which places are left would first
            have to come back to the host.
    """
    most = int(kept.max())
    end = torch.arange(1, len(kept) + 1)
    first = torch.arange(edge).expand(len(kept), -1)
    last = (end - most)[:, None] + torch.arange(most - 1)
    flipped = (end - kept)[:, None]
    place = torch.cat([first, last], dim=1)
    there = torch.cat([first < flipped, last >= flipped], dim=1).expand(len(real), -1, -1)
    if real.device.type == "cpu":
        there = there & real[:, :, None]
    row, at, slot = there.nonzero(as_tuple=True)
    row, at, slot, place = (sent(part, real.device) for part in (row, at, slot, place[at, slot]))
    return TailPlaces(row, at, slot, place, (len(real), *there.shape[1:]))


def convolve(core: MambaCore, u: Tensor, row: Tensor | slice, place: Tensor, flipped: Tensor) -> Tensor:
    """The convolution's output at places of flipped prefixes, (P, E), or (B, P, E) for all rows.

    Args:
        u: its input (B, T, E), in the items' own order.
        row: int64 (P,), or all.
        place: int64 (P,), in the flipped order.
        flipped: int64 (P,), items of the prefix that are in reverse.
    """
    width = core.conv1d.kernel_size[0]
    found = given(core.conv1d.bias)
    for back in range(width):
        seen = place - back
        item = torch.where(seen >= flipped, seen, flipped - 1 - seen)
        taps = core.conv1d.weight[:, 0, width - 1 - back]
        found = found + u[row, item.clamp(0, u.shape[1] - 1)] * taps * (seen >= 0)[:, None]
    return found


def convolve_reversed(core: MambaCore, u: Tensor, number: int) -> Tensor:
    """The convolution's output in the middle of flipped prefixes, at the first items of a history, (B, n, E):
    each with the items after it, which the flipped order has before it."""
    width = core.conv1d.kernel_size[0]
    found = given(core.conv1d.bias)
    for ahead in range(width):
        found = found + u[:, ahead : ahead + number] * core.conv1d.weight[:, 0, width - 1 - ahead]
    return found


class DecayedSums(torch.autograd.Function):
    """What the first items add to the output of prefixes, (B, L, E).

    Of prefix t the first index_t + 1 items j: sum_n c_t[n] exp(a[:, n] rest_t) sum_j exp(a[:, n] before_j)
    inputs_j b_j[n]. States are as large as those of a scan, so rows go through in blocks and are computed
    again for gradients.

    From inputs: delta u, (B, M, E); before: step sizes of the items read after j, (B, M, E); b: (B, M, N);
    rest: step sizes of what is read after all of them, (B, L, E); c: (B, L, N); a: (E, N); index: int64 (L,).
    """

    @staticmethod
    def forward(ctx, inputs, before, b, rest, c, a, index):
        ctx.save_for_backward(inputs, before, b, rest, c, a, index)
        out = torch.empty_like(rest)
        for rows in blocks(before, a):
            states = add_up(decays(before[rows], a).mul_(inputs[rows][..., None]).mul_(b[rows][:, :, None]))
            out[rows] = over_states(decays(rest[rows], a).mul_(states[:, index]), c[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, before, b, rest, c, a, index = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (inputs, before, b, rest, c)]
        by_a = torch.zeros_like(a)
        for rows in blocks(before, a):
            u, decay = inputs[rows][..., None], decays(before[rows], a)
            states = add_up((decay * u).mul_(b[rows][:, :, None]))
            kept = decays(rest[rows], a)
            left = kept * states[:, index]
            grads[4][rows] = (grad[rows][:, :, None] @ left)[:, :, 0]
            by_output = grad[rows][..., None] * c[rows][:, :, None]
            left.mul_(by_output)
            by_a += (left * rest[rows][..., None]).sum((0, 1))
            grads[3][rows] = left.mul_(a).sum(-1)
            by_term = torch.zeros_like(states).index_add_(1, index, kept.mul_(by_output))
            by_term = add_up(by_term, from_end=True).mul_(decay)
            grads[2][rows] = (inputs[rows][:, :, None] @ by_term)[:, :, 0]
            by_term.mul_(b[rows][:, :, None])
            grads[0][rows] = by_term.sum(-1)
            by_term.mul_(u)
            by_a += (by_term * before[rows][..., None]).sum((0, 1))
            grads[1][rows] = by_term.mul_(a).sum(-1)
        return *grads, by_a, None


def add_up(states: Tensor, from_end: bool = False) -> Tensor:
    """Sums over time, up to each step or from it on, (B, T, E, N); what was given may be written over."""
    if states.device.type != "cpu":
        return running_sum(states.flip(1), 1).flip(1) if from_end else running_sum(states, 1)
    steps = states.unbind(1)  # torch's own sum along this axis takes four times as long
    steps = steps[::-1] if from_end else steps
    for before, after in pairwise(steps):
        after += before
    return states


class DecayedTail(torch.autograd.Function):
    """What each place adds to the output of its prefix: inputs_p sum_n exp(a[:, n] rest_p) weight_p[n].

    (P, E) from inputs: delta u, (P, E); rest: step sizes of the items read after it, (P, E); weight: b c,
    (P, N); a: (E, N). The (P, E, N) decays go through in blocks and are computed again for gradients.
    """

    @staticmethod
    def forward(ctx, inputs, rest, weight, a):
        left = torch.empty_like(inputs)
        for part in blocks(inputs[:, None], a):
            left[part] = over_states(decays(rest[part], a), weight[part])
        ctx.save_for_backward(inputs, rest, weight, a, left)
        return inputs * left

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, rest, weight, a, left = ctx.saved_tensors
        by_left = grad * inputs
        by_rest, by_weight, by_a = torch.empty_like(rest), torch.empty_like(weight), torch.zeros_like(a)
        for part in blocks(inputs[:, None], a):
            decay = decays(rest[part], a)
            by_weight[part] = (by_left[part][:, None] @ decay)[:, 0]
            by_exponent = decay.mul_(weight[part][:, None]).mul_(by_left[part][..., None])
            by_a += (by_exponent * rest[part][..., None]).sum(0)
            by_rest[part] = by_exponent.mul_(a).sum(-1)
        return grad * left, by_rest, by_weight, by_a
