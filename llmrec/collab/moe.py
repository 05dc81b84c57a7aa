"""Fuxi-MME: an item is several small vectors, which go through shared FuXi blocks with experts.

Source: Pan et al., "Revisiting scalable sequential recommendation with Multi-Embedding Approach and
Mixture-of-Experts" (2025), arXiv 2510.25285. No code and no table of results is public. From the paper: the
item table is cut into M independent tables of width D / M, all through one shared decoder of FuXi blocks,
whose parameters are partly replaced by sparsely gated experts. Ours, where the paper is silent: which part
(the gated feed-forward by default), a trained vector per branch so that routing can tell branches apart,
noisy top-k routing (Shazeer et al. 2017) with the balance loss of Switch Transformers (Fedus et al. 2022),
no capacity limit, and the cosine of all tables side by side as the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.fuxi import (
    Channels,
    Context,
    context_of,
    fuxi_block,
    item_table,
    position_table,
    run_blocks,
    times_read,
    unit,
)
from llmrec.collab.layers import normal_like
from llmrec.collab.losses import Loss, Pooled, last_of, next_item_loss
from llmrec.data.batches import Batch


class FuxiMME(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    With one table and one expert this is `llmrec.collab.fuxi.Fuxi`, to the last bit.
    """

    layout = "positions"

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_tables: int,
        num_experts: int,
        top_k: int,
        moe_targets: tuple[str, ...],
        router_noise: float,
        balance: str,
        balance_weight: float,
        num_layers: int,
        num_heads: int,
        head_dim: int | None,
        inner_multiplier: int,
        semantic: bool,
        positional: bool,
        temporal: bool,
        single_stage: bool,
        dropout_rate: float,
        temperature: float,
        max_history: int,
        use_request_time: bool = False,
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        width = embed_dim // num_tables
        self.uses_time = temporal
        self.uses_request_time = use_request_time
        self.max_history = max_history
        self.num_tables = num_tables
        self.temperature = temperature
        self.balance, self.balance_weight = balance, balance_weight
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.item = item_table(num_items, embed_dim)
        self.position = position_table(max_history, width)
        # One branch has nothing to be told apart from.
        self.branch = nn.Parameter(torch.zeros(num_tables, width), requires_grad=num_tables > 1)
        self.dropout = nn.Dropout(dropout_rate)

        def experts(make: Callable[[], nn.Module]) -> nn.Module:
            return Experts([make() for _ in range(num_experts)], top_k, router_noise)

        channels = Channels(
            semantic=semantic, positional=positional, temporal=temporal, max_history=max_history
        )
        self.blocks = nn.ModuleList(
            fuxi_block(
                width,
                num_heads,
                head_dim or width // num_heads,
                channels,
                dropout_rate,
                None if single_stage else inner_multiplier * width,
                dict.fromkeys(moe_targets, experts),
            )
            for _ in range(num_layers)
        )

    def encode(
        self, history: Tensor, time: Tensor | None, next_time: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """What the model knows after each position, (B, T, D), from int64 (B, T) two or three times.

        Branches stand one below the other in the batch, (B x M, T, D / M).
        """
        batch, length = history.shape
        width = self.position.embedding_dim
        hidden = self.item(history).unflatten(2, (self.num_tables, width)) * math.sqrt(width)
        hidden = hidden + self.position.weight[:length, None] + self.branch
        hidden = self.dropout(hidden.transpose(1, 2).flatten(0, 1))
        context = context_of(history, *times_read(self, time, next_time))
        if self.num_tables > 1:
            context.valid = context.valid.repeat_interleave(self.num_tables, 0)
            if context.bucket is not None:
                context.bucket = context.bucket.repeat_interleave(self.num_tables, 0)
        hidden = run_blocks(self.blocks, hidden, context)
        return hidden.unflatten(0, (batch, self.num_tables)).transpose(1, 2).flatten(2), context

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item at every position, and of unevenly used experts."""
        hidden, context = self.encode(batch.item, batch.time, batch.next_time)
        found = next_item_loss(
            self.loss_name,
            unit(hidden),
            unit(self.item.weight),
            batch,
            num_negatives=self.num_negatives,
            temperature=self.temperature,
        )
        number = found.num_targets
        at = (batch.target != 0).repeat_interleave(self.num_tables, 0)
        parts: dict[str, Tensor | Pooled] = dict(context.report(at))
        if self.num_tables > 1:
            parts["table_similarity"] = table_similarity(self.item.weight, self.num_tables) * number
        total = found.total
        if context.routing and number:
            routings = [routing.at(context.valid) for routing in context.routing]
            uneven = torch.stack([routing.imbalance(self.balance) for routing in routings]).sum()
            parts |= {
                "prediction_loss": found.total.detach(),
                "balance_loss": uneven.detach() * number,
                "router_entropy": torch.stack([routing.entropy for routing in routings]).mean() * number,
            }
            # One entry per mixture, in the order of the pass: a mean over them would hide a collapse.
            for place, routing in enumerate(routings, start=1):
                parts[f"expert_load_{place}"] = routing.load * number
            total = total + self.balance_weight * uneven * number
        return Loss(total=total, num_targets=number, parts=parts)

    def score(self, history: Tensor, time: Tensor | None = None, next_time: Tensor | None = None) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T) two or three times."""
        query = last_of(self.encode(history, time, next_time)[0], history)
        return unit(query) @ unit(self.item.weight).T / self.temperature

    def item_embeddings(self) -> Tensor:
        """All tables side by side, (N + 1, D), row 0 zero."""
        return self.item.weight.detach()


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where one mixture sent the tokens of one pass, (B, T, K), or those that hold an item, (n, K)."""

    chosen: Tensor
    """bool (n, K), the experts of each token"""
    weight: Tensor
    """(n, K), their weights, 0 for the others; sums to 1"""
    probability: Tensor
    """(n, K), softmax over all experts"""

    def at(self, valid: Tensor) -> Routing:
        """That of the tokens where valid, bool (B, T), says so."""
        return Routing(
            chosen=self.chosen[valid], weight=self.weight[valid], probability=self.probability[valid]
        )

    @property
    def load(self) -> Tensor:
        """Share of the tokens' choices that each expert got, (K,), sums to 1."""
        count = self.chosen.sum(0).to(self.weight.dtype)
        return count / count.sum().clamp(min=1)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the probabilities, in nats; log K if routing is undecided."""
        probability = self.probability.detach()
        return -(probability * probability.clamp(min=1e-20).log()).sum(1).mean()

    def imbalance(self, kind: str) -> Tensor:
        """switch: K sum_i load_i x mean probability_i, 1 if even; cv2: squared coefficient of variation of
        the summed weights, 0 if even."""
        if kind == "switch":
            return len(self.load) * (self.load * self.probability.mean(0)).sum()
        if kind == "cv2":
            importance = self.weight.sum(0)
            return importance.var(unbiased=False) / importance.mean().square()
        return self.weight.new_zeros(())


class Experts(nn.Module):
    """A sparsely gated mixture: each token's output is that of its best top_k experts, weighted.

    Scores z W_r, in training with noise softplus(z W_n) x router_noise; the kept scores go through a
    softmax. Every expert sees every token: with few small experts that beats gathering. One expert needs
    no router and draws no random number.
    """

    def __init__(self, experts: list[nn.Module], top_k: int, router_noise: float) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.top_k = top_k
        self.router_noise = router_noise
        if len(experts) > 1:
            width = cast(int, experts[0].in_dim)
            self.router = nn.Parameter(torch.zeros(width, len(experts)))
            self.noise = nn.Parameter(torch.zeros(width, len(experts)))

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """(B, T, F) to (B, T, F'); tells context where tokens went."""
        if len(self.experts) == 1:
            return self.experts[0](hidden, context)
        routing = self.route(hidden)
        context.routing.append(routing)
        outputs = (expert(hidden, context) for expert in self.experts)
        weights = routing.weight.unbind(-1)
        return sum(weight[..., None] * output for weight, output in zip(weights, outputs))

    def route(self, hidden: Tensor) -> Routing:
        """Experts of every token, padding included, (B, T, K)."""
        scores = hidden @ self.router
        if self.training and self.router_noise:
            spread = F.softplus(hidden @ self.noise) * self.router_noise
            scores = scores + normal_like(scores) * spread
        best = scores.topk(self.top_k, dim=-1)
        weight = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1))
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best.indices, True)
        return Routing(chosen=chosen, weight=weight, probability=scores.softmax(-1))


def table_similarity(table: Tensor, num_tables: int, sample: int = 1024) -> Tensor:
    """Mean linear CKA between pairs of item tables on the first items; 1 if they say the same.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML 2019), Eq. 4.
    """
    rows = table[1 : 1 + sample].detach().unflatten(1, (num_tables, -1)).transpose(0, 1)
    rows = rows - rows.mean(1, keepdim=True)
    cross = torch.einsum("anp,bnq->abpq", rows, rows).square().sum((2, 3))
    own = cross.diagonal().sqrt()
    similar = cross / (own[:, None] * own).clamp(min=1e-20)
    pairs = torch.ones_like(similar, dtype=torch.bool).triu(1)
    return similar[pairs].mean()
