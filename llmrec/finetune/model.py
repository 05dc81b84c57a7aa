"""MME-SID as one module: packed rows in, loss or read-out vectors out. Knows tensors only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from llmrec.finetune.fusion import ItemScores
from llmrec.finetune.item_inputs import ItemTokens
from llmrec.finetune.packing import PackedRows, TokenLayout, lay_out, several_slots
from llmrec.item_softmax import item_cross_entropy


class MMESID(nn.Module):
    """A causal language model that reads item tokens and scores the whole catalogue.

    Args:
        base: decoder without a language-model head, called with inputs_embeds, a 4-dimensional
            attention mask and position_ids (any Llama-like Hugging Face model, with or without LoRA).
        item_tokens: item ids to input embeddings.
        item_scores: read-out vectors to catalogue scores.
        instruction: int64 (I,) token ids before the history.
        response: int64 (R,) token ids after it, R >= 1.
        share_instruction: encode the instruction once per forward pass.
        dropout_rate: dropout on item tokens and read-out vectors.
        alignment_weight: of the item tokens' alignment loss, per target, where they have one.
    """

    def __init__(
        self,
        base: nn.Module,
        item_tokens: ItemTokens,
        item_scores: ItemScores,
        instruction: Tensor,
        response: Tensor,
        *,
        share_instruction: bool = True,
        dropout_rate: float = 0.0,
        alignment_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.item_tokens = item_tokens
        self.item_scores = item_scores
        self.share_instruction = share_instruction
        self.dropout = nn.Dropout(dropout_rate)
        self.alignment_weight = alignment_weight
        self.register_buffer("instruction", instruction, persistent=False)
        self.register_buffer("response", response, persistent=False)

    def forward(self, groups: list[PackedRows]) -> Tensor:
        """Sum over the groups' targets of the cross-entropy over items 1..N; shape ().

        Groups are rows of similar length. Each distinct item is turned into a token once, and the
        catalogue is scored once, for all of them.
        """
        items = torch.unique(torch.cat([rows.items.flatten() for rows in groups]))
        tokens = self.item_tokens(items)
        hidden = [self.hidden(rows, tokens, torch.searchsorted(items, rows.items)) for rows in groups]
        queries, keys = self.item_scores.factors(self.dropout(torch.cat(hidden)))
        target = torch.cat([rows.target for rows in groups])
        loss = item_cross_entropy(queries, keys, target)
        if self.alignment_weight and self.item_tokens.alignment_temperature is not None:
            loss = loss + self.alignment_weight * len(target) * self.item_tokens.alignment(items)
        return loss

    def hidden(self, rows: PackedRows, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Read-out vectors (n, H), one per target of the rows.

        Args:
            rows: what to encode.
            tokens: item tokens (X, H), or (X, P, H) where an item has P of them.
            index: int64 (G, T), which token stands in each slot; None: the item id itself.
        """
        layout = lay_out(
            several_slots(rows, self.item_tokens.tokens_per_item),
            instruction=len(self.instruction),
            response=len(self.response),
            shared=self.share_instruction,
        )
        embed = self.base.get_input_embeddings()
        slots = F.embedding(rows.items if index is None else index, tokens.flatten(1)).to(embed.weight.dtype)
        slots = slots.reshape(len(slots), -1, tokens.shape[-1])
        copies = embed(self.response).repeat(rows.history.shape[1], 1).expand(len(slots), -1, -1)
        parts = [self.dropout(slots), copies]
        past = None
        if self.share_instruction:
            past = self._shared_instruction(embed, len(slots))
        else:
            parts.insert(0, embed(self.instruction).expand(len(slots), -1, -1))
        hidden = self._run_base(torch.cat(parts, dim=1), layout, past)
        return hidden.flatten(0, 1)[layout.readout]

    def _shared_instruction(self, embed: nn.Module, num_rows: int) -> DynamicCache:
        """Keys and values of the instruction, one pass, repeated for every row."""
        past = DynamicCache()
        self.base(inputs_embeds=embed(self.instruction)[None], past_key_values=past, use_cache=True)
        past.batch_repeat_interleave(num_rows)
        return past

    def _run_base(self, embeddings: Tensor, layout: TokenLayout, past: Any) -> Tensor:
        return self.base(
            inputs_embeds=embeddings,
            attention_mask=layout.visible,
            position_ids=layout.position,
            past_key_values=past,
            use_cache=past is not None,
        ).last_hidden_state
