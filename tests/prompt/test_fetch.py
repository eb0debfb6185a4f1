"""Images at http and https addresses: bounded in every way, and never from a private address."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.errors import RowFault
from pipeline.prompt import fetch as fetch_module
from pipeline.prompt.fetch import FetchLimits, fetch, is_public, shown
from pipeline.prompt.image import open_image
from pipeline.records import ImageRef, Stage

PUBLIC = "127.0.0.77"  # an address of this machine that passes for a public one
BODY = b"a picture" * 1000
QUICK = FetchLimits(max_bytes=100_000, wait_seconds=0.01, connect_seconds=2, try_seconds=2)


class Server:
    """Serves `answers[path]`, a function of the request; counts who came, served or not."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                outer.answers.get(self.path, say(404))(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://pictures.example:{self.port}{path}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def say(status: int, body: bytes = b"", **headers: str) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | given).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine that passes for a public one under the name pictures.example."""
    running = Server(PUBLIC)
    real = socket.getaddrinfo

    def resolved(host: str, *more: Any, **options: Any) -> Any:
        return real(PUBLIC if host.endswith(".example") else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(fetch_module, "is_public", lambda address: address == PUBLIC)
    yield running
    running.close()


@pytest.fixture
def canary() -> Iterator[Server]:
    """A server on this machine that nobody may reach."""
    running = Server()
    running.answers["/"] = say(200, b"a secret")
    yield running
    running.close()


def fault_of(url: str, limits: FetchLimits = QUICK) -> RowFault:
    with pytest.raises(RowFault) as caught:
        fetch(url, limits)
    assert caught.value.stage is Stage.READ
    return caught.value


def test_a_body_comes_as_it_is_and_nothing_of_ours_goes_along(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.answers["/a%20b.jpg?size=2&name=x"] = say(200, BODY)
    assert fetch(server.url("/a b.jpg?size=2&name=x"), QUICK) == BODY
    [headers] = server.headers
    assert headers["host"] == f"pictures.example:{server.port}"
    assert not headers.keys() & {"cookie", "authorization", "referer", "proxy-authorization"}


def test_redirects_are_followed_a_few_times(server: Server) -> None:
    server.answers |= {f"/{n}": say(302, Location=f"/{n + 1}") for n in range(9)} | {"/9": say(200, BODY)}
    assert fetch(server.url("/4"), QUICK) == BODY
    assert server.asked == ["/4", "/5", "/6", "/7", "/8", "/9"]
    assert fault_of(server.url("/3")).kind == "TooManyRedirects"


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.2:{port}/", "http://[::1]:{port}/", "http://localhost:{port}/", "http://169.254.169.254/",
        "file:///etc/passwd", "ftp://127.0.0.1/", "//10.0.0.1/", "http://user@pictures.example:{port}/",
    ],
)  # fmt: skip
def test_a_redirect_does_not_lead_where_a_url_may_not(server: Server, canary: Server, place: str) -> None:
    """Fault S-7: a redirect to a private address, another scheme or credentials is not followed."""
    server.answers["/"] = say(302, Location=place.format(port=canary.port))
    assert fault_of(server.url("/")).kind in ("AddressNotAllowed", "UrlsNotSupported")
    assert (server.asked, canary.asked) == (["/"], [])


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "0", "[::]",
        "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.1.", "[::127.0.0.1]",
    ],
)  # fmt: skip
def test_no_spelling_of_this_machine_is_fetched(host: str, canary: Server) -> None:
    """Fault S-7: forms of 127.0.0.1."""
    fault = fault_of(f"http://{host}:{canary.port}/")
    assert fault.kind in ("AddressNotAllowed", "gaierror", "UrlsNotSupported", "UnicodeError")
    assert canary.asked == []


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "192.0.2.1", "198.18.0.1", "fe80::1%eth0", "fd00::1", "ff02::1", "2001:db8::1", "::",
        "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::", "::ffff:10.0.0.1", "no address",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    """Fault S-7: private, link-local, shared, reserved, and IPv6 forms that carry one of them."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


def test_a_name_is_resolved_once_so_that_it_cannot_change_its_mind(
    canary: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault S-7: a DNS answer that is public when it is checked and private when it is used."""
    answers = iter(["203.0.113.9"])  # not routed anywhere; passes here for a public address
    asked: list[str] = []
    dialled: list[tuple[str, int]] = []

    def resolved(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.1"), port))]

    def connect(address: tuple[str, int], **_: Any) -> socket.socket:
        dialled.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(fetch_module, "is_public", lambda address: address == "203.0.113.9")
    assert fault_of(f"http://rebind.example:{canary.port}/").kind == "AddressNotAllowed"  # the second try
    assert dialled == [("203.0.113.9", canary.port)]  # a number, never the name
    assert asked == ["rebind.example"] * 2
    assert canary.asked == []


def test_of_several_addresses_a_public_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in ("10.0.0.1", "93.184.215.14", "127.0.0.1")]

    dialled: list[Any] = []

    def connect(address: Any, **_: Any) -> socket.socket:
        dialled.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert fault_of("http://mixed.example/").kind == "ConnectionRefusedError"
    assert set(dialled) == {"93.184.215.14"}


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://pictures.example/a", "data:image/png;base64,AAAA", "gopher://pictures.example/",
        "http:///a.jpg", "http://", "http://user:secret@pictures.example/a.jpg", "http://pictures.example:99999/",
        "http://[::1/", "jar:http://pictures.example!/a", "http://" + "a" * 300 + ".invalid/",
    ],
)  # fmt: skip
def test_what_is_no_plain_http_url_is_refused_unasked(url: str, server: Server) -> None:
    """Fault S-7: file:, ftp:, data:, user and password in the address: refused, and nobody is asked."""
    fault = fault_of(url)
    assert fault.kind == "UrlsNotSupported"
    assert "secret" not in fault.message
    assert server.asked == []


