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
import json
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import torch

from llmrec import machine
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.finetune import base_model, build
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.finetune.scoring import heads_of
from llmrec.inference.package import Package, load_package
from llmrec.inference.recommender import Recommender

LEVELS, CODES = 4, 256


def random_package(options: argparse.Namespace) -> Package:
    """A recommender of random weights: mini base, three modalities."""
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
    base = base_model.load_base(config, prompt)
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


def histories_of(recommender: Recommender, number: int, length: int) -> list[list[str]]:
    rng = np.random.default_rng(1)
    sizes = np.clip(rng.geometric(1 / length, number), 1, 200)
    return [
        [recommender.raw_ids[i] for i in rng.integers(0, len(recommender.raw_ids), size)] for size in sizes
    ]


@torch.no_grad()
def plain(recommender: Recommender, history: list[str], k: int) -> list[str]:
    """One whole prompt, and every score source projected for the whole catalogue."""
    model = recommender.model
    numbers = torch.tensor([recommender.number[name] for name in history])
    embed, heads = model.base.get_input_embeddings(), model.item_scores
    prompt = torch.cat([embed(model.instruction), model.item_tokens(numbers), embed(model.response)])
    hidden = model.base(inputs_embeds=prompt[None], use_cache=False).last_hidden_state[0, -1]
    weights = heads.gate()
    scores = weights[:, 0] * (heads.target_table @ hidden)
    for source, name in enumerate(heads.modalities, start=1):
        table = heads.projections[name](getattr(heads, f"vectors_{name}"))
        scores = scores + weights[:, source] * (table @ hidden)
    scores[0] = -torch.inf
    scores[numbers] = -torch.inf
    return [recommender.raw_ids[place - 1] for place in scores.topk(k).indices.tolist()]


def latency(options: argparse.Namespace) -> None:
    """Print times of one user and of 64, and the ratio to the plain way."""
    package = load_package(Path(options.package)) if options.package else random_package(options)
    recommender = Recommender(package, "cpu" if options.cpu else None)
    asked = histories_of(recommender, options.users, options.length)
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
    groups = [asked[start : start + 64] for start in range(0, len(asked) - 63, 64)]
    rates = []
    for _ in range(options.rounds):
        for group in groups:
            begun = time.perf_counter()
            recommender.recommend(group, 10)
            rates.append(64 / (time.perf_counter() - begun))
    alone = 1 / np.median(seconds["plain"])
    print(
        f"64 users together: {np.median(rates):,.0f} users/s, {np.median(rates) / alone:.1f} times the plain"
    )
    print(f"{len(recommender.raw_ids):,} items, histories of about {options.length}; {machine.describe()}")


def load(options: argparse.Namespace) -> None:
    """Clients that never rest, for so many seconds."""
    import uvicorn

    from llmrec.inference.server import application

    package = load_package(Path(options.package)) if options.package else random_package(options)
    recommender = Recommender(package, "cpu" if options.cpu else None)
    app = application({"first": recommender})
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    asked = histories_of(recommender, 500, options.length)
    wrong = [b"{", b'{"histories": [["?"]]}', b'{"histories": [[]], "k": 0}', b"0" * (2 << 20)]
    statuses: Counter[str] = Counter()
    taken: list[float] = []
    lock, until = threading.Lock(), time.monotonic() + options.seconds

    def client(number: int) -> None:
        turn = number
        with httpx.Client(timeout=30, headers={"Content-Type": "application/json"}) as session:
            while time.monotonic() < until:
                turn += 1
                bad = turn % 10 == 0
                body = wrong[turn // 10 % len(wrong)] if bad else json.dumps(
                    {"histories": [asked[turn * 7 % len(asked)]], "k": 10}
                ).encode()  # fmt: skip
                begun = time.perf_counter()
                try:
                    answer = session.post(f"{address}/recommend", content=body)
                    kind = f"{'wrong' if bad else 'right'}: {answer.status_code}"
                except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
                    kind = "wrong: closed" if bad else "right: broken off"
                with lock:
                    statuses[kind] += 1
                    if not bad:
                        taken.append(time.perf_counter() - begun)

    before = machine.peak_resident_memory()
    clients = [threading.Thread(target=client, args=(number,)) for number in range(options.clients)]
    for one in clients:
        one.start()
    half = None
    while any(one.is_alive() for one in clients):
        time.sleep(0.2)
        if half is None and time.monotonic() > until - options.seconds / 2:
            half = machine.peak_resident_memory()
    after = machine.peak_resident_memory()
    server.should_exit = True
    thread.join(20)
    p50, p95 = np.quantile(taken, [0.5, 0.95]) * 1000
    print(", ".join(f"{kind} {count:,}" for kind, count in sorted(statuses.items())))
    print(
        f"{options.clients} clients for {options.seconds} s: {len(taken) / options.seconds:,.0f} answers/s, "
        f"p50 {p50:.1f} ms, p95 {p95:.1f} ms"
    )
    middle = before if half is None else half
    print(
        f"peak memory before {before / 2**20:,.0f} MiB, half way {middle / 2**20:,.0f}, at the end "
        f"{after / 2**20:,.0f}; clients and server in one process"
    )
    print(f"{len(recommender.raw_ids):,} items; {machine.describe()}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("latency", "load"):
        made = verbs.add_parser(name)
        made.add_argument(
            "--package", metavar="DIR", help="a packaged recommender, in place of random weights"
        )
        made.add_argument("--items", type=int, default=12_000, help="N")
        made.add_argument("--width", type=int, default=128, help="H of the mini base model")
        made.add_argument("--layers", type=int, default=2, help="its blocks")
        made.add_argument("--content-width", type=int, default=1280, help="of text and image vectors")
        made.add_argument("--length", type=int, default=9, help="mean items of a history")
        made.add_argument("--cpu", action="store_true", help="on the CPU although there is a GPU")
        if name == "latency":
            made.add_argument("--users", type=int, default=256, help="histories that are asked about")
            made.add_argument("--rounds", type=int, default=5, help="passes over them, 64 together")
        else:
            made.add_argument("--seconds", type=float, default=60.0)
            made.add_argument("--clients", type=int, default=16)
    options = parser.parse_args(arguments)
    {"latency": latency, "load": load}[options.verb](options)


if __name__ == "__main__":
    main()
