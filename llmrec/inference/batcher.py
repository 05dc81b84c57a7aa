"""Requests for recommendations that arrive together, answered in one forward pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from llmrec.errors import DataError, LlmrecError
from llmrec.inference.recommender import Recommendation, Recommender, UnknownItemError

logger = logging.getLogger("llmrec")

MAX_HISTORIES = 256
MAX_HISTORY = 2000
MAX_K = 1000
MAX_WAITING = 1024
"""Most requests that wait; more are told to come back (503)."""
MOST_TOGETHER = 64
"""Histories answered in one forward pass."""
MOST_ITEMS = 8192
"""Items of their histories, likewise; one history is never cut."""

MAX_ID = 2048
"""Characters of an item id; some are addresses."""

ItemId = Annotated[StrictStr, Field(max_length=MAX_ID)]
History = Annotated[list[ItemId], Field(max_length=MAX_HISTORY)]


LOOK_SECONDS = 1.0
"""Between looks whether who asked is still there."""


class CrowdedError(LlmrecError):
    """More requests wait than may."""


class GoneError(LlmrecError):
    """Who asked has not waited for the answer."""


async def never() -> bool:
    return False


class Ask(BaseModel):
    """What to recommend for."""

    model_config = ConfigDict(extra="forbid")

    histories: Annotated[list[History], Field(min_length=1, max_length=MAX_HISTORIES)]
    k: Annotated[StrictInt, Field(ge=1, le=MAX_K)] = 10
    exclude_seen: StrictBool = True
    candidates: Annotated[list[ItemId], Field(min_length=1, max_length=100_000)] | None = None
    skip_unknown: StrictBool = False
    explain: StrictBool = False
    model: Literal["first", "second"] = "first"


@dataclass
class Job:
    """A request on its way through the model."""

    ask: Ask
    done: asyncio.Future

    @property
    def size(self) -> tuple[int, int]:
        """Histories, and items in them."""
        return len(self.ask.histories), sum(map(len, self.ask.histories))


@dataclass
class Numbers:
    """What /metrics tells."""

    started: float = field(default_factory=time.time)
    requests: Counter = field(default_factory=Counter)
    histories: int = 0
    passes: int = 0
    seconds: deque = field(default_factory=lambda: deque(maxlen=10_000))


class Batcher:
    """Collects requests that wait and answers them together, one forward pass at a time, in a thread.

    Args:
        models: recommenders by name.
        numbers: counted into.
    """

    def __init__(self, models: dict[str, Recommender], numbers: Numbers) -> None:
        self.models = models
        self.numbers = numbers
        self.waiting: asyncio.Queue[Job] = asyncio.Queue(MAX_WAITING)

    async def answer(
        self, ask: Ask, gone: Callable[[], Awaitable[bool]] = never
    ) -> list[list[Recommendation]]:
        """What the model recommends. A large request is answered in slices, between which others have theirs.

        Args:
            ask: what is asked.
            gone: whether who asked is no longer there; then what waits is not computed.

        Raises:
            CrowdedError: too many wait.
            GoneError: nobody waits for the answer.
            UnknownItemError: by its place in the whole request.
            DataError: another mistake of the request.
        """
        found: list[list[Recommendation]] = []
        for part in slices(ask.histories):
            job = Job(ask.model_copy(update={"histories": part}), asyncio.get_running_loop().create_future())
            try:
                self.waiting.put_nowait(job)
            except asyncio.QueueFull:
                raise CrowdedError("too many requests are waiting; try again soon") from None
            try:
                found += await self.result(job, gone)
            except UnknownItemError as error:
                if error.place is None:
                    raise
                place = len(found) + error.place
                raise UnknownItemError(f"histories[{place}]", place, error.reason) from None
        return found

    async def result(self, job: Job, gone: Callable[[], Awaitable[bool]]) -> list[list[Recommendation]]:
        """What a job came to, while somebody waits for it."""
        try:
            while not job.done.done():
                await asyncio.wait([job.done], timeout=LOOK_SECONDS)
                if not job.done.done() and await gone():
                    raise GoneError("nobody waits for the answer")
        finally:
            job.done.cancel()  # which does nothing to one that is done
        return job.done.result()

    async def work(self) -> None:
        """Answer for ever."""
        while True:
            jobs = [await self.waiting.get()]
            together, items = jobs[0].size
            while not self.waiting.empty() and together < MOST_TOGETHER and items < MOST_ITEMS:
                jobs.append(self.waiting.get_nowait())
                together, items = together + jobs[-1].size[0], items + jobs[-1].size[1]
            jobs = [job for job in jobs if not job.done.cancelled()]
            # A request that fails in a way nobody foresaw must not end the loop.
            (failed,) = await asyncio.gather(asyncio.to_thread(self.run, jobs), return_exceptions=True)
            if failed is not None:
                logger.error("serve: a request failed: %s: %s", type(failed).__name__, failed)
                for job in jobs:
                    self.finish(job, error=failed)

    def run(self, jobs: list[Job]) -> None:
        """One forward pass for all jobs that ask for the same thing."""
        groups: dict[Any, list[Job]] = {}
        for job in jobs:
            ask = job.ask
            candidates = None if ask.candidates is None else tuple(ask.candidates)
            key = (ask.model, ask.k, ask.exclude_seen, candidates, ask.skip_unknown, ask.explain)
            groups.setdefault(key, []).append(job)
        for (model, k, exclude_seen, candidates, skip, explain), group in groups.items():
            options = {"exclude_seen": exclude_seen, "candidates": candidates, "explain": explain}
            options["unknown"] = "skip" if skip else "error"
            histories = [history for job in group for history in job.ask.histories]
            try:
                found = self.models[model].recommend(histories, k, **options)
            except DataError:
                # One of them is wrong: each by itself, so that only that one hears of it.
                for job in group:
                    try:
                        found = self.models[model].recommend(job.ask.histories, k, **options)
                    except DataError as error:
                        self.finish(job, error=error)
                    else:
                        self.count(len(found))
                        self.finish(job, found)
                continue
            self.count(len(histories))
            for job in group:
                self.finish(job, found[: len(job.ask.histories)])
                found = found[len(job.ask.histories) :]

    def count(self, histories: int) -> None:
        """A forward pass that answered so many histories."""
        self.numbers.passes += 1
        self.numbers.histories += histories

    def finish(
        self, job: Job, result: list[list[Recommendation]] | None = None, error: BaseException | None = None
    ) -> None:
        """Hand the answer to the waiting request, from whatever thread."""

        def tell() -> None:
            if job.done.done():
                return
            if error is not None:
                job.done.set_exception(error)
            else:
                job.done.set_result(result)

        job.done.get_loop().call_soon_threadsafe(tell)


def slices(histories: list[list[str]]) -> Iterator[list[list[str]]]:
    """Parts of a request that go through the model at once."""
    part: list[list[str]] = []
    for history in histories:
        items = sum(map(len, part)) + len(history)
        if part and (len(part) == MOST_TOGETHER or items > MOST_ITEMS):
            yield part
            part = []
        part.append(history)
    yield part
