"""Downloads that resume, check themselves, and never leave a file that looks complete and is not.

Bytes go to NAME.part, beside which NAME.part.json says what they belong to. Only when the size and, where
known, the sha256 agree is the file renamed to its name, so a file with that name is whole. A process that is
killed leaves the part, and the next one goes on from there. One process at a time: another one that wants the
same file waits, and finds it there.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import random
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from urllib3.exceptions import HTTPError

from llmrec import storage
from llmrec.data.web import RefusedError, RetryError, number_of, request, short, shown
from llmrec.errors import DataError
from llmrec.manifest import flush, sha256
from llmrec.progress import progress

logger = logging.getLogger("llmrec")

CHUNK = 1 << 16
SPARE_BYTES = 1 << 26
"""Disk space that must stay free."""

PROGRESS_BYTES = 1 << 20
"""A mirror that cuts has to bring so many bytes more than there ever were to be asked on."""

WAIT_SECONDS = 1.0
"""Between looks at whether another process has fetched a file."""

LEAST_BYTES = 1024
"""A server that sends fewer bytes than this in `timeout_seconds` has stalled."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file, where it can be had, and how to tell that it is whole."""

    name: str
    urls: tuple[str, ...]
    """Mirrors, tried in this order"""
    num_bytes: int | None = None
    """Size, where known"""
    sha256: str | None = None
    """Hash, where known"""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise DataError(f"{self.name!r} is no name of a file")


