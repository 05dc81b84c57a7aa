"""Pictures of items, fetched from the addresses in an items file; one file per address, one status per item.

A picture is named after its address, checked before it gets that name, and never fetched twice. What failed
for good stands in status.parquet and is not asked for again; what may pass is tried again whenever
prepare_data is computed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from urllib3.exceptions import HTTPError

from llmrec.data.web import RefusedError, RetryError, number_of, request, short
from llmrec.errors import DataError
from llmrec.progress import progress

logger = logging.getLogger("llmrec")

ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp"}
"""Kinds of pictures that are kept, and what their files are called."""

STATUS = "status.parquet"
SCHEMA = pa.schema(
    [
        ("item", pa.string()),
        ("url", pa.string()),
        ("status", pa.string()),
        ("path", pa.string()),
        ("num_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("reason", pa.string()),
    ]
)
SAVE_SECONDS = 30.0
"""How often the status of a long run is written."""


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """What a picture may cost."""

    max_bytes: int = 20_000_000
    """Largest file, in bytes"""
    max_pixels: int = 50_000_000
    """Width times height"""
    retries: int = 2
    """Repeats after a failure that may pass"""
    timeout_seconds: float = 20.0
    """For connections and reads; a whole picture may take five times as long"""
    num_threads: int = 16
    """Pictures fetched at a time"""
    public_only: bool = True
    """Refuse addresses in private networks"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What became of one item's picture."""

    item: str
    url: str
    status: str
    """ok; refused: asking again will not help (not found, no picture, too large, private address); failed:
    it may; offline: not there and not asked for"""
    path: str | None = None
    """File below the folder"""
    num_bytes: int | None = None
    width: int | None = None
    height: int | None = None
    reason: str | None = None


