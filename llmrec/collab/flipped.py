"""A Mamba layer over partially flipped prefixes, for all prefixes of a history at once.

SIGMA's second direction reads the first l - r items of a prefix of length l in reverse and the last r in
order; only what stands at its end is needed. Run by itself, every prefix costs a scan of its own length.
But the reversed part ends with the same items x_j, ..., x_0 in every prefix, so its state is a sum over j of
terms that do not depend on the prefix:

    state after x_{m-1}, ..., x_0  =  sum_{j < m} exp(A (delta_0 + ... + delta_{j-1})) delta_j u_j B_j

which one cumulative sum gives for all m. What differs between prefixes are the first items of the flipped
order (whose convolution sees no item before them) and the last r: a few steps each. A history of T items
costs T (r + conv_width) steps in place of T^2 / 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmrec.collab.mamba4rec import MambaCore
from llmrec.collab.selective_scan import rows_per_block
from llmrec.config import given
from llmrec.data.batches import sent
from llmrec.machine import running_sum


def flipped_ends(core: MambaCore, hidden: Tensor, kept: Tensor) -> Tensor:
    """What the layer makes of the end of every flipped prefix, (B, T, D), from its input (B, T, D).

    Args:
        core: the layer.
        hidden: vectors of the items in their own order; a prefix is everything up to a position.
        kept: int64 (T,), r of the prefix that ends at each position: items at its end that are not flipped,
            at least 1 and at most all; on the host, which has to know the most of them.
    """
    u, gate = core.in_proj(hidden).chunk(2, dim=-1)
    place, there, flipped = tail_places(core.edge, kept, hidden.device)
    tail_u = convolve(core, u, place, there, flipped)
    delta, b, c = parameters(core, tail_u)
    delta = delta * there[..., None]
    # Items in the middle of the flipped part: the convolution sees the items that follow in the history.
    middle_u = F.silu(given(core.conv1d.bias) + sum_of_taps(core, u))
    middle_delta, middle_b, _ = parameters(core, middle_u)
    number = (flipped - core.edge).clamp(min=0)
    total = F.pad(running_sum(middle_delta, 1), (0, 0, 1, 0))
    a = -torch.exp(core.A_log)
    from_middle = decayed_sums(
        a,
        middle_delta * middle_u,
        total[:, :-1],
        middle_b,
        delta[:, :, core.edge :].sum(2),
        c[:, :, -1],
        number,
    )
    # An item is worth what the steps read after it leave of it: those of the tail, and for the first items
    # also the whole middle.
    rest = running_sum(delta.flip(2), 2).flip(2) - delta
    rest = torch.cat([rest[:, :, : core.edge] + total[:, number, None], rest[:, :, core.edge :]], dim=2)
    y = from_middle + decayed_tail(a, delta * tail_u, rest, b, c[:, :, -1]) + core.D * tail_u[:, :, -1]
    return core.out_proj(y * F.silu(gate))


def tail_places(edge: int, kept: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the flipped order that a prefix handles by itself: the first `edge`, and the kept ones.

    Args:
        edge: places at the start of the flipped order whose convolution sees fewer items than it could.
        kept: int64 (T,), items at the end of each prefix that are not flipped; R is the most of any.
        device: of what is returned.

    Returns:
        place: int64 (T, edge + R), of the prefix that ends at each position.
        there: bool, likewise; False for places that a short prefix does not have.
        flipped: int64 (T,), number of items that are in reverse.
    """
    most = int(kept.max())
    end = torch.arange(1, len(kept) + 1, device=device)
    flipped = end - sent(kept, device)
    first = torch.arange(edge, device=device).expand(len(kept), -1)
    last = (end - most)[:, None] + torch.arange(most, device=device)
    place = torch.cat([first, last], dim=1)
    there = torch.cat([first < flipped[:, None], last >= flipped[:, None]], dim=1)
    return place, there, flipped


