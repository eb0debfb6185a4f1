"""An S3 server for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
pytest.importorskip("moto.server", reason="moto is not installed")

from faulty_s3 import BUCKET, FaultyS3

from pipeline.write import request as request_module
from pipeline.write.object_store import ObjectPath


@pytest.fixture(scope="session")
def server() -> Iterator[FaultyS3]:
    with FaultyS3() as s3:
        yield s3


@pytest.fixture
def s3(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A sound line, in this process and in those that it starts; waits between tries are short."""
    import s3fs

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(request_module, "_WAITS_SECONDS", (0.01,) * 6)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # the client's own tries take seconds
    s3fs.S3FileSystem.clear_instance_cache()
    server.reset()
    yield server
    server.reset()


@pytest.fixture
def folder(s3: FaultyS3, request: pytest.FixtureRequest) -> ObjectPath:
    """A folder that no other test uses."""
    return ObjectPath(f"s3://{BUCKET}/{abs(hash(request.node.nodeid)):x}")
