"""A hub of one dataset repository on this machine: the few addresses that a push asks for, as the client asks them.

Small files come inside a commit, large ones by the protocol of git-lfs. Not played: Xet, quotas, gated repositories.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class SmallHub:
    """What was pushed, and who pushed it."""

    def __init__(self, *, refuses: int | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # of git-lfs, by hash
        self.commits: list[list[dict[str, Any]]] = []  # the lines of each
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.refuses = refuses  # commits with this status
        self.url = ""

    def commit(self, lines: list[dict[str, Any]]) -> None:
        self.commits.append(lines)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]


@contextmanager
def serving(hub: SmallHub) -> Iterator[SmallHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _reply(self, content: Any, status: int = 200, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self) -> None:
            body, path = self._body(), self.path.partition("?")[0]
            hub.tokens.add(self.headers.get("Authorization"))
            if path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self._reply({"url": f"{hub.url}/datasets/me/answers", "name": "me/answers", "id": "1"})
            elif path == "/api/validate-yaml":
                self._reply({"errors": [], "warnings": []})
            elif path == "/api/datasets/me/answers/preupload/main":
                names = [file["path"] for file in json.loads(body)["files"]]
                self._reply(
                    {
                        "files": [
                            {
                                "path": name,
                                "uploadMode": "lfs" if name.endswith(".parquet") else "regular",
                                "shouldIgnore": False,
                                "oid": None,
                            }
                            for name in names
                        ]
                    }
                )
            elif path == "/datasets/me/answers.git/info/lfs/objects/batch":
                found = [
                    {**entry, "actions": {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}", "header": {}}}}
                    for entry in json.loads(body)["objects"]
                ]
                self._reply({"transfer": "basic", "objects": found})
            elif path == "/api/datasets/me/answers/commit/main" and hub.refuses:
                self._reply({"error": "You have no right to write here"}, hub.refuses)
            elif path == "/api/datasets/me/answers/commit/main":
                hub.commit([json.loads(line) for line in body.splitlines()])
                self._reply(
                    {
                        "commitUrl": f"{hub.url}/datasets/me/answers/commit/{40 * '0'}",
                        "commitOid": "0" * 40,
                        "success": True,
                    }
                )
            else:
                self._reply({"error": f"no such address: {self.path}"}, 404)

        def do_PUT(self) -> None:
            hub.objects[self.path.removeprefix("/lfs/")] = self._body()
            self._reply(b"")

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix("/datasets/me/answers/resolve/main/")
            if path.startswith("/api/datasets/me/answers/tree/"):
                self._reply([_entry(name, data) for name, data in hub.files.items()])
            elif path.startswith("/api/datasets/me/answers"):
                self._reply({"id": "me/answers", "sha": "0" * 40, "siblings": [{"rfilename": n} for n in hub.files]})
            elif name in hub.files:
                digest = hashlib.sha1(hub.files[name]).hexdigest()
                self._reply(hub.files[name], ETag=f'"{digest}"', X_Repo_Commit=digest)
            else:
                self._reply({"error": f"no such address: {self.path}"}, 404)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