def convolve(core: MambaCore, u: Tensor, place: Tensor, there: Tensor, flipped: Tensor) -> Tensor:
    """The convolution's output at chosen places of each flipped prefix, (B, T, S, E); 0 where not there."""
    width = core.conv1d.kernel_size[0]
    found = given(core.conv1d.bias)
    for back in range(width):
        seen = place - back
        item = torch.where(seen >= flipped[:, None], seen, flipped[:, None] - 1 - seen)
        valid = (seen >= 0) & there
        taps = core.conv1d.weight[:, 0, width - 1 - back]
        found = found + u[:, item.clamp(0, u.shape[1] - 1)] * taps * valid[..., None]
    return F.silu(found) * there[..., None]


def sum_of_taps(core: MambaCore, u: Tensor) -> Tensor:
    """The convolution of an item with the items after it, as the flipped order has them, (B, T, E)."""
    width = core.conv1d.kernel_size[0]
    after = F.pad(u, (0, 0, 0, width - 1))
    taps = core.conv1d.weight[:, 0].unbind(1)
    terms = [after[:, ahead : ahead + u.shape[1]] * taps[width - 1 - ahead] for ahead in range(width)]
    return sum(terms[1:], terms[0])


def parameters(core: MambaCore, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes, input and output maps that the layer derives from u."""
    step, b, c = core.x_proj(u).split([core.rank, core.state_dim, core.state_dim], dim=-1)
    return F.softplus(core.dt_proj(step)), b, c


def decayed_sums(
    a: Tensor, inputs: Tensor, before: Tensor, b: Tensor, rest: Tensor, c: Tensor, number: Tensor
) -> Tensor:
    """What the first items, number[t] of them, add to the output of prefix t, (B, T, E).

    sum_n c_t[n] exp(a rest_t) sum_{j < number_t} exp(a before_j) inputs_j b_j[n]; states are as large as
    those of a scan, so rows go through in blocks and are computed again for gradients.

    Args:
        a: (E, N); inputs: delta u, (B, T, E); before: step sizes of the items read after j, (B, T, E); b:
            (B, T, N); rest: step sizes of the kept items, (B, T, E); c: (B, T, N); number: int64 (T,).
    """

    def block(inputs: Tensor, before: Tensor, b: Tensor, rest: Tensor, c: Tensor, a: Tensor) -> Tensor:
        terms = torch.exp(before[..., None] * a) * inputs[..., None] * b[:, :, None]
        states = running_sum(terms, 1)[:, (number - 1).clamp(min=0)] * (number > 0)[:, None, None]
        return ((states * torch.exp(rest[..., None] * a)) @ c[..., None])[..., 0]

    return in_blocks(block, (inputs, before, b, rest, c), a, inputs.shape[1])


def decayed_tail(a: Tensor, inputs: Tensor, rest: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What the items that each prefix handles by itself add to its output, (B, T, E).

    sum_s sum_n c_t[n] exp(a rest_ts) inputs_ts b_ts[n], in blocks of rows like `decayed_sums`.

    Args:
        a: (E, N); inputs: delta u, (B, T, S, E); rest: step sizes of the items read after each, likewise; b:
            (B, T, S, N); c: (B, T, N).
    """

    def block(inputs: Tensor, rest: Tensor, weight: Tensor, a: Tensor) -> Tensor:
        kept = torch.exp(rest[..., None] * a) @ weight[..., None]
        return (kept[..., 0] * inputs).sum(2)

    return in_blocks(block, (inputs, rest, b * c[:, :, None]), a, inputs.shape[1] * inputs.shape[2])


def in_blocks(block: Callable[..., Tensor], parts: tuple[Tensor, ...], a: Tensor, steps: int) -> Tensor:
    """block(*parts, a), rows of a batch at a time, each computed again for gradients."""
    size = rows_per_block(steps, a)
    pieces = zip(*(part.split(size) for part in parts))
    return torch.cat([checkpoint(block, *piece, a, use_reentrant=False) for piece in pieces])
