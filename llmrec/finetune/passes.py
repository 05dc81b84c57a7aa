"""From the targets of an optimiser step to this process's forward passes."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from llmrec import launched
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.model import MMESID
from llmrec.finetune.packing import PackedRows, count_tokens, group_rows, pack
from llmrec.finetune.steps import micro_batches, row_lengths, sampled_items, share_rows
from llmrec.interactions import Interactions, Targets


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward pass: the arguments of `MMESID.loss`."""

    groups: list[PackedRows]
    weight: float
    pairs: list[Tensor] | None = None
    targets: float = 0.0


class Passes:
    """Packs targets into rows, shares the rows among processes, and cuts each share into forward passes.

    Args:
        config: settings.
        data: interactions that targets point into.
        model: for the lengths of its prompt.
    """

    def __init__(self, config: FinetuneConfig, data: Interactions, model: MMESID) -> None:
        self.config = config
        self.model = model
        self.item = torch.from_numpy(data.item)
        self.num_items = data.num_items

    def of(self, targets: Targets, step: int) -> tuple[list[Pass], int]:
        """The passes of one step, and the tokens that it costs in all processes, without padding.

        Wrappers that share parameters need as many passes in every process; those that are missing are
        filled with rows of weight 0.

        Args:
            targets: of the step, the same in every process.
            step: optimiser steps done before, which seeds sampled items.
        """
        model, config = self.model, self.config
        row = group_rows(targets, config.layout, model.min_slots)
        length = row_lengths(targets, row, len(model.response), model.item_tokens.tokens_per_item)
        room = config.micro_batch_tokens
        if model.stream:
            room = max(room - len(model.instruction), 1)
        elif not model.share_instruction:
            length += len(model.instruction)
        shares = share_rows(length, launched.world_size())
        passes = [micro_batches(length[own], room, stream=model.stream) for own in shares]
        own = shares[launched.rank()]
        negative = None
        if config.loss == "bce_sampled":
            negative = sampled_items(targets.item, self.num_items, (config.seed, step, 1))

        def packed(rows: np.ndarray) -> PackedRows:
            chosen = np.flatnonzero(np.isin(row, rows))
            sampled = None if negative is None else negative[chosen]
            return pack(self.item, targets.take(chosen), row[chosen], sampled)

        mine = [Pass([packed(own[group]) for group in groups], 1.0) for groups in passes[launched.rank()]]
        missing = max(map(len, passes)) - len(mine)
        mine += [Pass([packed(np.array([0]))], 0.0)] * missing
        if model.aligns:
            # Of all items of the step, in every process: negatives do not depend on who has which rows.
            shown = [self.item[start:stop] for start, stop in windows(targets, row)]
            pairs = model.item_tokens.pairs(torch.unique(torch.cat(shown)))
            mine[0] = dataclasses.replace(mine[0], pairs=pairs, targets=len(targets) / launched.world_size())
        return mine, self.tokens(targets, sum(map(len, passes)))

    def tokens(self, targets: Targets, num_passes: int) -> int:
        """Tokens of a step over these targets, cut into so many passes, each with an instruction of its own
        where rows share one."""
        shared, instruction = self.model.share_instruction, len(self.model.instruction)
        tokens = count_tokens(
            targets,
            instruction=0 if shared else instruction,
            response=len(self.model.response),
            layout=self.config.layout,
            shared=shared,
            min_slots=self.model.min_slots,
            tokens_per_item=self.model.item_tokens.tokens_per_item,
        )
        return tokens + instruction * num_passes * shared


def windows(targets: Targets, row: np.ndarray) -> list[tuple[int, int]]:
    """Where each row's history lies, the longest of its targets'."""
    first = np.flatnonzero(np.diff(row, prepend=-1))
    return list(zip(targets.start[first].tolist(), np.maximum.reduceat(targets.stop, first).tolist()))
