"""BERT4Rec: a bidirectional transformer over item ids that fills in masked ones.

Sources: Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from
Transformer" (CIKM 2019); masking as in antklen/sasrec-bert4rec-recsys23, plus rows whose last item alone is
masked, as in RecBole. It needs several times the epochs of a causal model: undertraining explains many
published figures.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.layers import init_weights
from llmrec.collab.losses import Loss, last_of
from llmrec.data.batches import Batch
from llmrec.item_softmax import item_cross_entropy


class BERT4Rec(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Training looks at whole train sequences in both directions, so a masked item is also told from later
    ones; scoring appends a mask to the history. The mask's vector is the row after the last item. Positions
    count back from the last one, as in the published code (which pads on the left): the appended mask stands
    where training has seen masks, however long the history.
    """

    layout = "positions"
    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        inner_dim: int,
        dropout_rate: float,
        mask_rate: float,
        last_rate: float,
        num_masks: int,
        max_history: int,
        loss: str = "ce",
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.mask_rate, self.last_rate, self.num_masks = mask_rate, last_rate, num_masks
        self.mask_id = num_items + 1
        self.item = nn.Embedding(num_items + 2, embed_dim, padding_idx=0)
        self.position = nn.Embedding(max_history + 1, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout_rate)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                embed_dim,
                num_heads,
                inner_dim,
                dropout_rate,
                "gelu",
                layer_norm_eps=1e-12,
                batch_first=True,
            )
            for _ in range(num_layers)
        )
        self.head = nn.Linear(embed_dim, embed_dim)
        self.head_norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))
        self.apply(init_weights)
        layer: Any
        for layer in self.layers:
            nn.init.normal_(layer.self_attn.in_proj_weight, std=0.02)

    def encode(self, sequence: Tensor) -> Tensor:
        """What the model knows at each place, (B, T, D), from ids and masks int64 (B, T)."""
        place = torch.arange(sequence.shape[1], device=sequence.device)
        from_end = ((sequence != 0).sum(1, keepdim=True) - 1 - place).clamp(min=0)
        hidden = self.dropout(self.norm(self.item(sequence) + self.position(from_end)))
        hidden_keys = sequence == 0
        hidden_keys[:, 0] = False
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=hidden_keys)
        return self.head_norm(F.gelu(self.head(hidden)))

    def output_table(self) -> Tensor:
        """Item vectors with the output biases as a last column, (N + 1, D + 1)."""
        return torch.cat([self.item.weight[:-1], self.bias[:, None]], dim=1)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the masked items; every row with a target has at least one."""
        sequence = F.pad(batch.item, (0, 1))
        sequence[:, 1:] = torch.where(batch.target != 0, batch.target, sequence[:, 1:])
        sequence = sequence[(batch.target != 0).any(1)].repeat(self.num_masks, 1)
        if not len(sequence):
            return Loss(total=self.item.weight.sum() * 0.0, num_targets=0)
        masked = self.choose(sequence)
        hidden = self.encode(sequence.masked_fill(masked, self.mask_id))[masked]
        total = item_cross_entropy(F.pad(hidden, (0, 1), value=1.0), self.output_table(), sequence[masked])
        return Loss(total=total, num_targets=int(masked.sum()))

    def choose(self, sequence: Tensor) -> Tensor:
        """Places to mask, bool (B, T)."""
        place = torch.arange(sequence.shape[1], device=sequence.device)
        last = place == (sequence != 0).sum(1, keepdim=True) - 1
        drawn = (torch.rand(sequence.shape, device=sequence.device) < self.mask_rate) & (sequence != 0)
        alone = torch.rand(len(sequence), 1, device=sequence.device) < self.last_rate
        return torch.where(alone | ~drawn.any(1, keepdim=True), last, drawn)

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        sequence = F.pad(history, (0, 1))
        length = (history != 0).sum(1, keepdim=True)
        sequence.scatter_(1, length, self.mask_id)
        hidden = last_of(self.encode(sequence), sequence)
        return F.pad(hidden, (0, 1), value=1.0) @ self.output_table().T

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero, the mask's left out."""
        return self.item.weight[:-1].detach()
