"""FlexAttention over token streams: its block masks, and every query head with key heads of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward, repeat_kv

from llmrec.finetune.packing import BLOCK, TokenStream

NAME = "llmrec_flex"
"""What transformers calls `attention`."""


def block_mask(stream: TokenStream, blocks: Tensor) -> BlockMask:
    """FlexAttention's block mask of a stream; one for all layers.

    Args:
        stream: where attention runs.
        blocks: its `visible_blocks`, best worked out on the host.
    """
    mask = host_mask(blocks).to(stream.source.device)
    mask.mask_mod = lambda batch, head, query, key: stream.sees(query, key)
    return mask


def host_mask(blocks: Tensor) -> BlockMask:
    """The blocks alone, where they are."""
    return BlockMask.from_kv_blocks(
        blocks.sum(dim=1, dtype=torch.int32)[None, None],
        torch.argsort(blocks.byte(), dim=1, descending=True, stable=True).int()[None, None],
        BLOCK_SIZE=BLOCK,
    )


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' FlexAttention with the key heads of a group repeated.

    Backward, one program goes through all queries of a group that see a block of keys, and every query sees
    the block of the instruction: with as many key heads as query heads this longest program of all, which the
    others wait for, is so many times shorter.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, attention)
