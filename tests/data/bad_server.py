"""A real HTTP server on this machine that behaves well or badly, as the path says."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """What is served, and what was asked for.

    Paths: /good/NAME (with ranges), and before NAME a way to misbehave, see `Handler.do_GET`.
    """

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content
        self.asked: list[tuple[str, str | None]] = []
        """Path and Range of every request"""
        self.headers: list[Message] = []
        """Of every request"""
        self.times: dict[str, int] = {}
        self.etag = '"one"'
        self.retry_after = "7"
        outer = self

        class Handler(BaseHandler):
            server_state = outer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}{path}"

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.asked]


@contextlib.contextmanager
def serving(content: dict[str, bytes]) -> Iterator[Server]:
    server = Server(content)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


class BaseHandler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        state = self.server_state
        state.asked.append((self.path, self.headers.get("Range")))
        state.headers.append(self.headers)
        way = re.sub("http://[^/]+", "", self.path)  # of what a proxy is asked for
        _, how, name = way.split("?")[0].split("/", 2)
        state.times[self.path] = state.times.get(self.path, 0) + 1
        first_time = state.times[self.path] == 1
        body = state.content.get(name, b"")
        self.close_connection = True
        if how == "missing":
            self.answer(404, b"gone")
        elif how == "broken":
            self.answer(500, b"")
        elif how == "busy" and first_time:
            self.answer(429, b"", {"Retry-After": state.retry_after})
        elif how == "redirect":
            self.answer(302, b"", {"Location": f"/good/{name}"})
        elif how == "loop":
            self.answer(302, b"", {"Location": self.path})
        elif how == "to":  # /to/SCHEME:... : redirect there
            self.answer(302, b"", {"Location": name})
        elif how == "norange":
            self.answer(200, body)
        elif how in ("gzip", "x-gzip", "br"):  # says so of what is sent as it is
            self.answer(200, body, {"Content-Encoding": how})
        elif how == "longer":  # announces more than there is, every time
            self.partial(body, announced=len(body) + 1000)
        elif how == "shorter":  # announces, and sends, only half
            self.answer(200, body[: len(body) // 2])
        elif how == "cut":  # breaks off in the middle, the first time
            self.partial(body, most=len(body) // 2 if first_time else None)
        elif how == "bits":  # breaks off a fifth further on, every time
            self.partial(body, most=len(body) * state.times[self.path] // 5)
        elif how == "wobbly":  # knows no ranges, and breaks off now later, now sooner
            most = len(body) // (2 if state.times[self.path] % 2 else 5)
            self.partial(body, most=most, ranges=False)
        elif how == "unsaid":  # half of it, without saying which
            self.answer(206, body[len(body) // 2 :])
        elif how == "star":  # the second half, of a file that it says no size of
            last = len(body) - 1
            self.answer(206, body[len(body) // 2 :], {"Content-Range": f"bytes {len(body) // 2}-{last}/*"})
        elif how == "trickle":  # half of it at once, then hardly anything
            self.partial(body, most=len(body) // 2, then=self.trickle)
        elif how == "chunks":
            self.chunks(body, whole=True)
        elif how == "cutchunks":
            self.chunks(body, whole=not first_time)
        elif how == "stall" and first_time:
            self.partial(body, most=len(body) // 3, then=lambda: time.sleep(3))
        elif how == "drip":
            self.partial(body, drip=0.02)
        elif how == "wrongrange":
            self.answer(206, body, {"Content-Range": f"bytes 5-{len(body) - 1}/{len(body)}"})
        else:
            self.partial(body)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def partial(self, body, *, most=None, announced=None, then=None, drip=None, ranges=True) -> None:
        """The body or the range of it that was asked for; at most so many bytes of it."""
        total = announced or len(body)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match and ranges else 0
        condition = self.headers.get("If-Range")
        if condition and condition != self.server_state.etag:
            start = 0
        if start >= total:
            self.answer(416, b"", {"Content-Range": f"bytes */{total}"})
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.server_state.etag)
        self.send_header("Content-Length", str(total - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        shown = body[start:] if most is None else body[start:most]
        step = len(shown) if drip is None else 4096
        with contextlib.suppress(OSError):
            for place in range(0, len(shown), max(step, 1)):
                self.wfile.write(shown[place : place + step])
                self.wfile.flush()
                if drip:
                    time.sleep(drip)
        if then is not None:
            then()

    def trickle(self) -> None:
        """A few bytes now and then, for two seconds at most."""
        with contextlib.suppress(OSError):
            for _ in range(40):
                self.wfile.write(b"x")
                time.sleep(0.05)

    def chunks(self, body: bytes, *, whole: bool) -> None:
        """Chunked, without a length; the end is missing unless whole."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        half = body[: len(body) // 2]
        for part in (half, body[len(half) :]) if whole else (half,):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if whole:
            self.wfile.write(b"0\r\n\r\n")
