"""TIGER's search timed: strings of one user beside each other, against transformers' beam search.

    python tools/benchmark_search.py --prepare-data runs/x/prepare_data [--users 32] [--beams 50]

Both rank next items for the same users of real data by the same fresh weights, in alternating rounds. The
reference is `generate` with as many beams and a function that allows the codes that go on to an item: every
beam is a row with keys and values of its own. The lists that both find are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec import arguments, distributed, finished, machine
from llmrec.collab.config import TrainCollabConfig
from llmrec.console import guarded, set_up_logging, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.interactions import Interactions

if TYPE_CHECKING:
    from torch import Tensor

    from llmrec.collab.tiger import Tiger

COMPARED = 10
"""Best items of each user that are compared."""


def fresh(num_items: int, beams: int) -> Tiger:
    """TIGER's default form with random codes and weights."""
    import torch

    from llmrec.collab.tiger import Tiger

    torch.manual_seed(0)
    settings = vars(TrainCollabConfig().tiger) | {"content": (), "beams": beams}
    return Tiger(num_items=num_items, **settings).to(distributed.device()).eval()


def of_transformers(model: Tiger) -> Any:
    """The same weights in transformers' class."""
    from transformers import T5ForConditionalGeneration

    config = type(model.encoder.config).from_dict(model.encoder.config.to_dict())
    config.vocab_size = len(model.token.weight)
    config.is_encoder_decoder, config.use_cache = True, True
    config.eos_token_id, config.pad_token_id, config.decoder_start_token_id = None, 0, 0
    theirs: Any = T5ForConditionalGeneration(config)
    blocks = ("encoder", "decoder")
    weights = {name: value for name, value in model.state_dict().items() if name.startswith(blocks)}
    tables = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    theirs.load_state_dict(weights | dict.fromkeys(tables, model.token.weight))
    return theirs.to(model.token.weight.device).eval()


class Strings:
    """All items' strings of tokens, as `generate` asks for them."""

    def __init__(self, model: Tiger) -> None:
        import torch

        self.item_of: dict[tuple[int, ...], int] = {}
        following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for item, string in enumerate(model.tokens(torch.arange(1, len(model.codes))).tolist(), start=1):
            self.item_of[tuple(string)] = item
            for place, code in enumerate(string):
                following[tuple(string[:place])].add(code)
        self.following = {start: sorted(codes) for start, codes in following.items()}

    def allowed(self, _: int, given: Tensor) -> list[int]:
        """Tokens that go on to an item from the start and some tokens."""
        return self.following[tuple(given[1:].tolist())]


def generated(theirs: Any, model: Tiger, strings: Strings, history: Tensor, beams: int) -> list[list[int]]:
    """The best items of every user by transformers' beam search, the best first."""
    from torch.nn import functional as F

    token = F.pad(model.tokens(history).flatten(1), (1, 0), value=1)
    visible = F.pad((history != 0).repeat_interleave(model.places_per_item, dim=1), (1, 0), value=True)
    found = theirs.generate(
        input_ids=token,
        attention_mask=visible.long(),
        num_beams=beams,
        num_return_sequences=COMPARED,
        min_new_tokens=model.places_per_item,
        max_new_tokens=model.places_per_item,
        length_penalty=0.0,
        do_sample=False,
        prefix_allowed_tokens_fn=strings.allowed,
    )
    items = [strings.item_of[tuple(string)] for string in found[:, 1:].tolist()]
    return [items[at : at + COMPARED] for at in range(0, len(items), COMPARED)]


def measure(options: argparse.Namespace) -> None:
    """Time both, and print the ratio."""
    import torch

    from llmrec.data.batches import pad_histories

    set_up_logging()
    if options.beams < COMPARED:
        raise ConfigError(
            f"--beams must be at least {COMPARED}, of which lists are compared, got {options.beams}"
        )
    data = finished.load(Interactions, Path(options.prepare_data))
    model = fresh(data.num_items, options.beams)
    theirs, strings = of_transformers(model), Strings(model)
    targets = data.targets("test")
    chosen = targets.take(np.random.default_rng(0).permutation(len(targets))[: options.users])
    start = np.maximum(chosen.start, chosen.stop - model.max_history)
    item, first, stop = (torch.from_numpy(array) for array in (data.item, start, chosen.stop))
    history = pad_histories(item, first, stop).to(distributed.device())
    seconds: dict[str, list[float]] = {"side by side": [], "a row per string": []}
    lists: dict[str, Any] = {}
    with torch.no_grad():
        for turn in range(options.rounds + 1):
            for name in seconds:
                machine.finish(distributed.device())
                began = time.perf_counter()
                if name == "side by side":
                    lists[name] = model.score(history)[:, 1:].topk(COMPARED).indices.add(1).tolist()
                else:
                    lists[name] = generated(theirs, model, strings, history, options.beams)
                machine.finish(distributed.device())
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name:18}{len(history) / statistics.median(values):10.1f} users per second")
    ratios = [slow / fast for fast, slow in zip(*seconds.values())]
    print(f"ratio: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")
    same = sum(ours == other for ours, other in zip(*lists.values()))
    print(f"equal lists of the best {COMPARED}: {same} of {len(history)} users")
    print(
        f"{options.rounds} rounds; {options.beams} beams, {data.num_items:,} items; "
        f"{machine.describe()}, {torch.get_num_threads()} threads"
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare-data", metavar="DIR", required=True, help="a finished prepare_data folder")
    arguments.add_count(parser, "--users", 32, "users of a round")
    arguments.add_count(parser, "--beams", 50, "strings of codes that are followed")
    arguments.add_count(parser, "--rounds", 3, "alternating rounds, after one that does not count")
    options = parser.parse_args(given)
    show_lines_at_once()
    raise SystemExit(guarded(lambda: measure(options)))


if __name__ == "__main__":
    main()
