"""One request at a time over HTTP and HTTPS, with what a careful fetcher checks at every redirect.

An address from a data file can be anything. With public_only, a host whose name leads to an address of a
private network, this machine or a reserved block is refused, and the connection is made to the very addresses
that were checked, so that a name that changes between the two gains nothing.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import re
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, LocationParseError, NewConnectionError

MAX_REDIRECTS = 5
OBJECT = re.compile(r"<[\w.]+ [^<>]*\bat 0x[0-9a-f]+>:?")
"""An object of this very process in a library's message."""

MAX_ADDRESSES = 4
"""So many addresses of a host are tried, one after the other."""

HOLD_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))
"""Networks whose addresses end in an IPv4 address: NAT64, the compatible ones of old, and SIIT."""

LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
"""Leads into networks of the operator's choice; Python's older versions take it for public."""

AGENT = "llmrec (+https://pypi.org/project/llmrec)"


class RefusedError(Exception):
    """Trying again will not help: the address, the redirect or the answer is not acceptable."""


class RetryError(Exception):
    """Trying again may help.

    Args:
        reason: one line.
        wait_seconds: what the server asked for, if it did.
    """

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@contextlib.contextmanager
def request(
    url: str,
    headers: dict[str, str] | None = None,
    *,
    timeout_seconds: float = 30.0,
    public_only: bool = True,
) -> Iterator[urllib3.BaseHTTPResponse]:
    """The answer to a GET, redirects followed, its body not read yet.

    Args:
        url: http or https.
        headers: sent with every request of the chain.
        timeout_seconds: for the connection and for every read.
        public_only: refuse addresses that are not public.

    Raises:
        RefusedError: wrong scheme, private address, too many redirects, or a 4xx answer other than 408, 416,
            425 and 429.
        RetryError: no connection, a time-out, or any other answer that is not 200, 206 or 416.
    """
    for _ in range(MAX_REDIRECTS + 1):
        response = send(url, headers or {}, timeout_seconds, public_only)
        try:
            target = response.get_redirect_location()
            if not target:
                check_status(response, url)
                yield response
                return
        finally:
            response.close()
        try:
            url = urllib.parse.urljoin(url, target)
        except ValueError as error:
            raise RefusedError(f"{shown(url)} leads to no valid address ({error})") from None
    raise RefusedError(f"more than {MAX_REDIRECTS} redirects, the last to {shown(url)}")


def send(
    url: str, headers: dict[str, str], timeout_seconds: float, public_only: bool
) -> urllib3.BaseHTTPResponse:
    """Headers of the answer to one GET, nothing followed."""
    to = address_of(url)
    timeout = urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds)
    options: dict[str, Any] = {
        "headers": {
            "User-Agent": AGENT,
            "Accept-Encoding": "identity",
            "Host": to.parts.netloc.split("@")[-1],
            **headers,
        },
        "redirect": False,
        "retries": False,
        "preload_content": False,
    }
    proxies = urllib.request.getproxies()
    proxy = proxies.get(to.parts.scheme) or proxies.get("all")
    try:
        if proxy and not urllib.request.proxy_bypass(to.host):
            if public_only:  # else the proxy may know names that this machine does not
                check_public(to.host, to.port, public_only)
            whole = urllib.parse.urlunsplit(to.parts._replace(fragment=""))
            return through(proxy, timeout).request("GET", whole, **options)
        *others, last = check_public(to.host, to.port, public_only)[:MAX_ADDRESSES]
        for numeric in others:
            with contextlib.suppress(NewConnectionError, ConnectTimeoutError):
                return pool_at(numeric, to, timeout).urlopen("GET", to.path, **options)
        return pool_at(last, to, timeout).urlopen("GET", to.path, **options)
    except ValueError as error:  # names that cannot be encoded, headers that are no numbers
        raise RefusedError(f"{shown(url)} cannot be asked ({short(error)})") from None
    except HTTPError as error:
        raise RetryError(f"{shown(url)}: {short(error)}") from None


class Address(NamedTuple):
    """Where a URL leads to."""

    parts: urllib.parse.SplitResult
    host: str
    port: int
    path: str
    """With the query, as a request has it"""


def address_of(url: str) -> Address:
    """The parts of a URL.

    Raises:
        RefusedError: it is none of http or https.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    except ValueError as error:
        raise RefusedError(f"{shown(url)} is no valid address ({short(error)})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RefusedError(f"{shown(url)} is no http or https address")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise RefusedError(f"{shown(url)} has no valid port") from None
    path += f"?{parts.query}" if parts.query else ""
    return Address(parts, parts.hostname, port, path)


def pool_at(numeric: str, to: Address, timeout: urllib3.Timeout) -> urllib3.HTTPConnectionPool:
    """Connections to a numeric address; whoever answers there over https must prove to be the URL's host."""
    if to.parts.scheme == "http":
        return urllib3.HTTPConnectionPool(numeric, to.port, timeout=timeout)
    return urllib3.HTTPSConnectionPool(
        numeric,
        to.port,
        timeout=timeout,
        ssl_context=ssl.create_default_context(),
        server_hostname=to.host,
        assert_hostname=to.host,
    )


def through(proxy: str, timeout: urllib3.Timeout) -> urllib3.ProxyManager:
    """Connections through a proxy, as variables of the environment name it: with a user and password or
    without, and over http where it says nothing else."""
    try:
        url = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
    except LocationParseError:  # whose message may hold the password
        names = "$http_proxy, $https_proxy or $all_proxy"
        raise RefusedError(f"the proxy that the environment names ({names}) is no valid address") from None
    user = urllib3.make_headers(proxy_basic_auth=urllib.parse.unquote(url.auth)) if url.auth else None
    return urllib3.ProxyManager(url._replace(auth=None).url, timeout=timeout, proxy_headers=user)


def check_public(host: str, port: int, public_only: bool) -> list[str]:
    """The addresses to connect to, the one to try first at the front.

    Raises:
        RefusedError: one of the host's addresses is not public.
        RetryError: the name leads nowhere.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RetryError(f"no address for {host} ({error})") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    private = [one for one in addresses if not is_public(one)]
    if public_only and private:
        raise RefusedError(f"{host} is at {private[0]}, which is no public address")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and so is the IPv4 address that it stands for."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if any(found in network for network in HOLD_IPV4):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local or found in LOCAL_NAT64:
            return False
    return found.is_global and not found.is_multicast


def check_status(response: urllib3.BaseHTTPResponse, url: str) -> None:
    """Raise for every answer that brings no content."""
    status = response.status
    if status in (200, 206, 416):
        return
    reason = f"{shown(url)} answers {status} {response.reason or ''}".rstrip()
    if 400 <= status < 500 and status not in (408, 425, 429):
        raise RefusedError(reason)
    raise RetryError(reason, wait_of(response.headers.get("Retry-After")))


def wait_of(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if not header:
        return None
    if (seconds := number_of(header)) is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def number_of(header: str) -> int | None:
    """The whole number that a header holds; None if it is another thing, or absurd."""
    text = header.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def shown(url: str) -> str:
    """An address without user, password and query, which may be secret, and not too long; can be printed."""
    try:
        parts = urllib.parse.urlsplit(url)
        text = urllib.parse.urlunsplit((parts.scheme, parts.netloc.split("@")[-1], parts.path, "", ""))
    except ValueError:
        text = url.split("?")[0]
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= 120 else text[:117] + "..."


def short(error: BaseException) -> str:
    """A library's message in one line, without objects of this very process."""
    text = " ".join(OBJECT.sub("", str(error)).split())
    return text if len(text) <= 160 else text[:157] + "..."
