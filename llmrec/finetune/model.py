"""MME-SID as one module: packed rows in, loss or read-out vectors out. Knows tensors only."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache

from llmrec.config import given
from llmrec.data.batches import sent
from llmrec.finetune import flex as flex_attention
from llmrec.finetune.fusion import ItemScores
from llmrec.finetune.graphs import DecoderGraphs
from llmrec.finetune.item_inputs import ItemTokens
from llmrec.finetune.packing import PackedRows, lay_out, lay_out_stream, several_slots
from llmrec.item_softmax import item_binary_cross_entropy, item_cross_entropy
from llmrec.precision import tf32

Instruction = tuple[list[tuple[Tensor, Tensor]], Tensor]

OVER_CATALOGUE = {"ce": item_cross_entropy, "bce_full": item_binary_cross_entropy}
"""Losses that score every item, by finetune.loss."""


class MMESID(nn.Module):
    """A causal language model that reads item tokens and scores the whole catalogue.

    Everything runs through `forward`, whose first argument names what to do: wrappers that shard parameters
    over processes bring them together there and nowhere else.

    Args:
        base: decoder without a language-model head, called with inputs_embeds, a 4-dimensional
            attention mask and position_ids (any Llama-like Hugging Face model, with or without LoRA).
        item_tokens: item ids to input embeddings.
        item_scores: read-out vectors to catalogue scores.
        instruction: int64 (I,) token ids before the history.
        response: int64 (R,) token ids after it; R = 0 reads out at the last item.
        share_instruction: encode the instruction once per forward pass.
        stream: put all tokens of a forward pass one behind the other (implies a shared instruction).
        flex: give the base FlexAttention's block masks in place of dense ones (streams only).
        min_slots: see `packing.lay_out`.
        loss: 'ce', 'bce_full' (sum over all items) or 'bce_sampled' (one item beside the target).
        mask_pad: leave row 0 out of the loss.
        precision: 'bf16' for bfloat16 matrix products, those with the item matrix excepted, which are TF32's
            on a GPU (what projections add to it is bfloat16 in training, float32 in scoring).
        dropout_rate: dropout on item tokens and read-out vectors.
        alignment_weight: of the item tokens' alignment loss, per target, where they have one.
    """

    instruction: Tensor
    response: Tensor

    def __init__(
        self,
        base: Any,
        item_tokens: ItemTokens,
        item_scores: ItemScores,
        instruction: Tensor,
        response: Tensor,
        *,
        share_instruction: bool = True,
        stream: bool = False,
        flex: bool = False,
        min_slots: int = 0,
        loss: str = "ce",
        mask_pad: bool = True,
        precision: str = "fp32",
        dropout_rate: float = 0.0,
        alignment_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.item_tokens = item_tokens
        self.item_scores = item_scores
        self.share_instruction = share_instruction
        self.stream = stream
        self.flex = flex
        self.min_slots = min_slots
        self.loss_kind = loss
        self.mask_pad = mask_pad
        self.precision = precision
        self.dropout = nn.Dropout(dropout_rate)
        self.alignment_weight = alignment_weight
        self.cache_name = cache_name(base)
        self.graphs: DecoderGraphs | None = None
        self.register_buffer("instruction", instruction, persistent=False)
        self.register_buffer("response", response, persistent=False)

    def forward(self, what: str, *arguments: Any) -> Any:
        """`loss`, `hidden`, `encode_instruction`, `tables` or `weights` of the arguments."""
        precision = "fp32" if what in ("tables", "weights") else self.precision
        with autocast(self.instruction.device, precision):
            return getattr(self, what)(*arguments)

    def loss(
        self,
        groups: list[PackedRows],
        weight: float = 1.0,
        pairs: list[Tensor] | None = None,
        targets: float = 0.0,
    ) -> Tensor:
        """Sum over the groups' targets of the loss over the catalogue; shape ().

        Each distinct item is turned into a token once, and the catalogue is scored once, for all groups.

        Args:
            groups: rows of similar length.
            weight: of the sum.
            pairs: items whose vectors are to be aligned (see `ItemTokens.pairs`), in one pass of a step and
                for all of it: negatives must not depend on how a step is cut.
            targets: what the alignment loss, a mean, is multiplied by beside its weight.
        """
        device = self.instruction.device
        # Rows may lie on the host, where sizes are read off without waiting for a GPU.
        items = torch.unique(torch.cat([rows.items.flatten() for rows in groups]))
        index = [torch.searchsorted(items, rows.items) for rows in groups]
        items = sent(items, device)
        tokens = self.item_tokens(items)
        # A recorded pass keeps what its gradients need until the next one.
        record = len(groups) == 1 and self.training and torch.is_grad_enabled()
        hidden = [self.hidden(rows, tokens, places, record=record) for rows, places in zip(groups, index)]
        readout = self.dropout(torch.cat(hidden))
        target = sent(torch.cat([rows.target for rows in groups]), device)
        if self.loss_kind == "bce_sampled":
            negative = sent(torch.cat([given(rows.negative) for rows in groups]), device)
            loss = self._sampled_loss(readout, target, negative)
        else:
            over_catalogue = OVER_CATALOGUE[self.loss_kind]
            # The item matrix stays in float32, so its products are TF32's where bfloat16 is good enough.
            with tf32(device, self.precision == "bf16"):
                queries, keys = self.item_scores.factors(readout)
                loss = over_catalogue(queries, keys, target, skip_row_0=self.mask_pad)
        loss = weight * loss
        if pairs is not None:
            aligned = self.item_tokens.alignment([sent(pair, device) for pair in pairs])
            loss = loss + self.alignment_weight * targets * aligned
        return loss

    @property
    def aligns(self) -> bool:
        """Whether the loss of a step has a part that pulls an item's vectors together."""
        return self.alignment_weight > 0 and self.item_tokens.has_alignment

    def hidden(
        self,
        rows: PackedRows,
        tokens: Tensor,
        index: Tensor | None = None,
        instruction: Instruction | None = None,
        *,
        record: bool = False,
    ) -> Tensor:
        """Read-out vectors (n, H), one per target of the rows.

        Args:
            rows: what to encode.
            tokens: item tokens (X, H), or (X, P, H) where an item has P of them.
            index: int64 (G, T), which token stands in each slot; None: the item id itself.
            instruction: what `encode_instruction` gave, if that is known already.
            record: replay the base's passes where they can be recorded; there must be one backward pass
                before the next forward pass.
        """
        if index is not None:
            rows = dataclasses.replace(rows, items=index)
        if self.stream:
            return self._hidden_stream(rows, tokens, record)
        return self._hidden_rows(rows, tokens, instruction)

    def encode_instruction(self) -> Instruction:
        """Keys and values of the instruction by layer, each (1, heads, I, D), and its last output (1, H)."""
        past = DynamicCache()
        embed = self.base.get_input_embeddings()
        output = self.base(
            inputs_embeds=embed(self.instruction)[None], use_cache=True, **{self.cache_name: past}
        )
        layers: list[Any] = list(past.layers)
        return [(layer.keys, layer.values) for layer in layers], output.last_hidden_state[0, -1:]

    def tables(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """Item tokens (n, ...) and rows (n, H) of the one item matrix, of item ids (n,)."""
        return self.item_tokens(item), self.item_scores.folded(item)

    def weights(self) -> Tensor:
        """Mixing weights of the score sources, (N, S)."""
        scores = self.item_scores
        if not scores.modalities:
            return scores.target_table.new_ones(scores.num_rows - 1, 1)
        return scores.gate()[1:]

    def _sampled_loss(self, readout: Tensor, target: Tensor, negative: Tensor) -> Tensor:
        """-log s(score of the target) - log(1 - s(score of the sampled item)), summed."""
        rows = self.item_scores.folded(torch.cat([target, negative]))
        readout = readout.to(torch.promote_types(readout.dtype, torch.float32))
        right, wrong = (readout.repeat(2, 1) * rows).sum(dim=1).chunk(2)
        return F.softplus(-right).sum() + F.softplus(wrong).sum()

    def _hidden_rows(self, rows: PackedRows, tokens: Tensor, instruction: Instruction | None) -> Tensor:
        """`hidden` with rows side by side."""
        per_item = self.item_tokens.tokens_per_item
        layout = lay_out(
            several_slots(rows, per_item),
            instruction=len(self.instruction),
            response=len(self.response),
            shared=self.share_instruction,
            min_slots=self.min_slots * per_item,
        ).to(self.instruction.device)
        embed = self.base.get_input_embeddings()
        slots = F.embedding(rows.items.to(tokens.device), tokens.flatten(1)).to(embed.weight.dtype)
        slots = slots.reshape(len(slots), -1, tokens.shape[-1])
        copies = embed(self.response).repeat(rows.history.shape[1], 1).expand(len(slots), -1, -1)
        parts = [self.dropout(slots), copies]
        past, last = None, None
        if self.share_instruction:
            known, last = self.encode_instruction() if instruction is None else instruction
            past = DynamicCache()
            for layer, (keys, values) in enumerate(known):
                past.update(keys.expand(len(slots), -1, -1, -1), values.expand(len(slots), -1, -1, -1), layer)
        else:
            parts.insert(0, embed(self.instruction).expand(len(slots), -1, -1))
        hidden = self._run_base(torch.cat(parts, dim=1), layout.visible, layout.position, past).flatten(0, 1)
        if last is not None and not len(self.response):
            hidden = torch.cat([hidden, last])
        return hidden[layout.readout]

    def _hidden_stream(self, rows: PackedRows, tokens: Tensor, record: bool) -> Tensor:
        """`hidden` with rows one behind the other."""
        graphs = self.graphs if record else None
        stream = lay_out_stream(
            rows,
            instruction=len(self.instruction),
            response=len(self.response),
            min_slots=self.min_slots,
            tokens_per_item=self.item_tokens.tokens_per_item,
            bucketed=self.flex or graphs is not None,
        )
        blocks = stream.visible_blocks() if self.flex else None
        stream = stream.to(self.instruction.device)
        embed = self.base.get_input_embeddings()
        text = embed(torch.cat([self.response, self.instruction]))
        items = tokens.reshape(-1, tokens.shape[-1]).to(text.dtype)
        table = torch.cat([text, text.new_zeros(1, text.shape[1]), items])
        embeddings = F.embedding(stream.source, table)
        if self.training and self.dropout.p:  # of every place by itself, however often its item is there
            is_item = (stream.source > len(text))[:, None]
            embeddings = torch.where(is_item, self.dropout(embeddings), embeddings)
        embeddings = embeddings[None]
        if graphs is not None and graphs.takes(stream):
            hidden = graphs(embeddings, stream, blocks)
        else:
            mask = stream.visible() if blocks is None else flex_attention.block_mask(stream, blocks)
            hidden = self._run_base(embeddings, mask, stream.position[None])
        return hidden[0, stream.readout]

    def record_base(self) -> None:
        """From now on replay the base's training passes over streams (see `graphs`)."""
        outside = {id(value) for value in self.base.get_input_embeddings().parameters()}
        inside = {name: value for name, value in self.base.named_parameters() if id(value) not in outside}
        trained = {name: value for name, value in inside.items() if value.requires_grad}
        self.graphs = DecoderGraphs(self._run_base_with, trained) if trained else None

    def _run_base(self, embeddings: Tensor, mask: Any, position: Tensor, past: Any = None) -> Tensor:
        known = {} if past is None else {self.cache_name: past}
        return self.base(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position,
            use_cache=past is not None,
            **known,
        ).last_hidden_state

    def _run_base_with(
        self, embeddings: Tensor, mask: Any, position: Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> Tensor:
        """`_run_base` without a cache, with other parameters in place of those of these names."""
        known = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": position}
        output = functional_call(self.base, dict(parameters), (), {**known, "use_cache": False})
        return output.last_hidden_state


def cache_name(base: Any) -> str:
    """How a decoder calls the keys and values it knows already; transformers renamed them."""
    decoder = base.get_base_model() if hasattr(base, "get_base_model") else base
    known = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 matrix products where asked for."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
