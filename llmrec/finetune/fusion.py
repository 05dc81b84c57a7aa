"""Frequency-aware fusion: one score per item from several sources, as one matrix product."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrequencyGate(nn.Module):
    """Per-item mixing weights over the score sources, driven by popularity.

    Rare items have weak collaborative vectors, so the gate can lean on text and image scores for them
    and on collaborative scores for popular items. With the published temperature of 1e-3 it picks
    almost one source for all items at the start, decided by the seed.

    Source: MME-SID Eq. 13-14; Applied-Machine-Learning-Lab/MME-SID@bc95e1a model.py.
    Differs: counts come from the train split (their count file is not published).

    Args:
        train_count: interactions per item in the train split, int64 (N + 1,), entry 0 is 0.
        num_sources: S, number of score sources mixed.
        temperature: softmax temperature, > 0, unitless; smaller selects harder.
        add_first: the first source counts in full (weight 1), and the others share the mixing weights.

    Raises:
        ValueError: if temperature <= 0, or if all counts are equal (frequency would be 0 / 0).
    """

    frequency: Tensor
    item_frequency: Tensor

    def __init__(
        self, train_count: Tensor, num_sources: int, temperature: float, *, add_first: bool = False
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        values, inverse = torch.unique(train_count, return_inverse=True)
        if len(values) == 1:
            raise ValueError(f"all items have {int(values[0])} interactions; there is no frequency to use")
        frequency = torch.log1p(values.double())
        frequency = (frequency - frequency.min()) / (frequency.max() - frequency.min())
        self.temperature = temperature
        self.add_first = add_first
        self.register_buffer("frequency", frequency.float()[:, None], persistent=False)
        self.register_buffer("item_frequency", inverse, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(1, 64),
            nn.GELU(),
            nn.Linear(64, 10),
            nn.Linear(10, 64, bias=False),
            nn.GELU(),
            nn.Linear(64, num_sources - add_first),
        )

    def forward(self, item: Tensor | None = None) -> Tensor:
        """Mixing weights (N + 1, S), or those of item ids (n,); the mixed ones of a row sum to 1.

        Computed once per distinct count, never in half precision, which the small temperature would blow up.
        """
        with torch.autocast(self.frequency.device.type, enabled=False):
            weights = F.softmax(self.mlp(self.frequency) / self.temperature, dim=-1)
        if self.add_first:
            weights = F.pad(weights, (1, 0), value=1.0)
        return F.embedding(self.item_frequency if item is None else self.item_frequency[item], weights)


class EqualWeights(nn.Module):
    """The ablation without fusion: every source counts the same, 1 / S unless said otherwise."""

    weights: Tensor

    def __init__(self, num_items: int, num_sources: int, weight: float | None = None) -> None:
        super().__init__()
        value = 1 / num_sources if weight is None else weight
        self.register_buffer("weights", torch.full((num_items + 1, num_sources), value), persistent=False)

    def forward(self, item: Tensor | None = None) -> Tensor:
        """Mixing weights (N + 1, S), or those of item ids (n,)."""
        return self.weights if item is None else self.weights[item]


class ItemScores(nn.Module):
    """Scores of the whole catalogue from a read-out vector h, as one product queries @ keys.T.

    score(i) = w_i0 <h, V_i> + sum_m w_im <h, W_m E_m[i] + b_m>           (MME-SID Eq. 14)

    The weights depend on the item alone, so all sources fold into one matrix. There are two exact
    ways to it, and the cheaper one for the number of targets n is taken:

    - folded: keys = w_0 V + sum_m w_m (E_m W_m^T + b_m), queries = h;  N H (sum D_m + n) products
    - factored: <h, W E + b> = <W^T h, E> + <h, b>, so queries = [h, W_m^T h, <h, b_m>] and
      keys = [w_0 V, w_m E_m, w_m];  n N (H + sum D_m + S) products, no N x H table per source

    Args:
        vectors: frozen item vectors by modality, float (N + 1, D_m), row 0 zero.
        projections: the maps W_m, b_m by modality, nn.Linear(D_m, H); shared with the item inputs.
        gate: module that returns mixing weights (N + 1, 1 + M), target table first.
        hidden_size: H.
        table_std: standard deviation of V's initial values; None: 1 / sqrt(H).
    """

    def __init__(
        self,
        vectors: dict[str, Tensor],
        projections: nn.ModuleDict,
        gate: nn.Module,
        hidden_size: int,
        table_std: float | None = None,
    ) -> None:
        super().__init__()
        self.num_rows = num_rows = len(next(iter(vectors.values())))
        self.modalities = tuple(projections)
        self.projections = projections
        self.gate = gate
        self.target_table = nn.Parameter(torch.empty(num_rows, hidden_size))
        std = 1 / math.sqrt(hidden_size) if table_std is None else table_std
        nn.init.normal_(self.target_table, std=std)
        for modality in self.modalities:
            self.register_buffer(f"vectors_{modality}", vectors[modality], persistent=False)

    def vectors_of(self, modality: str) -> Tensor:
        """Frozen item vectors (N + 1, D_m)."""
        return getattr(self, f"vectors_{modality}")

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (n, X) and keys (N + 1, X) whose products are the scores; hidden is (n, H)."""
        if not self.modalities:
            return hidden, self.target_table
        if folding_is_cheaper(len(hidden), hidden.shape[1]):
            return hidden, self.folded()
        weights = self.gate()
        queries, keys = [hidden], [weights[:, :1] * self.target_table]
        for source, modality in enumerate(self.modalities, start=1):
            projection = cast(nn.Linear, self.projections[modality])
            weight = weights[:, source : source + 1]
            queries += [hidden @ projection.weight, (hidden @ projection.bias)[:, None]]
            keys += [weight * self.vectors_of(modality), weight]
        return torch.cat(queries, dim=1), torch.cat(keys, dim=1)

    def folded(self, item: Tensor | None = None) -> Tensor:
        """The one item matrix (N + 1, H), or its rows of item ids (n,); score = h @ folded.T."""
        table = self.target_table if item is None else F.embedding(item, self.target_table)
        if not self.modalities:
            return table
        weights = self.gate(item)
        matrix = weights[:, :1] * table
        for source, modality in enumerate(self.modalities, start=1):
            vectors = self.vectors_of(modality)
            projected = self.projections[modality](vectors if item is None else vectors[item])
            matrix = matrix + weights[:, source : source + 1] * projected
        return matrix

    def by_source(self, hidden: Tensor, item: Tensor) -> Tensor:
        """What every source adds to the scores of item ids (n,) for one read-out vector (H,), (n, S); the sum
        is the score, to rounding."""
        columns = [self.target_table[item].float() @ hidden]
        if self.modalities:
            weights = self.gate(item)
            columns[0] = weights[:, 0] * columns[0]
            for source, modality in enumerate(self.modalities, start=1):
                projected = self.projections[modality](self.vectors_of(modality)[item])
                columns.append(weights[:, source] * (projected @ hidden))
        return torch.stack(columns, dim=1)


def folding_is_cheaper(num_targets: float, hidden_size: int) -> bool:
    """Which of the two ways of `ItemScores` takes fewer products."""
    return num_targets > hidden_size
