"""SIGMA-Mamba: selective gated Mamba, which reads a history in two directions, and a GRU beside them.

Sources: Liu et al., "SIGMA: Selective Gated Mamba for Sequential Recommendation" (AAAI 2025),
arXiv 2408.11451, sections 2.3.1 to 2.3.3, and Applied-Machine-Learning-Lab/SIMGA. The paper and the release
differ, and the release differs from what its words say; `GatedMamba` lists both forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.flipped import flipped_ends
from llmrec.collab.layers import init_weights
from llmrec.collab.losses import Loss, last_of, next_item_loss
from llmrec.collab.mamba4rec import Layer, MambaCore
from llmrec.data.batches import Batch


class SigmaMamba(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    The second direction sees a history's items in another order, so it is not causal inside a history, and
    several layers need a row for every prefix. With one layer only the end of each flipped prefix counts,
    and `llmrec.collab.flipped` has those of all prefixes in one pass, exactly. With flip, gate, GRU and
    mixing off this is `llmrec.collab.mamba4rec.Mamba4Rec`.

    ``variant="released"`` pads every history to max_history slots and flips all slots but the last
    kept_items, so that short histories are moved among the padding, whose vector is not zero and competes
    with the items in the softmax: padding matters there, by design of the release. What stands behind the
    last place that is read is computed only where something before it depends on it.
    """

    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_layers: int,
        state_dim: int,
        conv_width: int,
        expand: int,
        dropout_rate: float,
        max_history: int,
        ssm: bool = True,
        flip: str = "partial",
        kept_items: int = 5,
        kept_rate: float | None = None,
        gate: bool = True,
        gru: bool = True,
        mixing: str = "trainable",
        mixing_weights: tuple[float, ...] = (0.8, 0.1, 0.1),
        variant: str = "corrected",
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        one_pass = flip == "none" or (num_layers == 1 and (kept_items >= 1 or kept_rate is not None))
        self.layout = "positions" if variant == "corrected" and one_pass else "prefixes"
        self.max_history = max_history
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.released = variant == "released"
        self.kept = KeptItems(kept_items, kept_rate)
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.layers = nn.ModuleList(
            Layer(
                GatedMamba(
                    MambaCore(embed_dim, state_dim, conv_width, expand) if ssm else None,
                    embed_dim,
                    dropout_rate,
                    kept=self.kept if flip != "none" else None,
                    gate=gate,
                    gru=gru,
                    mixing=mixing,
                    mixing_weights=mixing_weights,
                    released=self.released,
                ),
                embed_dim,
                dropout_rate,
                num_layers > 1,
            )
            for _ in range(num_layers)
        )
        self.apply(init_weights)
        if self.released:
            nn.init.normal_(self.item.weight, std=0.02)
        elif ssm:
            layer: Any
            for layer in self.layers:
                layer.mixer.mamba.reset_step_sizes()

    def encode(self, history: Tensor) -> Tensor:
        """What the model knows after each position, (B, T, D), from int64 (B, T)."""
        places = history.shape[1]
        if self.released:
            history = F.pad(history, (0, self.max_history - places))
        order = self.flipped_order(history)
        hidden = self.norm(self.dropout(self.item(history)))
        *first, last = self.layers
        for layer in first:
            hidden = layer(hidden, order)
        return last(hidden, order[:, :places])

    def encode_prefixes(self, history: Tensor) -> Tensor:
        """What the model knows at the end of every prefix, (B, T, D), from int64 (B, T)."""
        hidden = self.norm(self.dropout(self.item(history)))
        for layer in self.layers:
            hidden = layer(hidden, None, history != 0)
        return hidden

    def flipped_order(self, history: Tensor) -> Tensor:
        """Where the second direction takes each slot's item from, int64 (B, T).

        corrected: the items of a history but the last that are kept in reverse, then those as they are;
        padding stays on the right. released: the same for max_history slots, whatever they hold.
        """
        slot = torch.arange(history.shape[1], device=history.device)
        if self.released:
            length = torch.full_like(history[:, :1], history.shape[1])
        else:
            length = (history != 0).sum(1, keepdim=True)
        reversed_ = length - self.kept(length)
        return torch.where(slot < reversed_, reversed_ - 1 - slot, slot)

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item after every history of a batch."""
        query = self.encode_prefixes(batch.item) if self.layout == "positions" else self.encode(batch.item)
        found = next_item_loss(
            self.loss_name,
            query,
            self.item.weight,
            batch,
            num_negatives=self.num_negatives,
            skip_row_0=not self.released,
        )
        parts = {}
        layer: Any
        for place, layer in enumerate(self.layers, start=1):
            suffix = f"_{place}" if len(self.layers) > 1 else ""
            for name, value in layer.mixer.report(batch.target != 0).items():
                parts[name + suffix] = value
        return Loss(total=found.total, num_targets=found.num_targets, parts=parts)

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        return last_of(self.encode(history), history) @ self.item.weight.T

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        table = self.item.weight.detach().clone()
        table[0] = 0
        return table


@dataclass(frozen=True)
class KeptItems:
    """r of PF-Mamba: how many items at the end of a history the second direction reads in their own order."""

    number: int
    rate: float | None = None
    """Share of the history in place of the number; at least one item."""

    def __call__(self, length: Tensor) -> Tensor:
        """r, int64, of histories of these lengths."""
        if self.rate is None:
            return length.clamp(max=self.number)
        share = (length * self.rate - 1e-4).ceil().long()  # 10 of 100 are 10, whatever 0.1 is in binary
        return torch.minimum(share.clamp(min=1), length)


class GatedMamba(nn.Module):
    """The G-Mamba block: two directions through one Mamba, gated, mixed with a convolution and a GRU.

    With x the input, x' the input in flipped order and M, M' what Mamba makes of them (M' is not flipped
    back, in either form):

    - gate: u = x + dense(x); corrected G = SiLU(W_s u + b_s) + sigmoid(W_g u + b_g) for both directions;
      released G = W_s SiLU(u) + b_s + W_g sigmoid(v) + b_g with v = u forward, and v = the forward gate
      in the flipped direction. Then M (1 + G), M' (1 + G').
    - FE-GRU: a convolution over 3 items, then a bias-free GRU; corrected looks back only, released is
      centred.
    - mixing: corrected weights sum to 1 (softmax), released ones are used raw; then a linear map. Ours: the
      softmax over paths of V x ("gated"), or of (Q x)(K path)' / sqrt(D) ("attention"), plus what the
      trained weights would be, where both begin.

    Without a Mamba the GRU's path is all there is.
    """

    there: Tensor

    def __init__(
        self,
        mamba: MambaCore | None,
        embed_dim: int,
        dropout_rate: float,
        *,
        kept: KeptItems | None,
        gate: bool,
        gru: bool,
        mixing: str,
        mixing_weights: tuple[float, ...],
        released: bool,
    ) -> None:
        super().__init__()
        self.mamba = mamba
        self.released = released
        self.kept = kept
        flip = kept is not None
        paths = torch.tensor([mamba is not None, flip, gru])
        self.register_buffer("there", paths, persistent=False)
        self.dropout = nn.Dropout(dropout_rate)
        self.gates = nn.ModuleDict()
        if gate:
            names = ["forward_dense", "flipped_dense"] if flip else ["forward_dense"]
            for name in [*names, "silu", "sigmoid"]:
                self.gates[name] = nn.Linear(embed_dim, embed_dim)
        self.conv = nn.Conv1d(embed_dim, embed_dim, 3) if gru else None
        self.gru = nn.GRU(embed_dim, embed_dim, bias=False, batch_first=True) if gru else None
        self.mixing_out = None
        if mixing != "none":
            start = torch.tensor(mixing_weights, dtype=torch.float32)
            start = start if released else start.log()
            self.mixing = nn.Parameter(start, requires_grad=mixing == "trainable")
            self.mixing_out = nn.Linear(embed_dim, embed_dim)
        self.mixing_gate = nn.Linear(embed_dim, 3, bias=False) if mixing == "gated" else None
        self.mixing_query = self.mixing_key = None
        if mixing == "attention":
            self.mixing_query, self.mixing_key = (
                nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(2)
            )
        # Of the last pass, detached: each gate's mean over channels, (B, T), and the weights.
        self.gate_means: dict[str, Tensor] = {}
        self.mixed_by: Tensor | None = None

    def weights(self, hidden: Tensor, paths: list[Tensor | None]) -> Tensor:
        """Mixing weights of the forward, flipped and GRU path, (3,), or of each position, (B, T, 3); 0 for a
        path that is not there."""
        if self.released:
            return self.mixing * self.there
        logits = self.mixing
        if self.mixing_gate is not None:
            logits = logits + self.mixing_gate(hidden)
        elif self.mixing_query is not None and self.mixing_key is not None:
            absent = torch.zeros_like(hidden)
            keys = torch.stack([absent if path is None else self.mixing_key(path) for path in paths], 2)
            query = self.mixing_query(hidden) / hidden.shape[-1] ** 0.5
            logits = logits + (keys @ query[..., None])[..., 0]
        return logits.masked_fill(~self.there, -torch.inf).softmax(-1)

    def forward(self, hidden: Tensor, order: Tensor | None, real: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, P, D), the first P places; order, (B, P), says where the flipped direction takes
        its items from, which may be any of the T.

        Without an order every position stands for the prefix that ends there, and P is T; real, bool (B, T),
        says which positions are no padding (all).
        """
        forward = gate = None
        whole = hidden
        if order is not None:
            hidden = whole[:, : order.shape[1]]
        if self.mamba is not None:
            forward, gate = self.gated(self.mamba(hidden), hidden, "forward_dense", None)
        paths = [forward, None]
        if self.mamba is not None and self.kept is not None:
            if order is None:  # a prefix ends with its last item, flipped or not
                lengths = torch.arange(1, hidden.shape[1] + 1)
                if real is None:
                    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
                turned, mixed = hidden, flipped_ends(self.mamba, hidden, self.kept(lengths), real)
            else:
                turned = whole.gather(1, order[..., None].expand_as(hidden))
                mixed = self.mamba(turned)
            paths[1] = self.gated(mixed, turned, "flipped_dense", gate)[0]
        paths.append(None if self.gru is None else self.recurrent(whole, hidden.shape[1]))
        if self.mixing_out is None:  # there is only one
            return next(path for path in paths if path is not None)
        weights = self.weights(hidden, paths)
        self.mixed_by = weights.detach()
        each = zip(weights.unbind(-1), paths)
        return self.mixing_out(sum(weight[..., None] * path for weight, path in each if path is not None))

    def gated(
        self, mixed: Tensor, hidden: Tensor, dense: str, forward_gate: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mamba's output for one direction, gated by its input; and the gate."""
        if not self.gates:
            return mixed, None
        u = hidden + self.gates[dense](hidden)
        if self.released:
            other = u if forward_gate is None else forward_gate
            gate = self.gates["silu"](F.silu(u)) + self.gates["sigmoid"](torch.sigmoid(other))
        else:
            gate = F.silu(self.gates["silu"](u)) + torch.sigmoid(self.gates["sigmoid"](u))
        gate = self.dropout(gate)
        self.gate_means[dense] = gate.detach().mean(-1)
        return mixed * (1 + gate), gate

    def recurrent(self, hidden: Tensor, places: int) -> Tensor:
        """The path for short histories, (B, T, D) to (B, P, D), the first P places."""
        before, after = (1, 1) if self.released else (2, 0)
        assert self.conv is not None and self.gru is not None
        around = before, max(places + after - hidden.shape[1], 0)
        local = self.conv(F.pad(hidden[:, : places + after].transpose(1, 2), around)).transpose(1, 2)
        return self.gru(local)[0]

    def report(self, at: Tensor) -> dict[str, Tensor]:
        """Mixing weights, (3,), and each direction's gate of the last pass, summed over the positions where
        at, bool (B, T), is true; what the pass padded behind them is left out."""
        length = at.shape[1]
        found = {}
        if self.mixed_by is not None and self.mixed_by.ndim == 1:
            found["mixing_weights"] = self.mixed_by * at.sum()
        elif self.mixed_by is not None:
            found["mixing_weights"] = (self.mixed_by[:, :length] * at[..., None]).sum((0, 1))
        for name, gate in self.gate_means.items():
            found[f"{name.split('_')[0]}_gate"] = (gate[:, :length] * at).sum()
        return found
