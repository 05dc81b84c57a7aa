"""A recommender over HTTP: JSON for programs, one page for people.

Requests that arrive together are answered in one forward pass. What a client sends is checked before it
reaches the model: every mistake of theirs is a 4xx with a sentence, and changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from pathlib import Path, PurePath
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from llmrec import __version__
from llmrec.errors import DataError
from llmrec.inference.batcher import MAX_ID, Ask, Batcher, CrowdedError, GoneError, Numbers
from llmrec.inference.recommender import Recommendation, Recommender, UnknownItemError
from llmrec.pages import environment

logger = logging.getLogger("llmrec")

MAX_BODY = 1 << 20
CLOSED = 499
"""What nginx calls a request whose client closed the connection; it is counted as that."""
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
"""Which browsers heed. They are added here, since behind a middleware function of Starlette's nobody hears
that a client has gone."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Limit:
    """Middleware that refuses bodies over `MAX_BODY` before they are read, counts requests by status, adds
    `HEADERS`, and takes HEAD, which many monitors send, for GET: the web server keeps the body to itself."""

    def __init__(self, app: Any, numbers: Numbers) -> None:
        self.app = app
        self.numbers = numbers

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await Exchange(scope, receive, send, self.numbers).through(self.app)


class Exchange:
    """A request on its way to the application, and the answer on its way back."""

    def __init__(self, scope: dict, receive: Callable, send: Callable, numbers: Numbers) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.numbers = numbers
        self.begun = time.perf_counter()
        size = dict(scope["headers"]).get(b"content-length", b"0")
        self.too_large = not size.isdigit() or int(size) > MAX_BODY
        self.held = 0
        self.answered = False

    async def through(self, app: Callable) -> None:
        """Let the application answer, or refuse the request if it is too large."""
        try:
            if not self.too_large:
                with contextlib.suppress(TooLarge):
                    await app(self.scope, self.read, self.answer_unless_too_large)
        finally:
            if not self.answered and not self.too_large:
                self.count(500)  # an error nobody foresaw is answered further out
        if self.too_large:
            answer = JSONResponse(
                {"detail": f"the body is larger than {MAX_BODY:,} bytes"}, 413, {"Connection": "close"}
            )
            await answer(self.scope, self.receive, self.answer)

    async def read(self) -> dict:
        """The next part of the body.

        Raises:
            TooLarge: with it the body is over the limit, whatever its header said.
        """
        message = await self.receive()
        self.held += len(message.get("body", b""))
        if self.held > MAX_BODY:
            self.too_large = True
            raise TooLarge
        return message

    async def answer_unless_too_large(self, message: MutableMapping[str, Any]) -> None:
        """Send what the application answers, but not that it could not read a body that is too large."""
        if not self.too_large:
            await self.answer(message)

    async def answer(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of an answer, and count the request with the first."""
        if message["type"] == "http.response.start":
            self.answered = True
            self.count(message["status"])
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await self.send(message)

    def count(self, status: int) -> None:
        path = self.scope["path"] if self.scope["path"] in COUNTED else "other"
        self.numbers.requests[(path, status)] += 1
        self.numbers.seconds.append(time.perf_counter() - self.begun)


class TooLarge(Exception):
    """The body of a request is over the limit."""


COUNTED = ("/", "/recommend", "/items", "/health", "/ready", "/metrics", "/about")


def application(
    models: dict[str, Recommender], *, images: Path | None = None, names: dict[str, str] | None = None
) -> FastAPI:
    """The web application.

    Args:
        models: 'first', and 'second' to compare with.
        images: folder of pictures named by item id.
        names: what people call the models; None: their methods.
    """
    numbers = Numbers()
    batcher = Batcher(models, numbers)
    first = models["first"]
    pictures = find_pictures(first, images)
    shown = {name: (names or {}).get(name) or model.config["method"] for name, model in models.items()}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        # Requests that are in were answered by now; what is left has no one waiting for it.
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(
        title="llmrec", version=__version__, lifespan=lifespan,
        description="Next-item recommendations: histories of item ids in, ranked items out.",
    )  # fmt: skip
    app.add_middleware(Limit, numbers=numbers)

    explain_errors(app)
    tell_of_itself(app, batcher, numbers)
    answer_histories(app, batcher, models, pictures)
    show_items(app, first, pictures)
    show_models(app, models, shown, pictures)
    return app


def answer_histories(
    app: FastAPI, batcher: Batcher, models: dict[str, Recommender], pictures: dict[str, Path]
) -> None:
    """What the server is for."""

    @app.post("/recommend")
    async def recommend(ask: Ask, request: Request) -> dict[str, Any]:
        """The best items for every history."""
        if ask.model not in models:
            raise HTTPException(422, f"there is no {ask.model} model here, only {', '.join(models)}")
        try:
            found = await batcher.answer(ask, request.is_disconnected)
        except CrowdedError as error:
            raise HTTPException(503, str(error)) from None
        except GoneError as error:
            raise HTTPException(CLOSED, str(error)) from None
        except asyncio.CancelledError:
            # uvicorn cancels what is left when it stops; unanswered, each would be logged as an error.
            raise HTTPException(503, "the server is being stopped") from None
        except UnknownItemError as error:
            advice = '"skip_unknown": true leaves such ids out'
            raise HTTPException(422, f"{error.where}: {error.reason}; {advice}") from None
        except DataError as error:
            raise HTTPException(422, str(error)) from None
        return {"results": [[as_json(item, pictures) for item in items] for items in found]}


def show_items(app: FastAPI, recommender: Recommender, pictures: dict[str, Path]) -> None:
    """The catalogue, to make histories from."""
    search = Search(recommender)

    @app.get("/items")
    def items(
        q: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=100)] = 24
    ) -> dict[str, Any]:
        """Items whose title or id holds all words; without words, the most popular."""
        found = search.find(q, limit)
        return {
            "items": [
                {
                    "item_id": recommender.raw_ids[n],
                    "title": recommender.titles[n],
                    "picture": recommender.raw_ids[n] in pictures,
                }
                for n in found
            ]
        }

    @app.get("/picture", response_class=FileResponse)
    async def picture(item_id: Annotated[str, Query(max_length=MAX_ID)]) -> FileResponse:
        """An item's picture."""
        if item_id not in pictures or not pictures[item_id].is_file():
            raise HTTPException(404, "no picture of such an item")
        return FileResponse(pictures[item_id], headers={"Cache-Control": "max-age=86400"})


def show_models(
    app: FastAPI, models: dict[str, Recommender], shown: dict[str, str], pictures: dict[str, Path]
) -> None:
    """What answers here, for programs and for people.

    Args:
        app: where this is told.
        models: see `application`.
        shown: what people call them.
        pictures: see `find_pictures`.
    """

    @app.get("/about")
    async def about() -> dict[str, Any]:
        """What answers here."""
        return {
            name: {
                "name": shown[name], "items": len(model.raw_ids), "method": model.config["method"],
                "sources": list(model.sources), "base_model": name_of(model.config["base_model"]),
            }
            for name, model in models.items()
        }  # fmt: skip

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        """The page for people."""
        number = len(models["first"].raw_ids)
        return (
            environment(Path(__file__).parent)
            .get_template("page.html.j2")
            .render(models=shown, version=__version__, items=number, pictures=bool(pictures))
        )


def explain_errors(app: FastAPI) -> None:
    """Say in a sentence what is wrong with a request."""

    @app.exception_handler(RequestValidationError)
    async def misunderstood(_: Request, error: RequestValidationError) -> JSONResponse:
        """Where a request is wrong and why, in a sentence each, without sending it back."""
        return JSONResponse({"detail": "; ".join(map(in_a_sentence, error.errors()[:10]))}, 422)

    @app.exception_handler(400)
    async def unreadable(_: Request, error: Exception) -> JSONResponse:
        """A body that no reader of JSON takes: bytes that are no text, numbers or nests without end."""
        return JSONResponse({"detail": "the body is no JSON that can be read"}, 422)


def tell_of_itself(app: FastAPI, batcher: Batcher, numbers: Numbers) -> None:
    """What machines ask a server."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether requests would be answered now."""
        if batcher.waiting.full():
            raise HTTPException(503, "too many requests are waiting")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts in the text form that Prometheus reads."""
        return Response(exposition(numbers, batcher), media_type="text/plain; version=0.0.4")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        """Browsers ask for one; there is none."""
        return Response(status_code=204)


def name_of(base_model: str) -> str:
    """A base model as everybody may know it: of a local folder the name alone, not where it lies."""
    local = PurePath(base_model).is_absolute() or Path(base_model).is_dir()
    return Path(base_model).resolve().name if local else base_model


def in_a_sentence(error: dict[str, Any]) -> str:
    """What is wrong with a request, of one of pydantic's or FastAPI's errors."""
    _, *place = error["loc"]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} (character {place[0]})"
    if not place:
        return 'the body must be JSON, as {"histories": [["ID", "ID"]]}, with Content-Type: application/json'
    return f"{'.'.join(map(str, place)):.80}: {error['msg']}"


def as_json(item: Recommendation, pictures: dict[str, Path]) -> dict[str, Any]:
    made: dict[str, Any] = {"item_id": item.item_id, "title": item.title, "score": item.score}
    made["picture"] = item.item_id in pictures
    if item.parts:
        made["parts"] = item.parts
    return made


def find_pictures(recommender: Recommender, folder: Path | None) -> dict[str, Path]:
    """Pictures by item id; only files that lie in the folder and are named by an item."""
    if folder is None:
        return {}
    known = set(recommender.raw_ids)
    found = {
        path.stem: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in PICTURES and path.stem in known and path.is_file() and not path.is_symlink()
    }
    if not found:
        example = f"{recommender.raw_ids[0]}{PICTURES[0]}"
        logger.warning("no file in %s is named by item id, as %s is; no pictures are shown", folder, example)
    return found


class Search:
    """Items by words of their titles and ids.

    Args:
        recommender: whose items.
    """

    def __init__(self, recommender: Recommender) -> None:
        self.texts = [
            f"{title or ''} {name}".lower() for title, name in zip(recommender.titles, recommender.raw_ids)
        ]
        counts = recommender.package.items["train_count"].to_pylist()
        self.order = sorted(range(len(self.texts)), key=lambda place: (-counts[place], place))

    def find(self, query: str, limit: int) -> list[int]:
        """Places of the most popular items that hold all words."""
        words = query.lower().split()
        found = []
        for place in self.order:
            if all(word in self.texts[place] for word in words):
                found.append(place)
                if len(found) == limit:
                    break
        return found


def exposition(numbers: Numbers, batcher: Batcher) -> str:
    """Counters as Prometheus reads them."""
    lines = ["# TYPE llmrec_requests_total counter"]
    lines += [
        f'llmrec_requests_total{{path="{path}",status="{status}"}} {count}'
        for (path, status), count in sorted(numbers.requests.items())
    ]
    taken = sorted(numbers.seconds)
    lines.append("# TYPE llmrec_request_seconds summary")
    for share in (0.5, 0.95, 0.99):
        value = taken[min(int(share * len(taken)), len(taken) - 1)] if taken else 0.0
        lines.append(f'llmrec_request_seconds{{quantile="{share}"}} {value:.6f}')
    for name, kind, value in (
        ("llmrec_histories_total", "counter", numbers.histories),
        ("llmrec_forward_passes_total", "counter", numbers.passes),
        ("llmrec_waiting", "gauge", batcher.waiting.qsize()),
        ("llmrec_uptime_seconds", "gauge", round(time.time() - numbers.started, 1)),
    ):
        lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
    return "\n".join(lines) + "\n"
