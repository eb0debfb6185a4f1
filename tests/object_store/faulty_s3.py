"""An S3 server of one's own (moto), and in front of it a line that loses requests and replies, or says no.

    with FaultyS3() as s3:
        s3.fail("PUT", "data/part-00000", "reply lost", times=1)

Faults: `lost` (the request never arrives), `reply lost` (it is done and nobody hears of it), or a status code: 409 (two
conditional puts at once), 503 (slow down), 500. They hold for so many requests that fit, then the line is sound again.
"""

from __future__ import annotations

import http.client
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from moto.server import ThreadedMotoServer

BUCKET = "photos"
_CODES = {"409": "ConditionalRequestConflict", "503": "SlowDown", "500": "InternalError"}


@dataclass(slots=True)
class Fault:
    """What happens to requests of a method whose path contains `part`."""

    method: str
    part: str
    kind: str
    times: int


class FaultyS3:
    """The server; `environment` has clients go through the line."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._lock = threading.Lock()
        self.faults: list[Fault] = []
        self.num_failed = 0  # requests that met a fault
        self.requests: list[tuple[str, str]] = []  # method and path

    def __enter__(self) -> FaultyS3:
        self._server.start()
        _, self.moto_port = self._server.get_host_and_port()
        self._line = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._line.daemon_threads = True
        threading.Thread(target=self._line.serve_forever, daemon=True).start()
        self._send("PUT", f"/{BUCKET}", b"", {})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.shutdown()
        self._line.server_close()
        self._server.stop()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._line.server_port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # of the client library, which would hide the faults for minutes
        }

    def reset(self) -> None:
        """A sound line; what was counted is forgotten."""
        with self._lock:
            self.faults, self.num_failed, self.requests = [], 0, []

    def fail(self, method: str, part: str, kind: str, times: int = 1) -> None:
        """Have so many requests fail."""
        with self._lock:
            self.faults.append(Fault(method, part, kind, times))

    def fault(self, method: str, path: str) -> str:
        """What happens to this request; empty where nothing does."""
        with self._lock:
            self.requests.append((method, path))
            for one in self.faults:
                if one.times and one.method == method and one.part in path:
                    one.times -= 1
                    self.num_failed += 1
                    return one.kind
        return ""

    def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.moto_port, timeout=60)
        connection.request(method, path, body, headers)
        return connection.getresponse()


def _handler(s3: FaultyS3) -> type[BaseHTTPRequestHandler]:
    class Line(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self._body()
            fault = s3.fault(self.command, self.path)
            if fault in _CODES:
                self._say(int(fault), _CODES[fault])
                return
            if fault == "lost":
                self._hang_up()
                return
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            reply = s3._send(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            content = reply.read()
            if fault == "reply lost":
                self._hang_up()
                return
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _say(self, status: int, code: str) -> None:
            content = f"<Error><Code>{code}</Code><Message>so the test wants it</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.close()

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

        def log_message(self, *_: Any) -> None:
            pass

    return Line
