"""What an encoder is, and the loops that feed it: texts by length, pictures decoded ahead."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from llmrec import distributed, launched
from llmrec.encoders.cache import VectorCache
from llmrec.errors import DataError
from llmrec.progress import progress

BLOCK_ROWS = 8192


class Encoder(Protocol):
    """Turns texts or pictures into vectors. The loops know nothing else."""

    def prepare(self, inputs: list[Any]) -> list[Any]:
        """One entry per input, with a length: token ids, a pixel array. Pictures: called in threads."""

    def encode(self, batch: list[Any]) -> np.ndarray:
        """Vectors float32 (B, D) of prepared inputs."""

    def describe(self) -> dict[str, Any]:
        """What made the vectors, as JSON: model, revision, pooling, preprocessing, statistics."""


def encode_texts(
    encoder: Encoder, texts: list[str], batch_size: int, cache: VectorCache | None = None
) -> np.ndarray:
    """Vectors float32 (n, D) in the order given; batches hold texts of like length, longest first.

    The longest batch comes first so that memory runs out at once or not at all. Equal texts are encoded once.
    Processes share the batches, and those that a cache holds are left out; neither changes what a batch
    holds, so the vectors are the same.

    Raises:
        DataError: there are several processes and no folder in which they can share.
    """
    cache = VectorCache(None, {}) if cache is None else cache
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    different = list(dict(zip(keys, texts)).items())
    prepared = encoder.prepare([text for _, text in different])
    order = sorted(range(len(prepared)), key=lambda index: -len(prepared[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with progress(None, "encode texts", total=len(different), unit="text") as bar:
        for number, batch in enumerate(batches):
            names = [different[index][0] for index in batch]
            bar.update(len(batch))
            if is_to_do(number, names, cache):
                cache.add(names, encoder.encode([prepared[index] for index in batch]))
    share(cache)
    return cache.hand_over(keys)


def encode_pictures(
    encoder: Encoder,
    sources: list[Any],
    read: Callable[[Any], Any],
    batch_size: int,
    cache: VectorCache | None = None,
    key: Callable[[Any], str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of pictures, which are read and prepared by threads ahead of the encoder; equal ones once.

    Args:
        encoder: what turns prepared pictures into vectors.
        sources: what `read` takes, one per picture.
        read: returns a picture, or None for one that counts as missing.
        batch_size: pictures per call of the encoder, less those that are missing.
        cache: holds what was encoded before.
        key: hex sha256 of what a picture is made from; needed with a cache.

    Returns:
        Vectors float32 (n, D) of the pictures that could be read, in order; which could, bool (n,).
    """
    cache = VectorCache(None, {}) if cache is None else cache
    if key is None:
        keys = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(len(sources))]
    else:
        hashed = map_ahead(key, sources, ahead=1000)
        keys = list(progress(hashed, "look at pictures", total=len(sources), unit="picture"))
    different = list(dict(zip(keys, sources)).items())
    blocks = [different[start : start + batch_size] for start in range(0, len(different), batch_size)]
    mine = [
        block for number, block in enumerate(blocks) if is_to_do(number, [name for name, _ in block], cache)
    ]
    encode_blocks(encoder, mine, read, cache, ahead=2 * batch_size)
    share(cache)
    present = np.array([name in cache for name in keys], dtype=bool)
    vectors = cache.hand_over([name for name, there in zip(keys, present) if there])
    readable = ~np.isnan(vectors).all(axis=1)
    if not readable.all():
        present[present] = readable
        vectors = vectors[readable]
    return vectors, present


def is_to_do(number: int, names: list[str], cache: VectorCache) -> bool:
    """Whether a batch of these keys, the one of that number, is this process's and not in the cache yet."""
    own = number % launched.world_size() == launched.rank()
    return own and not all(name in cache for name in names)


def encode_blocks(
    encoder: Encoder,
    blocks: list[list[tuple[str, Any]]],
    read: Callable[[Any], Any],
    cache: VectorCache,
    *,
    ahead: int,
) -> None:
    """Add the vectors of pictures to the cache, NaN for those that cannot be read.

    As long as none can be read, it is not known how wide vectors are, and nothing is added.

    Args:
        encoder: what turns prepared pictures into vectors.
        blocks: key and source of each picture, by call of the encoder.
        read: see `encode_pictures`.
        cache: takes the vectors.
        ahead: how many pictures are read and prepared in advance.
    """

    def load(source: Any) -> Any:
        picture = read(source)
        return None if picture is None else encoder.prepare([picture])[0]

    width = None
    absent: list[str] = []
    with progress(None, "encode pictures", total=sum(map(len, blocks)), unit="picture") as bar:
        loaded = map_ahead(load, [source for block in blocks for _, source in block], ahead=ahead)
        for block in blocks:
            prepared = {name: next(loaded) for name, _ in block}
            bar.update(len(block))
            there = {name: picture for name, picture in prepared.items() if picture is not None}
            absent += [name for name in prepared if name not in there]
            if there:
                vectors = encoder.encode(list(there.values()))
                width = vectors.shape[1]
                # NaN stands for a picture that cannot be read; an encoder's own is told by `finish`.
                cache.add(list(there), np.where(np.isnan(vectors), np.float32(np.inf), vectors))
        next(loaded, None)
    if width is not None and absent:  # a picture that cannot be read is remembered as such
        cache.add(absent, np.full((len(absent), width), np.nan, np.float32))


def share(cache: VectorCache) -> None:
    """Hand over what this process encoded, and take in what the others did."""
    cache.flush()
    if launched.world_size() > 1:
        if cache.folder is None:
            raise DataError(
                "several processes need a folder to share vectors in; run the stage by its command"
            )
        distributed.wait()
        cache.read()
        distributed.wait()  # the folder goes with the stage


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
    rows = np.zeros((len(present) + 1, vectors.shape[1]), np.float32)
    rows[1:][present] = vectors
    if normalise:
        # Block by block: tables take gigabytes, and so would a copy.
        for start in range(1, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
    flags = np.concatenate([[False], ~present])
    if missing == "mean" and flags.any():
        rows[flags] = rows[1:].sum(axis=0, dtype=np.float64) / len(vectors)  # the others are zero so far
    return rows, flags
