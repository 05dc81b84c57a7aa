"""What an encoder is, and the loops that feed it: texts by length, pictures decoded ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from llmrec import distributed
from llmrec.errors import DataError
from llmrec.progress import progress


class Encoder(Protocol):
    """Turns texts or pictures into vectors. The loops know nothing else."""

    def prepare(self, inputs: list[Any]) -> list[Any]:
        """One entry per input, with a length: token ids, a pixel array. Pictures: called in threads."""

    def encode(self, batch: list[Any]) -> np.ndarray:
        """Vectors float32 (B, D) of prepared inputs."""

    def describe(self) -> dict[str, Any]:
        """What made the vectors, as JSON: model, revision, pooling, preprocessing, statistics."""


def encode_texts(encoder: Encoder, texts: list[str], batch_size: int) -> np.ndarray:
    """Vectors float32 (n, D) in the order given; batches hold texts of like length, longest first.

    The longest batch comes first so that memory runs out at once or not at all.
    """
    prepared = encoder.prepare(texts)
    order = sorted(range(len(prepared)), key=lambda index: -len(prepared[index]))
    blocks = []
    with progress(None, "encode texts", total=len(texts), unit="text") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            blocks.append(encoder.encode([prepared[index] for index in chosen]))
            bar.update(len(chosen))
    vectors = np.concatenate(blocks)
    unsorted = np.empty_like(vectors)
    unsorted[order] = vectors
    return unsorted


def encode_pictures(
    encoder: Encoder, sources: list[Any], read: Callable[[Any], Any], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of pictures, which are read and prepared by threads ahead of the encoder.

    Args:
        encoder: what turns prepared pictures into vectors.
        sources: what `read` takes, one per picture.
        read: returns a picture, or None for one that counts as missing.
        batch_size: pictures per call of the encoder.

    Returns:
        Vectors float32 (n, D) of the pictures that could be read, in order; which could, bool (n,).
    """

    def load(source: Any) -> Any:
        picture = read(source)
        return None if picture is None else encoder.prepare([picture])[0]

    blocks, waiting = [], []
    present = np.zeros(len(sources), bool)
    with progress(None, "encode pictures", total=len(sources), unit="picture") as bar:
        for index, prepared in enumerate(map_ahead(load, sources, ahead=2 * batch_size)):
            bar.update(1)
            if prepared is None:
                continue
            present[index] = True
            waiting.append(prepared)
            if len(waiting) == batch_size:
                blocks.append(encoder.encode(waiting))
                waiting = []
        if waiting:
            blocks.append(encoder.encode(waiting))
    return np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32), present


def map_ahead(function: Callable[[Any], Any], sources: list[Any], *, ahead: int) -> Iterator[Any]:
    """``map(function, sources)`` in order, computed by threads at most `ahead` entries in advance."""
    executor = ThreadPoolExecutor(min(distributed.num_threads(), 32))
    try:
        running: deque = deque()
        for source in sources:
            running.append(executor.submit(function, source))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def finish(
    vectors: np.ndarray, present: np.ndarray, *, normalise: bool, missing: str, what: str, raw_ids: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Item rows from the vectors of the items that have one.

    Args:
        vectors: float32 (n, D), in item order.
        present: bool (N,), n of them true.
        normalise: scale the vectors to length 1 (before the mean is taken).
        missing: vector of the other items, ``mean`` of these or ``zero``.
        what: for messages.
        raw_ids: for messages.

    Returns:
        float32 (N + 1, D), row 0 zero; missing items bool (N + 1,).
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        first = raw_ids[np.flatnonzero(present)[bad[0]]]
        raise DataError(
            f"{what}: the encoder gave NaN or infinity for {len(bad)} items, the first is {first!r}; try "
            "dtype=float32, or look at that item"
        )
    vectors = vectors.astype(np.float32)
    if normalise:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    rows = np.zeros((len(present) + 1, vectors.shape[1]), np.float32)
    flags = np.concatenate([[False], ~present])
    if missing == "mean":
        rows[flags] = vectors.mean(axis=0, dtype=np.float64)
    rows[1:][present] = vectors
    return rows, flags