def fetch_pictures(
    wanted: Iterable[tuple[str, str]],
    folder: Path,
    limits: PictureLimits | None = None,
    *,
    offline: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Picture]:
    """Pictures of items, in the order of wanted.

    Args:
        wanted: raw item id and address of each picture.
        folder: pictures are looked up and kept here, with status.parquet.
        limits: see `PictureLimits`.
        offline: look up only.
        sleep: waits so many seconds.

    Raises:
        DataError: status.parquet is damaged.
    """
    limits = limits or PictureLimits()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(wanted)
    earlier = read_status(folder)
    found = look_up(jobs, folder, earlier, offline=offline)
    items_of: dict[str, list[str]] = {}
    for item, url in jobs:
        if (item, url) not in found:
            items_of.setdefault(url, []).append(item)
    saved, lock = time.monotonic(), threading.Lock()
    asked = set(jobs)
    others = [picture for picture in earlier if (picture.item, picture.url) not in asked]

    def save() -> None:
        """Write down what is known, of other data sets with pictures in this folder too."""
        write_status(folder, [*others, *found.values()])

    def fetch(url: str) -> None:
        nonlocal saved
        picture = fetch_picture(url, folder, limits, sleep)
        with lock:
            for item in items_of[url]:
                found[item, url] = replace(picture, item=item)
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()

    pool = ThreadPoolExecutor(limits.num_threads)
    try:
        work = pool.map(fetch, items_of)
        for _ in progress(work, "fetch pictures", total=len(items_of), unit="picture"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        save()
    return [found[job] for job in jobs]


def look_up(
    jobs: list[tuple[str, str]], folder: Path, earlier: list[Picture], *, offline: bool
) -> dict[tuple[str, str], Picture]:
    """What is known of pictures without asking for them, by item and address; the others are to be fetched.

    Args:
        jobs: raw item id and address of each picture.
        folder: where pictures are kept.
        earlier: what earlier runs wrote down, see `read_status`.
        offline: leave none to be fetched.
    """
    before = {picture.url: picture for picture in earlier if picture.status in ("refused", "ok")}
    there = {path.stem: path.name for path in folder.iterdir() if path.suffix in ENDINGS.values()}
    found: dict[tuple[str, str], Picture] = {}
    for item, url in jobs:
        name = there.get(name_of(url))
        if name is not None:
            found[item, url] = kept(item, url, folder / name, before.get(url))
        elif url in before and before[url].status == "refused":
            found[item, url] = Picture(item=item, url=url, status="refused", reason=before[url].reason)
        elif offline:
            found[item, url] = Picture(item=item, url=url, status="offline", reason="not there, offline")
    return found


def fetch_picture(url: str, folder: Path, limits: PictureLimits, sleep: Callable[[float], None]) -> Picture:
    """Fetch one picture and keep it, or say why not."""
    reason = ""
    for attempt in range(limits.retries + 1):
        if attempt:
            sleep(2.0 ** (attempt - 1))
        try:
            content = read_body(url, limits)
            ending, width, height = check_picture(content, limits.max_pixels)
            path = folder / f"{name_of(url)}{ending}"
            write_whole(path, content)
            return Picture(
                item="",
                url=url,
                status="ok",
                path=path.name,
                num_bytes=len(content),
                width=width,
                height=height,
            )
        except RefusedError as error:
            return Picture(item="", url=url, status="refused", reason=str(error))
        except RetryError as error:
            reason = str(error)
            if error.wait_seconds and attempt < limits.retries:
                sleep(min(error.wait_seconds, 60.0))
    return Picture(item="", url=url, status="failed", reason=reason)


def read_body(url: str, limits: PictureLimits) -> bytes:
    """All of a picture's bytes.

    Raises:
        RefusedError: it is larger than allowed.
        RetryError: the connection broke or took too long.
    """
    parts, size, started = [], 0, time.monotonic()
    timeout = limits.timeout_seconds
    with request(url, timeout_seconds=timeout, public_only=limits.public_only) as response:
        if response.status != 200:
            raise RetryError(f"answers {response.status}")
        packed = response.headers.get("Content-Encoding")  # then it is unpacked here, to another length
        announced = None if packed else number_of(response.headers.get("Content-Length", ""))
        if announced is not None and announced > limits.max_bytes:
            raise RefusedError(f"{announced:,} bytes, more than {limits.max_bytes:,}")
        try:
            while block := response.read1(1 << 16):
                parts.append(block)
                size += len(block)
                if size > limits.max_bytes:
                    raise RefusedError(f"more than {limits.max_bytes:,} bytes")
                if time.monotonic() - started > 5 * limits.timeout_seconds:
                    raise RetryError("stalled")
        except (HTTPError, OSError) as error:
            raise RetryError(f"broke off after {size:,} bytes ({short(error)})") from None
    if announced is not None and size < announced:
        raise RetryError(f"broke off after {size:,} of {announced:,} bytes")
    return b"".join(parts)


def check_picture(content: bytes, max_pixels: int) -> tuple[str, int, int]:
    """Ending of the file's name, width and height of a picture that can be read to its end.

    Raises:
        RefusedError: it is no picture of a kind we keep, or too large.
        RetryError: it is cut short.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=list(ENDINGS)) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            if width * height > max_pixels:
                raise RefusedError(f"{width} x {height} pixels, more than {max_pixels:,}")
            kind = image.format
            image.load()
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        if "truncated" in str(error).lower():
            raise RetryError(f"the picture is cut short ({short(error)})") from None
        raise RefusedError(f"no picture that can be read ({short(error)})") from None
    return ENDINGS[kind or ""], width, height


def name_of(url: str) -> str:
    """Name of the file that an address's picture is kept in, without ending."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def kept(item: str, url: str, path: Path, before: Picture | None) -> Picture:
    """A picture that is already there, with the size that was written down when it came."""
    known = before if before and before.status == "ok" else Picture(item=item, url=url, status="ok")
    return replace(known, item=item, path=path.name, num_bytes=path.stat().st_size)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that has its name only once it is whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with scratch.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_status(folder: Path) -> list[Picture]:
    """What earlier runs wrote down; nothing if there was none."""
    if not (folder / STATUS).exists():
        return []
    try:
        rows = pq.read_table(folder / STATUS, schema=SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{folder / STATUS} cannot be read ({short(error)}); delete it") from None
    return [Picture(**row) for row in rows]


def write_status(folder: Path, pictures: list[Picture]) -> None:
    """One row per item."""
    scratch = folder / f".{STATUS}.{os.getpid()}"
    rows = sorted((vars(picture) for picture in pictures), key=lambda row: (row["item"], row["url"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), scratch)
    os.replace(scratch, folder / STATUS)
