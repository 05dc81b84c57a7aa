"""How fast a recommender answers, and how it bears a crowd.

    python tools/benchmark_inference.py latency --items 12000
    python tools/benchmark_inference.py load --seconds 60

latency: one user at a time (p50, p95), 64 users together, and both against the plain way in the same run: the
whole prompt through the base model, and every score source projected for the whole catalogue. load: many
clients against the HTTP server on this machine, some of what they send being wrong. Random weights of the
given shape, or a package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec import arguments, machine
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.console import guarded, set_up_logging, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig, MiniConfig

if TYPE_CHECKING:
    from llmrec.inference.package import Package
    from llmrec.inference.recommender import Recommender

LEVELS, CODES = 4, 256
TOGETHER = 64
"""Users asked about in one call."""
SHAPE = {
    "items": (12_000, "N"),
    "width": (128, "H of the mini base model, a multiple of 8"),
    "layers": (2, "its blocks"),
    "content_width": (1280, "of text and image vectors"),
}
"""Of the random weights: default and meaning."""
PATIENCE = 30.0
"""Seconds that a client waits for an answer."""
GRACE = 5
"""Seconds that the server gives the last requests when it is to end."""


def random_package(options: argparse.Namespace) -> Package:
    """A recommender of random weights: mini base, three modalities."""
    import pyarrow as pa
    import torch

    from llmrec.finetune import base_model, build
    from llmrec.finetune.adapter import Adapter
    from llmrec.finetune.scoring import heads_of
    from llmrec.inference.package import Package

    rng, rows = np.random.default_rng(0), options.items + 1
    torch.manual_seed(0)
    widths = {"collab": 64, "text": options.content_width, "image": options.content_width}
    vectors = {name: rng.standard_normal((rows, width), np.float32) for name, width in widths.items()}
    for table in vectors.values():
        table[0] = 0
    mini = MiniConfig(
        hidden_size=options.width, num_layers=options.layers, intermediate_size=2 * options.width
    )
    config = FinetuneConfig(mini=mini, fusion_temperature=1.0)
    prompt = base_model.load_prompt(config)
    base: Any = base_model.load_base(config, prompt)
    ids = SemanticIds(
        catalog="random",
        codes={name: rng.integers(0, CODES, (rows, LEVELS)) for name in vectors},
        codebooks={name: rng.standard_normal((LEVELS, CODES, options.width), np.float32) for name in vectors},
    )
    count = torch.from_numpy(rng.integers(0, 100, rows))
    count[0] = 0
    model = build.build_model(config, base, prompt, vectors, ids, count, torch.device("cpu"))
    names = [f"i{number}" for number in range(1, rows)]
    return Package(
        items=pa.table({"raw_id": names, "title": names, "train_count": count[1:].numpy()}),
        adapter=Adapter(
            catalog="random",
            settings=build.settings_of(config, prompt, base),
            heads={name: value.detach() for name, value in heads_of(model).items()} | {"train_count": count},
            base=dict(base.state_dict()),
            base_config=base.config.to_dict(),
        ),
        collab=CollabEmbeddings(catalog="random", provider="precomputed", vectors=vectors["collab"]),
        content=ContentEmbeddings(
            catalog="random",
            vectors={name: vectors[name] for name in ("text", "image")},
            missing={name: np.zeros(rows, dtype=bool) for name in ("text", "image")},
            encoders={name: {"encoder": "precomputed", "missing": "zero"} for name in ("text", "image")},
        ),
        ids=ids,
        data={},
        evaluation={},
    )


def made(options: argparse.Namespace) -> Recommender:
    """The recommender that the command line asks for."""
    from llmrec.inference.package import load_package
    from llmrec.inference.recommender import Recommender

    package = load_package(Path(options.package)) if options.package else random_package(options)
    return Recommender(package, "cpu" if options.cpu else None)


def histories_of(recommender: Recommender, number: int, length: int) -> list[list[str]]:
    rng = np.random.default_rng(1)
    sizes = np.clip(rng.geometric(1 / length, number), 1, 200)
    return [
        [recommender.raw_ids[i] for i in rng.integers(0, len(recommender.raw_ids), size)] for size in sizes
    ]


def plain(recommender: Recommender, history: list[str], k: int) -> list[str]:
    """One whole prompt, and every score source projected for the whole catalogue."""
    import torch

    with torch.no_grad():
        model = recommender.model
        numbers = torch.tensor([recommender.number[name] for name in history], device=recommender.device)
        embed, heads = model.base.get_input_embeddings(), model.item_scores
        prompt = torch.cat([embed(model.instruction), model.item_tokens(numbers), embed(model.response)])
        hidden = model.base(inputs_embeds=prompt[None], use_cache=False).last_hidden_state[0, -1]
        weights = heads.gate()
        scores = weights[:, 0] * (heads.target_table @ hidden)
        for source, name in enumerate(heads.modalities, start=1):
            table = heads.projections[name](heads.vectors_of(name))
            scores = scores + weights[:, source] * (table @ hidden)
        scores[0] = -torch.inf
        scores[numbers] = -torch.inf
    return [recommender.raw_ids[place - 1] for place in scores.topk(k).indices.tolist()]


def latency(options: argparse.Namespace) -> None:
    """Print times of one user and of 64, and the ratio to the plain way."""
    recommender = made(options)
    asked = histories_of(recommender, options.users, options.length)
    items, longest = len(recommender.raw_ids), max(len(set(history)) for history in asked)
    if items < longest + 10:
        raise ConfigError(
            f"{items} items are too few: a history holds {longest}, and 10 others are asked for; have more "
            "--items, or a smaller --length"
        )
    compare_latency(recommender, asked, options)
    print(f"{items:,} items, histories of about {options.length}; {machine.describe()}")


def compare_latency(recommender: Recommender, asked: list[list[str]], options: argparse.Namespace) -> None:
    """Both ways in turn, user by user, and ours for many together."""
    for history in asked[:5]:
        ours = [item.item_id for item in recommender.recommend([history], 10)[0]]
        assert len(set(ours) & set(plain(recommender, history, 10))) >= 9, (
            "both ways must find the same items"
        )
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for history in asked:
        for name in seconds:
            begun = time.perf_counter()
            if name == "ours":
                recommender.recommend([history], 10)
            else:
                plain(recommender, history, 10)
            seconds[name].append(time.perf_counter() - begun)
    for name, taken in seconds.items():
        p50, p95 = np.quantile(taken, [0.5, 0.95]) * 1000
        print(f"{name:6} one user: p50 {p50:.2f} ms, p95 {p95:.2f} ms")
    ratios = np.array(seconds["plain"]) / np.array(seconds["ours"])
    print(f"plain / ours, one user: median {np.median(ratios):.2f}")
    if len(asked) < TOGETHER:
        print(f"{TOGETHER} users together: not measured, as --users is {len(asked)}")
        return
    last = len(asked) - TOGETHER + 1
    groups = [asked[start : start + TOGETHER] for start in range(0, last, TOGETHER)]
    rates = []
    for _ in range(options.rounds):
        for group in groups:
            begun = time.perf_counter()
            recommender.recommend(group, 10)
            rates.append(TOGETHER / (time.perf_counter() - begun))
    rate, alone = np.median(rates), 1 / np.median(seconds["plain"])
    print(f"{TOGETHER} users together: {rate:,.0f} users/s, {rate / alone:.1f} times the plain")


def load(options: argparse.Namespace) -> None:
    """Clients that never rest, for so many seconds."""
    if lacking := [name for name in ("fastapi", "httpx", "uvicorn") if find_spec(name) is None]:
        raise ConfigError(f"load needs {', '.join(lacking)}: pip install {' '.join(lacking)}")
    recommender = made(options)
    crowd = Crowd(histories_of(recommender, 500, options.length), options.seconds)
    print(f"{len(recommender.raw_ids):,} items, asked by {options.clients} clients for {options.seconds} s")
    with served(recommender) as address, crowd.asking(address, options.clients) as clients:
        before = machine.peak_resident_memory()
        for one in clients:
            one.start()
        time.sleep(options.seconds / 2)
        half = machine.peak_resident_memory()
        for one in clients:
            one.join()
        after = machine.peak_resident_memory()
    print(", ".join(f"{kind} {count:,}" for kind, count in sorted(crowd.statuses.items())))
    taken = crowd.taken
    times = "none in time"
    if taken:
        p50, p95 = np.quantile(taken, [0.5, 0.95]) * 1000
        times = f"p50 {p50:.1f} ms, p95 {p95:.1f} ms"
    print(f"{len(taken) / options.seconds:,.0f} right answers/s, {times}")
    print(
        f"peak memory before {before / 2**20:,.0f} MiB, half way {half / 2**20:,.0f}, at the end "
        f"{after / 2**20:,.0f}; clients and server in one process"
    )
    print(machine.describe())


@contextlib.contextmanager
def served(recommender: Recommender) -> Iterator[str]:
    """A server on this machine, at the address, until it is no longer needed."""
    import uvicorn

    from llmrec.inference.server import application

    app = application({"first": recommender})
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=GRACE)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise ConfigError("the server did not start; what is above says why")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


class Crowd:
    """Clients, and what became of their requests.

    Args:
        asked: the histories that they ask about.
        seconds: how long they do.
    """

    def __init__(self, asked: list[list[str]], seconds: int) -> None:
        self.asked = asked
        self.seconds = seconds
        self.wrong = [b"{", b'{"histories": [["?"]]}', b'{"histories": [[]], "k": 0}', b"0" * (2 << 20)]
        self.statuses: Counter[str] = Counter()
        self.taken: list[float] = []
        """Seconds of every right request that was answered with 200."""
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.until = 0.0

    @contextlib.contextmanager
    def asking(self, address: str, number: int) -> Iterator[list[threading.Thread]]:
        """The clients, who stop by themselves in the end, and at once if something interrupts."""
        self.until = time.monotonic() + self.seconds
        try:
            numbers = range(number)
            yield [threading.Thread(target=self.client, args=(address, one), daemon=True) for one in numbers]
        finally:
            self.stop.set()

    def client(self, address: str, number: int) -> None:
        import httpx

        turn = number
        with httpx.Client(timeout=PATIENCE, headers={"Content-Type": "application/json"}) as session:
            while time.monotonic() < self.until and not self.stop.is_set():
                turn += 1
                bad = turn % 10 == 0
                history = self.asked[turn * 7 % len(self.asked)]
                body = self.wrong[turn // 10 % len(self.wrong)] if bad else json.dumps(
                    {"histories": [history], "k": 10}
                ).encode()  # fmt: skip
                self.ask(partial(session.post, f"{address}/recommend", content=body), bad)

    def ask(self, post: Callable[[], Any], bad: bool) -> None:
        """Send one request and count what comes of it; one that fails must not silence the client."""
        import httpx

        begun = time.perf_counter()
        try:
            status = post().status_code
            kind = f"{'wrong' if bad else 'right'}: {status}"
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            status, kind = None, "wrong: closed" if bad else "right: broken off"
        except httpx.TransportError as error:
            status, kind = None, f"{'wrong' if bad else 'right'}: {type(error).__name__}"
        took = time.perf_counter() - begun
        with self.lock:
            self.statuses[kind] += 1
            if not bad and status == 200:
                self.taken.append(took)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    show_lines_at_once()
    raise SystemExit(guarded(lambda: measure(options)))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; the shape of random weights is refused beside a package, which has its own."""
    made = parser()
    options = made.parse_args(arguments)
    given = [name for name in SHAPE if getattr(options, name) is not None]
    if options.package and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        made.error(f"{names}: of random weights, so without effect on --package; leave one of them out")
    for name, (default, _) in SHAPE.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def parser() -> argparse.ArgumentParser:
    made, verb = arguments.with_verbs(__doc__)
    one_by_one = verb("latency", "time of one user and of 64 together, against the plain way")
    crowded = verb("load", "many clients against the HTTP server on this machine, some of them wrong")
    for one in (one_by_one, crowded):
        one.add_argument(
            "--package", metavar="DIR", help="a packaged recommender, in place of random weights (none)"
        )
        for name, (default, text) in SHAPE.items():
            one.add_argument(
                f"--{name.replace('_', '-')}", type=arguments.positive, metavar="N",
                help=f"{text}, of random weights ({default:,})",
            )  # fmt: skip
        arguments.add_count(one, "--length", 9, "mean items of a history")
        one.add_argument("--cpu", action="store_true", help="on the CPU although there is a GPU (no)")
    arguments.add_count(one_by_one, "--users", 256, f"histories asked about; {TOGETHER} for all figures")
    arguments.add_count(one_by_one, "--rounds", 5, f"passes over them, {TOGETHER} together")
    arguments.add_count(crowded, "--seconds", 60, "how long clients send requests")
    arguments.add_count(crowded, "--clients", 16, "of them at a time")
    return made


def measure(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    set_up_logging()
    {"latency": latency, "load": load}[options.verb](options)


if __name__ == "__main__":
    main()
