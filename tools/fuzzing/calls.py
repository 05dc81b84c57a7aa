"""Settings, the Python API and the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzzing.changes import VALUES, Change, Target, anything
from llmrec.config import flatten
from llmrec.errors import LlmrecError
from llmrec.inference.recommender import Recommender
from llmrec.recipe import Recipe, apply_overrides, format_value, with_preset

PLACES = ("/items", "/picture?item_id=", "/", "/recommend", "/metrics", "/health")
"""Places of the server that are asked for."""


def targets(packaged: Path) -> Iterator[Target]:
    """Settings, the Python API and the server."""
    defaults = dict(flatten(Recipe()))
    paths = list(defaults)
    pieces = [part for path in paths for part in path.split(".")]

    def settings_case(change: Change) -> None:
        rng, chosen = change.rng, []
        if change.nothing:
            return
        for _ in range(rng.integers(1, 4)):
            path = paths[rng.integers(0, len(paths))]
            if rng.random() < 0.2:
                path = ".".join(pieces[place] for place in rng.integers(0, len(pieces), rng.integers(1, 4)))
            value = VALUES[rng.integers(0, len(VALUES))]
            if path in defaults and rng.random() < 0.4:
                value = format_value(defaults[path])
            chosen.append(f"{path}={value}" if rng.random() < 0.95 else value)
        preset = (None, "paper", "official")[rng.integers(0, 3)]
        apply_overrides(with_preset(Recipe(), preset), chosen)

    yield Target(name="settings", case=settings_case)
    model = Recommender.from_pretrained(packaged)
    names = [*model.raw_ids[:6], "no such item"]

    def recommend_case(change: Change) -> None:
        rng = change.rng
        if change.nothing:
            model.recommend([names[:2]])
            return
        options = {
            name: anything(rng, names)
            for name in ("k", "candidates", "unknown", "exclude_seen", "explain")
            if rng.random() < 0.3
        }
        model.recommend(anything(rng, names), **options)

    yield Target(name="Recommender.recommend", case=recommend_case)
    yield from server_targets(model, names)


def server_targets(model: Recommender, names: list[str]) -> Iterator[Target]:
    """Requests; those that are wrong must be answered with 4xx."""
    try:
        from fastapi.testclient import TestClient

        from llmrec.inference.server import application
    except ImportError:
        return
    client = TestClient(application({"first": model}), raise_server_exceptions=True)
    client.__enter__()
    good = json.dumps({"histories": [names[:3]], "k": 3}).encode()

    def judge(answer: Any) -> None:
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            raise LlmrecError(answer.text)

    def body_case(change: Change) -> None:
        own = change.nothing or change.rng.random() < 0.5
        body = change(good) if own else json.dumps(anything(change.rng, names)).encode()
        judge(client.post("/recommend", content=body, headers={"content-type": "application/json"}))

    def address_case(change: Change) -> None:
        rng = change.rng
        place = "/items" if change.nothing else PLACES[rng.integers(0, len(PLACES))]
        tail = change(b"?q=red&limit=3" if place == "/items" else b"i1")
        shown = [byte for byte in tail if 32 < byte < 127]
        share = 0 if change.nothing else 0.3
        text = "".join(f"%{byte:02x}" if rng.random() < share else chr(byte) for byte in shown)
        judge(client.get(place + text))

    yield Target(name="server: bodies", case=body_case)
    yield Target(name="server: addresses", case=address_case)
