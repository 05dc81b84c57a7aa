"""What packed prompts must equal: one ordinary prompt per target, scored by explicitly projected tables."""

from __future__ import annotations

import numpy as np
import torch

from llmrec.interactions import Targets

NUM_ITEMS = 30
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def targets_of(histories: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, Targets]:
    """Users given as (items, which positions are targets); the history is all before the position."""
    item = torch.tensor([i for items, _ in histories for i in items])
    rows, begin = [], 0
    for user, (items, places) in enumerate(histories):
        rows += [(user, begin, begin + place, items[place]) for place in places]
        begin += len(items)
    user, start, stop, target = np.array(rows).T
    return item, Targets(user=user, start=start, stop=stop, item=target)


def random_users(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, Targets]:
    """One user per length, every position a target, so histories of 0..length - 1 items."""
    rng = np.random.default_rng(seed)
    return targets_of([(rng.integers(1, NUM_ITEMS + 1, n).tolist(), list(range(n))) for n in lengths])


def plain_prompts(net, item: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Read-outs (n, H) by one ordinary left-to-right forward pass per target: no mask, no cache."""
    embed, outputs = net.base.get_input_embeddings(), []
    for start, stop in zip(targets.start, targets.stop):
        history = net.item_tokens(item[start:stop]).flatten(0, -2)
        tokens = torch.cat([embed(net.instruction), history, embed(net.response)])
        outputs.append(net.base(inputs_embeds=tokens[None], use_cache=False).last_hidden_state[0, -1])
    return torch.stack(outputs)


def read_out(net, rows) -> torch.Tensor:
    """Read-outs (n, H) of packed rows, with the tokens of the whole catalogue."""
    return net.hidden(rows, net.item_tokens(torch.arange(NUM_ITEMS + 1)))


def full_scores(net, hidden: torch.Tensor) -> torch.Tensor:
    """Scores (n, N) by the sum of heads over explicitly projected tables."""
    heads = net.item_scores
    if not heads.modalities:
        return (hidden @ heads.target_table.T)[:, 1:]
    weights = heads.gate()
    scores = weights[:, 0] * (hidden @ heads.target_table.T)
    for source, name in enumerate(heads.modalities, start=1):
        table = heads.projections[name](heads.vectors_of(name))
        scores = scores + weights[:, source] * (hidden @ table.T)
    return scores[:, 1:]


def gradients(net, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
