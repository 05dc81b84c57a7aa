"""The server: right answers, clear refusals, requests answered together, nothing that breaks it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn

from llmrec.inference import batcher
from llmrec.inference.recommender import Recommender
from llmrec.inference.server import MAX_BODY, application, find_pictures


@pytest.fixture(scope="module")
def recommender(packaged) -> Recommender:
    return Recommender.from_pretrained(packaged)


@pytest.fixture(scope="module")
def pictures(finished) -> Path:
    return finished / "prepare_data" / "images"


class Running(threading.Thread):
    """uvicorn in a thread, on a free port of this machine."""

    def __init__(self, app, patience: int | None = None) -> None:
        super().__init__(daemon=True)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        config.timeout_graceful_shutdown = patience
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        self.server.run()

    def __enter__(self) -> str:
        self.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.join(20)
        assert not self.is_alive(), "it stops when asked"


@pytest.fixture(scope="module")
def address(recommender, pictures):
    app = application({"first": recommender, "second": recommender}, images=pictures)
    with Running(app) as address:
        yield address


def ask(address, **body):
    return httpx.post(f"{address}/recommend", json=body)


def test_answers_are_the_recommenders(address, recommender):
    asked = [recommender.raw_ids[:3], [], recommender.raw_ids[4:6]]
    found = ask(address, histories=asked, k=4, explain=True).json()["results"]
    expected = recommender.recommend(asked, k=4, explain=True)
    for items, rows in zip(expected, found):
        assert [row["item_id"] for row in rows] == [item.item_id for item in items]
        assert [row["score"] for row in rows] == pytest.approx([item.score for item in items], abs=1e-4)
        assert rows[0]["parts"].keys() == items[0].parts.keys() and rows[0]["picture"] is True


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "the body is not JSON: Expecting property name"),
        (b'{"histories": [["P01"]', 422, "Expecting ',' delimiter (character 22)"),
        (b"[]", 422, "the body must be JSON, as"),
        (b"", 422, "the body must be JSON, as"),
        (b"\xff\xfe", 422, ""),
        (b"[" * 200_000, 422, "the body is no JSON that can be read"),
        (b'{"histories": [[]], "k": ' + b"9" * 6000 + b"}", 422, "the body is no JSON that can be read"),
        ({}, 422, "histories: Field required"),
        ({"histories": "x"}, 422, "histories: Input should be a valid list"),
        ({"histories": []}, 422, "at least 1"),
        ({"histories": [[], ["gone"]]}, 422, "histories[1]: 'gone' is not in the catalogue"),
        ({"histories": [["gone"]]}, 422, '; "skip_unknown": true leaves such ids out'),
        ({"histories": [[3]]}, 422, "valid string"),
        ({"histories": [["https://shop.example/" + "x" * 500]]}, 422, "is not in the catalogue"),
        ({"histories": [["x" * 3000]]}, 422, "at most 2048"),
        ({"histories": [["P01"] * 3000]}, 422, "at most 2000"),
        ({"histories": [[]] * 300}, 422, "at most 256"),
        ({"histories": [[]], "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ({"histories": [[]], "k": 10**9}, 422, "k: Input should be less than or equal to 1000"),
        ({"histories": [[]], "k": "10"}, 422, "k: Input should be a valid integer"),
        ({"histories": [[]], "k": 1.5}, 422, "k: "),
        ({"histories": [[]], "exclude_seen": "yes"}, 422, "exclude_seen"),
        ({"histories": [[]], "model": "third"}, 422, "model"),
        ({"histories": [[]], "extra": 1}, 422, "extra"),
        ({"histories": [[]], "extra" * 10_000: 1}, 422, "Extra inputs are not permitted"),
        ({"histories": [[]], "candidates": []}, 422, "candidates"),
        (b"0" * (MAX_BODY + 1), 413, "larger than"),
        (b"0" * (10 * MAX_BODY), 413, "larger than"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_are_told_so(body, status, message, address):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    before = httpx.get(f"{address}/about").json()
    try:
        found = httpx.post(
            f"{address}/recommend", content=content, headers={"Content-Type": "application/json"}
        )
    except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        assert status == 413, "only a body that is refused unread may end with a closed connection"
    else:
        assert found.status_code == status, found.text
        assert message in found.json()["detail"] and len(found.text) < 2000
    assert httpx.get(f"{address}/about").json() == before


def test_a_body_without_a_length_is_limited_too(address):
    def endless():
        for _ in range(20):
            yield b" " * (MAX_BODY // 8)

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        found = httpx.post(f"{address}/recommend", content=endless())
        assert (found.status_code, found.json()["detail"]) == (413, "the body is larger than 1,048,576 bytes")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_body_of_another_type_is_told_which_it_must_be(address):
    for header in ({}, {"Content-Type": "text/plain"}):
        found = httpx.post(f"{address}/recommend", content=b'{"histories": [[]]}', headers=header)
        assert found.status_code == 422 and "Content-Type: application/json" in found.json()["detail"]


def test_items_are_searched_and_pictures_served(address, recommender):
    found = httpx.get(f"{address}/items", params={"q": "", "limit": 5}).json()["items"]
    counts = dict(zip(recommender.raw_ids, recommender.package.items["train_count"].to_pylist()))
    assert [counts[item["item_id"]] for item in found] == sorted(counts.values(), reverse=True)[:5]
    title = recommender.titles[0]
    found = httpx.get(f"{address}/items", params={"q": title.upper()}).json()["items"]
    assert recommender.raw_ids[0] in [item["item_id"] for item in found]
    image = httpx.get(f"{address}/picture", params={"item_id": recommender.raw_ids[0]})
    assert image.status_code == 200 and image.headers["content-type"].startswith("image/")
    for bad in ("nothing", "../manifest", "/etc/passwd", "..%2f..%2fmanifest.json"):
        assert httpx.get(f"{address}/picture", params={"item_id": bad}).status_code == 404
    assert httpx.get(f"{address}/items", params={"limit": 0}).status_code == 422


def test_health_readiness_metrics_and_the_description(address):
    assert httpx.get(f"{address}/ready").json() == {"status": "ready"}
    text = httpx.get(f"{address}/metrics").text
    assert 'llmrec_requests_total{path="/ready",status="200"}' in text and "llmrec_waiting 0" in text
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    assert {"/recommend", "/items", "/health"} <= set(paths)
    page = httpx.get(address)
    assert "What comes next?" in page.text and page.headers["x-content-type-options"] == "nosniff"


def test_head_answers_as_get_would_without_the_body(address):
    picture = {"item_id": httpx.get(f"{address}/items", params={"limit": 1}).json()["items"][0]["item_id"]}
    with httpx.Client() as client:  # one connection, where a body would spoil the next answer
        for path, asked in (("/health", {}), ("/", {}), ("/picture", picture), ("/no/such", {})):
            head, whole = (client.request(verb, address + path, params=asked) for verb in ("HEAD", "GET"))
            assert head.status_code == whole.status_code and not head.content and whole.content
            assert head.headers["content-length"] == str(len(whole.content))
        assert client.head(f"{address}/recommend").status_code == 405


def test_where_a_base_model_lies_is_nobodys_business(recommender, tmp_path, monkeypatch):
    settings = recommender.package.adapter.settings
    for given, told in (
        (str(tmp_path / "llama"), "llama"),
        (str(tmp_path / "gone" / "llama"), "llama"),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
    ):
        (tmp_path / "llama").mkdir(exist_ok=True)
        monkeypatch.setitem(settings, "config", {**settings["config"], "base_model": given})
        with Running(application({"first": recommender})) as address:
            assert httpx.get(f"{address}/about").json()["first"]["base_model"] == told


def test_the_readme_shows_a_body_that_is_answered_and_names_every_route(address, recommender):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (body,) = re.findall(r"^curl \S+/recommend .* -d '(.*)'$", text, flags=re.MULTILINE)
    for name, known in zip(("P001", "P002"), recommender.raw_ids):
        assert name in body
        body = body.replace(name, known)
    found = ask(address, **json.loads(body)).json()["results"]
    assert [len(items) for items in found] == [3] and found[0][0].keys() == {
        "item_id",
        "title",
        "score",
        "picture",
    }
    named = set(re.findall(r"`(GET|POST) (/[\w.]*)", text))
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    there = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    unlisted = {("GET", "/"), ("GET", "/openapi.json"), ("GET", "/docs")}
    assert named == there | unlisted
    assert all(httpx.get(address + path).status_code == 200 for _, path in unlisted)


def test_requests_that_wait_are_answered_in_one_pass(recommender, monkeypatch):
    calls = []
    real = recommender.recommend

    def slow(histories, *rest, **options):
        calls.append(len(histories))
        time.sleep(0.05)
        return real(histories, *rest, **options)

    monkeypatch.setattr(recommender, "recommend", slow)
    expected = {name: real([[name]], 3)[0] for name in recommender.raw_ids[:20]}

    async def many(address):
        async with httpx.AsyncClient() as client:
            answers = await asyncio.gather(
                *(
                    client.post(f"{address}/recommend", json={"histories": [[name]], "k": 3})
                    for name in expected
                ),
                client.post(f"{address}/recommend", json={"histories": [["gone"]], "k": 3}),
            )
        return answers

    with Running(application({"first": recommender})) as address:
        *answers, wrong = asyncio.run(many(address))
        numbers = httpx.get(f"{address}/metrics").text
    for name, answer in zip(expected, answers):
        found = [row["item_id"] for row in answer.json()["results"][0]]
        assert found == [item.item_id for item in expected[name]]
    assert wrong.status_code == 422, "one bad request does not spoil those beside it"
    assert max(calls) > 1 and len(calls) < 60
    assert "llmrec_histories_total 20\n" in numbers, "those beside it are counted, too"


def test_what_requests_ask_for_is_theirs_alone_though_they_are_answered_together(recommender, packaged):
    second = Recommender.from_pretrained(packaged)
    second.add_items([{"item_id": "new", "title": "Plain red drum"}])
    models = {"first": recommender, "second": second}
    ids = recommender.raw_ids
    bodies = [
        *({}, {"k": 4}, {"exclude_seen": False, "k": 96}, {"candidates": ids[2:9]}, {"candidates": ids[3:9]}),
        *({"explain": True}, {"model": "second", "k": 97}, {"skip_unknown": True}),
    ]
    asks = [batcher.Ask(histories=[ids[:3]], **body) for body in bodies]
    asks[-1].histories[0].append("gone")

    async def answered() -> list:
        made = batcher.Batcher(models, batcher.Numbers())
        waiting = asyncio.gather(*map(made.answer, asks))
        await asyncio.sleep(0)  # all of them wait before the first is taken
        worker = asyncio.create_task(made.work())
        found = await waiting
        worker.cancel()
        return found

    for ask, found in zip(asks, asyncio.run(answered())):
        options = {"exclude_seen": ask.exclude_seen, "candidates": ask.candidates, "explain": ask.explain}
        assert found == models[ask.model].recommend(ask.histories, ask.k, unknown="skip", **options), ask


def test_a_pass_takes_so_many_histories_and_items_at_most(recommender, monkeypatch):
    monkeypatch.setattr(batcher, "MOST_ITEMS", 6)
    monkeypatch.setattr(batcher, "MOST_TOGETHER", 4)
    made, sizes = batcher.Batcher({"first": recommender}, batcher.Numbers()), []
    real = made.run
    ids = recommender.raw_ids

    def run(jobs: list[batcher.Job]) -> None:
        sizes.append([sum(job.size[1] for job in jobs), len(jobs)])
        real(jobs)

    monkeypatch.setattr(made, "run", run)

    async def answered() -> None:
        lengths = [3, 3, 3, 3, 0, 0, 0, 0, 0]
        waiting = asyncio.gather(*(made.answer(batcher.Ask(histories=[ids[:length]])) for length in lengths))
        await asyncio.sleep(0)
        worker = asyncio.create_task(made.work())
        await waiting
        worker.cancel()

    asyncio.run(answered())
    assert sizes == [[6, 2], [6, 2], [0, 4], [0, 1]]


def test_nothing_is_computed_for_who_has_gone(recommender, monkeypatch):
    """What waits is dropped, and of a request in several slices those that are left."""
    monkeypatch.setattr(batcher, "MOST_TOGETHER", 1)
    monkeypatch.setattr(batcher, "LOOK_SECONDS", 0.02)
    calls, hold = [], threading.Event()

    def slow(histories, *_, **__):
        calls.append(histories)
        hold.wait(10)
        return [[] for _ in histories]

    monkeypatch.setattr(recommender, "recommend", slow)
    first, second = ({"histories": [[name]] * 3} for name in recommender.raw_ids[:2])
    with Running(application({"first": recommender})) as address:
        for body in (first, second):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/recommend", json=body, timeout=0.2)
        for _ in range(200):
            if 'path="/recommend",status="499"} 2' in httpx.get(f"{address}/metrics").text:
                break
            time.sleep(0.02)
        hold.set()
        assert ask(address, histories=[[]]).json() == {"results": [[]]}
    assert calls == [first["histories"][:1], [[]]]


def test_who_still_waits_when_the_server_stops_is_told_so(recommender, monkeypatch, caplog):
    began, hold = threading.Event(), threading.Event()

    def slow(histories, *_, **__):
        began.set()
        hold.wait(10)
        return [[] for _ in histories]

    monkeypatch.setattr(recommender, "recommend", slow)
    with ThreadPoolExecutor(1) as pool:
        with Running(application({"first": recommender}), patience=1) as address:
            answer = pool.submit(ask, address, histories=[[]])
            assert began.wait(10)
            threading.Timer(2, hold.set).start()
        assert answer.result().status_code == 503
        assert answer.result().json() == {"detail": "the server is being stopped"}
    assert "Exception in ASGI application" not in caplog.text


def test_too_many_requests_are_told_to_come_back(recommender, monkeypatch):
    monkeypatch.setattr(batcher, "MAX_WAITING", 1)
    monkeypatch.setattr(batcher, "MOST_TOGETHER", 1)
    real = recommender.recommend
    monkeypatch.setattr(recommender, "recommend", lambda *a, **o: (time.sleep(0.3), real(*a, **o))[1])

    async def many(address):
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"histories": [[]], "k": 1}
            return await asyncio.gather(*(client.post(f"{address}/recommend", json=body) for _ in range(8)))

    with Running(application({"first": recommender})) as address:
        statuses = [answer.status_code for answer in asyncio.run(many(address))]
    assert set(statuses) == {200, 503}


def test_a_server_at_which_no_more_may_wait_is_not_ready(recommender, monkeypatch):
    monkeypatch.setattr(batcher, "MAX_WAITING", 1)
    not_started = httpx.ASGITransport(application({"first": recommender}))  # so nothing is answered

    async def asked() -> list[int]:
        async with httpx.AsyncClient(transport=not_started, base_url="http://server") as client:
            found = [(await client.get("/ready")).status_code]
            waits = asyncio.create_task(client.post("/recommend", json={"histories": [[]]}))
            await asyncio.sleep(0.2)
            found.append((await client.get("/ready")).status_code)
            waits.cancel()
            return found

    assert asyncio.run(asked()) == [200, 503]


def test_an_error_nobody_foresaw_ends_one_request_and_not_the_server(recommender, monkeypatch):
    real = recommender.recommend
    broken = {"once": True}

    def failing(*arguments, **options):
        if broken.pop("once", False):
            raise RuntimeError("out of luck")
        return real(*arguments, **options)

    monkeypatch.setattr(recommender, "recommend", failing)
    with Running(application({"first": recommender})) as address:
        assert ask(address, histories=[[]]).status_code == 500
        assert ask(address, histories=[[]]).status_code == 200


def test_large_requests_are_answered_in_slices_and_mistakes_keep_their_place(recommender, monkeypatch):
    calls = []
    real = recommender.recommend
    monkeypatch.setattr(
        recommender,
        "recommend",
        lambda histories, *a, **o: (calls.append(histories), real(histories, *a, **o))[1],
    )
    monkeypatch.setattr(batcher, "MOST_ITEMS", 6)
    monkeypatch.setattr(batcher, "MOST_TOGETHER", 4)
    ids = recommender.raw_ids
    histories = [ids[:3], ids[3:6], ids[:1], [], [], [], [], ids[:9], ids[2:4]]
    expected = real(histories, 2)
    with Running(application({"first": recommender})) as address:
        found = ask(address, histories=histories, k=2).json()["results"]
        wrong = ask(address, histories=[*histories, ["gone"]], k=2)
    assert [[row["item_id"] for row in rows] for rows in found] == [
        [item.item_id for item in items] for items in expected
    ]
    assert calls[:4] == [histories[:2], histories[2:6], histories[6:7], histories[7:8]]
    assert calls[4] == histories[8:]
    assert wrong.status_code == 422 and wrong.json()["detail"].startswith("histories[9]: 'gone' is not in")


def test_a_folder_without_a_picture_of_any_item_is_told_of(recommender, tmp_path, caplog):
    (tmp_path / "cover.png").write_bytes(b"x")
    application({"first": recommender}, images=tmp_path)
    assert f"no file in {tmp_path} is named by item id, as {recommender.raw_ids[0]}.jpg is" in caplog.text
    caplog.clear()
    (tmp_path / f"{recommender.raw_ids[0]}.png").write_bytes(b"x")
    application({"first": recommender}, images=tmp_path)
    assert "named by item id" not in caplog.text


def test_a_link_in_the_folder_of_pictures_is_not_followed(recommender, tmp_path):
    folder, name = tmp_path / "pictures", recommender.raw_ids[0]
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (folder / f"{name}.png").symlink_to(tmp_path / "secret")
    assert find_pictures(recommender, folder) == {}


def test_pictures_that_are_gone_and_errors_are_counted_for_what_they_are(recommender, tmp_path, monkeypatch):
    name = recommender.raw_ids[0]
    (tmp_path / f"{name}.png").write_bytes(b"x")
    with Running(application({"first": recommender}, images=tmp_path)) as address:
        (tmp_path / f"{name}.png").unlink()
        assert httpx.get(f"{address}/picture", params={"item_id": name}).status_code == 404
        monkeypatch.setattr(recommender, "recommend", lambda *_, **__: 1 / 0)
        assert ask(address, histories=[[name]]).status_code == 500
        text = httpx.get(f"{address}/metrics").text
    assert 'llmrec_requests_total{path="/recommend",status="500"} 1' in text
    assert 'llmrec_requests_total{path="other",status="404"} 1' in text