def download(
    file: RemoteFile,
    folder: Path,
    *,
    offline: bool = False,
    retries: int = 5,
    timeout_seconds: float = 30.0,
    pause_seconds: float = 1.0,
    public_only: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Path of the file in folder, fetched if it is not there.

    A file that is there is checked against size and hash where these are known, and never overwritten.

    Args:
        file: what to fetch.
        folder: where to; made if absent.
        offline: use what is there, or fail.
        retries: rounds over all mirrors after the first that may bring nothing, with growing pauses; one that
            cuts is asked on and on as long as it brings PROGRESS_BYTES more each time.
        timeout_seconds: for connections, for reads, and for LEAST_BYTES to arrive.
        pause_seconds: pause before the first repeat; doubled each time, at most a minute.
        public_only: refuse private addresses, see `web.request`.
        sleep: waits so many seconds.

    Raises:
        DataError: no mirror gave the file, the one that is there is not the right one, or the disk is full.
    """
    path = folder / file.name
    if path.exists():
        check_file(path, file)
        return path
    if offline:
        raise DataError(
            f"{path} is not there and may not be fetched (offline); put it there, from {file.urls[0]}"
        )
    with alone(path, sleep):
        if path.exists():  # now
            check_file(path, file)
            return path
        mirrors, part = list(file.urls), part_of(path)
        reasons: dict[str, str] = {}
        most, failed = size_of(part), 0  # bytes that there ever were; rounds in a row that brought no more
        while True:
            last = ask_mirrors(
                file, path, mirrors, reasons, enough=most + PROGRESS_BYTES,
                timeout_seconds=timeout_seconds, public_only=public_only,
            )  # fmt: skip
            if last.done:
                return path
            most, failed = (size_of(part), 0) if last.grew else (most, failed + 1)
            if not mirrors or failed > retries:
                break
            pause = min(60.0, pause_seconds * 2 ** max(failed - 1, 0)) * random.uniform(0.75, 1.25)
            sleep(max(pause, min(last.wait_seconds, 300.0)))
    raise DataError(
        f"{file.name} could not be fetched: {'; '.join(dict.fromkeys(reasons.values()))}. Run the same "
        f"command again to go on from what has arrived, or put the file at {path} yourself"
    )


@contextlib.contextmanager
def alone(path: Path, sleep: Callable[[float], None]) -> Iterator[None]:
    """Wait until no other process fetches a file, and keep others waiting."""
    lock = path.with_name(f".{path.name}.lock")
    told = False
    while (handle := storage.take(lock)) is None:
        if not told:
            logger.info("another process fetches %s; waiting for it", path)
        told = True
        sleep(WAIT_SECONDS)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


class Round(NamedTuple):
    """What a round over the mirrors brought."""

    done: bool = False
    """The file is there"""
    grew: bool = False
    """Enough of it arrived to ask on, whatever failed before"""
    wait_seconds: float = 0.0
    """Pause that a mirror asked for"""


def ask_mirrors(
    file: RemoteFile,
    path: Path,
    mirrors: list[str],
    reasons: dict[str, str],
    *,
    enough: int,
    timeout_seconds: float,
    public_only: bool,
) -> Round:
    """Ask one mirror after the other, until one gives the file or `enough` of its bytes are here.

    Args:
        file: what to fetch.
        path: where to.
        mirrors: whom to ask; those that refuse for good are taken out.
        reasons: takes in why a mirror did not give the file, by mirror.
        enough: size of a part from which on the round ends, to ask on where bytes came from.
        timeout_seconds: see `download`.
        public_only: see `download`.

    Raises:
        DataError: the disk is full.
    """
    part, told, wait = part_of(path), set(), 0.0
    # First the mirror whose bytes are here: those of another would have to begin anew.
    for url in sorted(mirrors, key=lambda one: one != read_note(part).get("url")):
        try:
            fetch(file, url, path, timeout_seconds, public_only)
            return Round(done=True)
        except RefusedError as error:
            mirrors.remove(url)
            reasons[url] = str(error)
        except RetryError as error:
            reasons[url] = str(error)
            wait = error.wait_seconds if error.wait_seconds is not None else wait
        if reasons[url] not in told:  # http and https fail for one reason where a host has no address
            logger.warning("download of %s: %s", file.name, reasons[url])
        told.add(reasons[url])
        if size_of(part) >= enough:
            return Round(grew=True, wait_seconds=wait)
    return Round(wait_seconds=wait)


def fetch(file: RemoteFile, url: str, path: Path, timeout_seconds: float, public_only: bool) -> None:
    """Fetch the file, or what is left of it, from one mirror, check it and give it its name.

    Raises:
        RefusedError: this mirror has another file, or none.
        RetryError: something that may pass.
        DataError: the disk is full.
    """
    part = part_of(path)
    known = read_note(part)
    have = size_of(part)
    # What came from elsewhere may be continued only if the hash will tell whether it fits.
    if have and not (known.get("url") == url or file.sha256):
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and known.get("url") == url and known.get("validator"):
        headers["If-Range"] = known["validator"]
    with request(url, headers, timeout_seconds=timeout_seconds, public_only=public_only) as response:
        start, total = extent(response)
        if response.status == 416 and have:
            if total != have:  # else all of it is here, and only its name is wanting
                part.unlink()
                raise RetryError(f"{shown(url)}: what has arrived does not fit any more; begin anew")
            finish(file, part, path, total, url, resumed=True)
            return
        if response.status == 416 or start not in (0, have):
            raise RetryError(f"{shown(url)} answers with bytes from {start} on, asked were {have}")
        check_plain(response, path, url)
        if file.num_bytes is not None and total is not None and total != file.num_bytes:
            raise RefusedError(f"{shown(url)} has {total:,} bytes, expected {file.num_bytes:,}")
        check_space(path.parent, (total or file.num_bytes or 0) - start)
        if not start:  # a note must not stand beside bytes that are another mirror's
            part.unlink(missing_ok=True)
        write_note(part, url, validator_of(response.headers))
        receive(response, part, start, total, url, timeout_seconds)
    finish(file, part, path, total, url, resumed=start > 0)


def extent(response: Any) -> tuple[int, int | None]:
    """First byte of the answer's body, and size of the whole file if the server says it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if match is None:
            raise RetryError("an answer in part does not say which part (Content-Range)")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    if response.status == 416:
        return 0, number_of(response.headers.get("Content-Range", "").rpartition("/")[2])
    return 0, number_of(response.headers.get("Content-Length", ""))


def validator_of(headers: Mapping[str, str]) -> str | None:
    """What tells a file from a later one in If-Range, where servers never take a weak ETag for the same."""
    etag, date = headers.get("ETag"), headers.get("Last-Modified")
    return date if etag is None or (etag.startswith("W/") and date) else etag


def check_plain(response: Any, path: Path, url: str) -> None:
    """Raise RefusedError if an answer is packed on top of the file; of a .gz file, that it is a packed one is
    often told as if it were the answer that is packed."""
    packing = response.headers.get("Content-Encoding", "").strip().lower()
    own = path.name.endswith(".gz") and packing in ("gzip", "x-gzip")
    if packing not in ("", "identity") and not own:
        raise RefusedError(f"{shown(url)} packs its answer ({packing}), which it was asked not to do")


def receive(
    response: Any, part: Path, start: int, total: int | None, url: str, timeout_seconds: float
) -> None:
    """Write the body behind the first `start` bytes of part; whatever arrived stays there.

    Raises:
        RetryError: the connection broke, stalled, or brought more than was announced.
        DataError: the disk is full.
    """
    arrived, since = 0, time.monotonic()
    with part.open("r+b" if start else "wb") as out:
        out.seek(start)
        out.truncate()
        with progress(None, part.stem, total=total, unit="B") as bar:
            bar.update(start)
            try:
                # read1 gives what has come, where read would wait for a whole chunk.
                while block := response.read1(CHUNK, decode_content=False):
                    out.write(block)
                    start, arrived = start + len(block), arrived + len(block)
                    bar.update(len(block))
                    if total is not None and start > total:
                        raise RetryError(f"{shown(url)} sent more than the {total:,} bytes it announced")
                    if time.monotonic() - since > timeout_seconds:
                        if arrived < LEAST_BYTES:
                            raise RetryError(f"{shown(url)} stalled after {start:,} bytes")
                        arrived, since = 0, time.monotonic()
            except (HTTPError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                    check_space(part.parent, 1)
                raise RetryError(f"{shown(url)} broke off after {start:,} bytes ({short(error)})") from None
            finally:
                out.flush()
                os.fsync(out.fileno())


def finish(file: RemoteFile, part: Path, path: Path, total: int | None, url: str, *, resumed: bool) -> None:
    """Check what arrived and rename it; a part that is wrong is deleted.

    Raises:
        RetryError: bytes are missing, a packed file is damaged, or the hash is another one where earlier
            bytes may be to blame.
        RefusedError: the hash is another one.
    """
    size = part.stat().st_size
    wanted = file.num_bytes if file.num_bytes is not None else total
    if wanted is not None and size < wanted:
        raise RetryError(f"{shown(url)} broke off after {size:,} of {wanted:,} bytes")
    if wanted is not None and size > wanted:
        part.unlink()
        raise RetryError(f"{shown(url)}: {size:,} bytes arrived, expected {wanted:,}")
    if file.sha256 is not None and sha256(part) != file.sha256:
        part.unlink()
        if resumed:
            raise RetryError(f"{shown(url)}: another content (sha256) than expected behind earlier bytes")
        raise RefusedError(f"{shown(url)} has another content (sha256) than expected")
    if file.sha256 is None and path.name.endswith(".gz") and not whole_gzip(part):
        part.unlink()
        raise RetryError(f"{shown(url)}: the packed file that arrived is damaged")
    os.replace(part, path)
    note_of(part).unlink(missing_ok=True)
    flush(path.parent)
    logger.info("fetched %s, %s bytes%s", path, f"{size:,}", "" if file.sha256 else " (no known sha256)")


def check_file(path: Path, file: RemoteFile) -> None:
    """Raise DataError unless a file that is there is the one that is meant."""
    size = path.stat().st_size
    if file.num_bytes is not None and size != file.num_bytes:
        raise DataError(
            f"{path} has {size:,} bytes, expected {file.num_bytes:,}; delete it to fetch it again"
        )
    if file.sha256 is not None and sha256(path) != file.sha256:
        raise DataError(f"{path} has another content (sha256) than expected; delete it to fetch it again")


def check_space(folder: Path, wanted: int) -> None:
    """Raise DataError unless so many bytes fit on the disk."""
    free = shutil.disk_usage(folder).free
    if wanted > 0 and free < wanted + SPARE_BYTES:
        raise DataError(
            f"{folder}: {wanted / 1e6:,.0f} MB do not fit on the disk, which has {free / 1e6:,.0f} MB left; "
            "free some space and run the same command again"
        )


def whole_gzip(path: Path) -> bool:
    """Whether a packed file unpacks to its end, checksum included."""
    try:
        with gzip.open(path, "rb") as handle:
            while handle.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return True


def part_of(path: Path) -> Path:
    """Where bytes of a file go before all of them are there."""
    return path.with_name(path.name + ".part")


def size_of(part: Path) -> int:
    """Bytes that have arrived."""
    return part.stat().st_size if part.exists() else 0


def note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def read_note(part: Path) -> dict[str, Any]:
    """Where a part came from; nothing if that is not known."""
    try:
        found = json.loads(note_of(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_note(part: Path, url: str, validator: str | None) -> None:
    scratch = part.with_name(part.name + ".json.tmp")
    scratch.write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")
    os.replace(scratch, note_of(part))
