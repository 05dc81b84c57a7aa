"""Whether a host can be reached at all, without asking it for anything."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request


def resolves(host: str, seconds: float = 3.0) -> bool:
    """Whether a name leads to an address, as far as a few seconds tell; proxies resolve names themselves.

    What is said of hosts that need none ($NO_PROXY) is no proxy.
    """
    proxies = {"http", "https", "all"}.intersection(urllib.request.getproxies())
    if proxies and not urllib.request.proxy_bypass(host):
        return True
    found: list[bool] = []

    def look() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.append(bool(socket.getaddrinfo(host, None)))

    asking = threading.Thread(target=look, daemon=True)
    asking.start()
    asking.join(seconds)
    return any(found)