def test_a_line_break_in_a_url_adds_no_header(server: Server) -> None:
    """Fault S-7: a line break in an address cannot add a header to the request."""
    server.answers["/a%0D%0AX-Evil:%201"] = say(200, BODY)
    fetch_or_fault(server.url("/a\r\nX-Evil: 1"))
    fetch_or_fault(server.url("/a?b=\r\nX-Evil: 1"))
    assert all("x-evil" not in headers for headers in server.headers)


def fetch_or_fault(url: str) -> None:
    with contextlib.suppress(RowFault):
        fetch(url, QUICK)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_asked_once(server: Server, status: int) -> None:
    server.answers["/"] = say(status)
    assert fault_of(server.url("/")).message == f"{server.url('/')}: HTTP {status}"
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(server: Server, status: int) -> None:
    answers = iter([say(status, Retry_After="0"), say(status), say(200, BODY)])
    server.answers["/"] = lambda request: next(answers)(request)
    assert fetch(server.url("/"), QUICK) == BODY
    assert len(server.asked) == 3
    server.answers["/"] = say(status)
    assert fault_of(server.url("/")).kind == "HTTPError"
    assert len(server.asked) == 6


def test_a_server_cannot_ask_for_a_long_wait(server: Server) -> None:
    answers = iter([say(503, Retry_After="86400"), say(200, BODY)])
    server.answers["/"] = lambda request: next(answers)(request)
    began = time.monotonic()
    assert fetch(server.url("/"), FetchLimits(wait_seconds=0.01, most_wait_seconds=0.2)) == BODY
    assert time.monotonic() - began < 60


def test_a_body_above_the_limit_is_not_read_to_its_end(server: Server) -> None:
    """Fault S-7: an endless body, declared or not."""
    ended = threading.Event()

    def endless(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while not ended.is_set():
                request.wfile.write(b"x" * 65536)
        except OSError:
            ended.set()

    server.answers["/endless"] = endless
    server.answers["/declared"] = say(200, Content_Length=str(10**12))
    for path in ("/endless", "/declared"):
        assert fault_of(server.url(path)).kind == "FileTooLarge"
    assert ended.wait(10), "the connection is still open"
    server.answers["/exact"] = say(200, b"x" * QUICK.max_bytes)
    assert len(fetch(server.url("/exact"), QUICK)) == QUICK.max_bytes


@pytest.mark.parametrize("in_header", [True, False])
def test_a_server_that_drips_is_given_up(server: Server, in_header: bool) -> None:
    """Fault S-7: slow-loris: each byte comes in time, and the last one never."""
    ended = threading.Event()

    def drip(request: http.server.BaseHTTPRequestHandler) -> None:
        if not in_header:
            request.send_response(200)
            request.end_headers()
        try:
            while not ended.wait(0.05):
                request.wfile.write(b"X")
                request.wfile.flush()
        except OSError:
            ended.set()

    server.answers["/"] = drip
    limits = FetchLimits(num_tries=1, try_seconds=0.5)
    began = time.monotonic()
    fault = fault_of(server.url("/"), limits)
    assert (fault.kind, fault.message) == ("TimeoutError", f"{server.url('/')}: not done in 0.5 s")
    assert time.monotonic() - began < 20
    assert ended.wait(10), "the connection is still open"


def test_a_body_that_ends_early_is_no_picture(server: Server) -> None:
    server.answers["/"] = say(200, b"half", Content_Length="1000")
    assert fault_of(server.url("/")).kind == "IncompleteRead"
    assert len(server.asked) == QUICK.num_tries


def test_no_connection_is_left_open(server: Server) -> None:
    server.answers["/"] = say(200, BODY)
    server.answers["/r"] = say(302, Location="/")
    before = threading.active_count()
    for path in ("/", "/r", "/none"):
        fetch_or_fault(server.url(path))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://user:secret@host:8443/a/b.jpg?token=secret#f", "https://host:8443/a/b.jpg?..."),
        ("http://host/a.jpg", "http://host/a.jpg"),
    ],
)
def test_a_message_shows_no_secret_of_a_url(url: str, text: str) -> None:
    """Fault S-2: password and parameters of an address are in no message."""
    assert shown(url) == text


def test_a_picture_is_opened_from_a_url_like_any_other(server: Server) -> None:
    import io

    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(encoded, "PNG")
    server.answers["/a.png"] = say(200, encoded.getvalue())
    at_url = open_image(ImageRef(path=server.url("/a.png")), max_image_pixels=100, allow_urls=True)
    in_row = open_image(ImageRef(data=encoded.getvalue()), max_image_pixels=100)
    assert at_url.image.tobytes() == in_row.image.tobytes()
    assert at_url.sha256 == in_row.sha256
