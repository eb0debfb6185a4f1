"""http and https images (dataset.allow_urls=true): fetched within bounds, and from public addresses alone.

A row may name any address, and whoever wrote it need not be whoever runs this. So a host is resolved once, its
addresses are checked, and the connection goes to an address that passed, by its number: what a name means may change
between two questions (DNS rebinding). Each redirect is checked anew. Proxies of the environment are not used, since
behind one nobody sees where a name leads; neither are credentials (.netrc, cookies, user:password@).
"""

from __future__ import annotations

import http.client
import ipaddress
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from pipeline.errors import RowFault
from pipeline.records import Stage
from pipeline.redaction import redacted

_REDIRECTS = (301, 302, 303, 307, 308)
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one image; together below engine.worker_timeout_seconds, so that the row says what went wrong."""

    max_bytes: int = 1 << 28
    num_tries: int = 3
    num_redirects: int = 5
    connect_seconds: float = 10.0
    try_seconds: float = 20.0  # from the connection to the last byte, however slowly they come
    wait_seconds: float = 1.0  # before the second try; twice as long before each further one
    most_wait_seconds: float = 8.0  # whatever a server asks for


class _TryAgain(Exception):
    """What may be better in a moment."""

    def __init__(self, fault: RowFault, wait_seconds: float | None = None) -> None:
        super().__init__(fault.message)
        self.fault, self.wait_seconds = fault, wait_seconds


def fetch(url: str, limits: FetchLimits) -> bytes:
    """The body of a resource.

    Raises:
        RowFault: stage `read`: AddressNotAllowed, UrlsNotSupported, HTTPError, TooManyRedirects, FileTooLarge,
            TimeoutError, or what the connection raised.
    """
    for number in range(limits.num_tries):
        try:
            return _followed(url, limits)
        except _TryAgain as problem:
            if number + 1 == limits.num_tries:
                raise problem.fault from None
            wait = limits.wait_seconds * 2**number * random.uniform(0.5, 1.5)  # many workers must not come back at once
            time.sleep(min(max(wait, problem.wait_seconds or 0.0), limits.most_wait_seconds))
    raise AssertionError("at least one try")


def shown(url: str) -> str:
    """A URL for messages: without user, password and query, where secrets travel."""
    parts = urlsplit(url)
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"[:300]


def _followed(url: str, limits: FetchLimits) -> bytes:
    for _ in range(limits.num_redirects + 1):
        found = _get(url, limits)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise _fault("TooManyRedirects", f"{shown(url)}: more than {limits.num_redirects} redirects")


def _get(url: str, limits: FetchLimits) -> bytes | str:
    """The body, or where the server says that it is."""
    parts, host, port = _checked(url)
    name = shown(url)
    try:
        with _connected(parts.scheme, host, port, name, limits) as connection:
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
            accepted = {"User-Agent": "vlm-batch", "Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"}
            connection.request("GET", target, headers=accepted)
            with closing(connection.getresponse()) as response:
                if response.status in _REDIRECTS and (place := response.getheader("Location")):
                    return place
                if response.status != 200:
                    fault = _fault("HTTPError", f"{name}: HTTP {response.status}")
                    if response.status in _TRY_AGAIN:
                        raise _TryAgain(fault, _seconds(response.getheader("Retry-After")))
                    raise fault
                return _body(response, name, limits.max_bytes)
    except (OSError, http.client.HTTPException) as problem:
        said = getattr(problem, "strerror", None) or str(problem) or "the connection ended"
        fault = _fault(type(problem).__name__, f"{name}: {said}")
        if isinstance(problem, ssl.SSLCertVerificationError | http.client.InvalidURL) or (
            isinstance(problem, socket.gaierror) and problem.errno == socket.EAI_NONAME
        ):
            raise fault from None
        raise _TryAgain(fault) from None
    except ValueError as problem:  # a host name that cannot be one
        raise _fault("UrlsNotSupported", f"{name}: {problem}") from None


def _checked(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # its message quotes what it took for the port, which may be a password with a slash in it
        said = "expected http:// or https://, a host, and perhaps a port"
        raise _fault("UrlsNotSupported", f"{redacted(url)[:100]!r} is no URL: {said}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise _fault("UrlsNotSupported", f"{shown(url)}: expected http:// or https:// and a host")
    if parts.username is not None or parts.password is not None:
        raise _fault("UrlsNotSupported", f"{shown(url)}: a URL with a user in it; credentials are not sent")
    return parts, host, port or (443 if parts.scheme == "https" else 80)


@contextmanager
def _connected(
    scheme: str, host: str, port: int, name: str, limits: FetchLimits
) -> Iterator[http.client.HTTPConnection]:
    """A connection to a public address of the host, which ends when its time is over."""
    deadline = threading.Event()
    connection = http.client.HTTPConnection(host, port)
    raw = socket.create_connection((_public_address(host, port, name), port), timeout=limits.connect_seconds)
    try:
        raw.settimeout(limits.try_seconds)

        def end() -> None:
            deadline.set()
            with suppress(OSError):  # it ended by itself
                raw.shutdown(socket.SHUT_RDWR)

        # A server that sends a byte a second keeps every single read alive: only a clock of its own ends it.
        timer = threading.Timer(limits.try_seconds, end)
        timer.daemon = True
        timer.start()
        try:
            connection.sock = raw
            if scheme == "https":
                connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
            yield connection
            if deadline.is_set():  # a body without a length may end anywhere
                raise TimeoutError
        except (OSError, http.client.HTTPException):
            if deadline.is_set():
                raise TimeoutError(f"not done in {limits.try_seconds:g} s") from None
            raise
        finally:
            timer.cancel()
    finally:
        connection.close()
        raw.close()


def _public_address(host: str, port: int, name: str) -> str:
    """One that may be connected to. A host with none, or a name for this machine, is refused."""
    found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    public = sorted(address for address in map(str, found) if is_public(address))
    if not public:
        raise _fault("AddressNotAllowed", f"{name}: {host} is no public address")
    return public[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; those that carry an IPv4 address go by that, too."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        inner = [ip.sixtofour, *(ip.teredo or ())]
        if any(one is not None and not is_public(str(one)) for one in inner):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_loopback or ip.is_link_local)


def _body(response: http.client.HTTPResponse, name: str, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    declared = response.length or 0
    while num_bytes <= max_bytes >= declared:
        chunk = response.read(_CHUNK_BYTES)
        if not chunk:
            if response.length:
                raise http.client.IncompleteRead(b"".join(chunks), response.length)
            return b"".join(chunks)
        chunks.append(chunk)
        num_bytes += len(chunk)
    raise _fault("FileTooLarge", f"{name}: more than {max_bytes:,} bytes")


def _seconds(retry_after: str | None) -> float | None:
    try:
        return float(retry_after or "")
    except ValueError:  # a date, or nothing
        return None


def _fault(kind: str, message: str) -> RowFault:
    return RowFault(Stage.READ, kind, message)
