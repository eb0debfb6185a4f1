"""Objects in a store: as files are for the program, and what becomes of puts whose replies are lost."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_s3 import FaultyS3

from pipeline.errors import UsageError
from pipeline.write import file as file_module
from pipeline.write.file import create_file, matching, place, prove_writable, time_there
from pipeline.write.object_store import ObjectPath


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> Iterator[ObjectPath]:
    """A folder in each kind of store that is at hand."""
    if request.param == "s3":
        yield request.getfixturevalue("folder")
    else:
        yield ObjectPath(f"memory://{uuid.uuid4().hex}")


def test_names(folder: ObjectPath) -> None:
    path = folder / "work" / "part-00003.g1.a.journal"
    assert (path.name, path.stem, path.parent.name) == ("part-00003.g1.a.journal", "part-00003.g1.a", "work")
    assert str(path) == f"{folder}/work/part-00003.g1.a.journal" and str(path).startswith("s3://")
    assert path == folder / "work/part-00003.g1.a.journal" and len({path, path.with_name(path.name)}) == 1
    assert folder / "a" < folder / "b"


def test_what_was_put_is_there(store: ObjectPath) -> None:
    path = store / "plan" / "inputs.parquet"
    assert not path.exists() and not path.is_file() and path.version() is None
    path.replace(b"0123456789")
    assert path.exists() and path.is_file() and not path.is_dir()
    assert path.read_bytes() == b"0123456789" == path.open_read().read() and path.read_text() == "0123456789"
    assert (path.read_tail(3), path.read_tail(100)) == (b"789", b"0123456789")
    assert path.stat().st_size == 10 and abs(path.stat().st_mtime - time.time()) < 60
    assert not path.parent.exists(), "a folder is no object"
    path.unlink()
    path.unlink(missing_ok=True)
    for read in (path.read_bytes, path.stat, lambda: path.read_tail(1)):
        with pytest.raises(FileNotFoundError):
            read()


def test_what_lies_in_a_folder(store: ObjectPath) -> None:
    for name in ("part-00001.b.journal", "part-00001.a.journal", "part-00010.a.journal", "deep/part-00001.journal"):
        (store / name).replace(b"12")
    assert [path.name for path in matching(store, "part-00001.*.journal")] == [
        "part-00001.a.journal",
        "part-00001.b.journal",
    ]
    assert len(matching(store, "*")) == 3 and matching(store / "nothing", "*") == []
    assert all(path.is_file() and path.stat().st_size == 2 for path in matching(store, "*"))


def test_an_object_is_created_once(store: ObjectPath) -> None:
    path = store / "plan.json"
    assert create_file(path, b"first", beside=store) is True
    assert create_file(path, b"second", beside=store) is False
    assert path.read_bytes() == b"first"


def test_of_many_that_create_an_object_one_wins(folder: ObjectPath) -> None:
    for number in range(5):
        path = folder / f"race-{number}"
        barrier = threading.Barrier(8)

        def create(name: int, path: ObjectPath = path, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return path.create(b"of %d" % name)

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(create, range(8))) == 1


def test_an_object_is_exchanged_if_it_is_what_was_seen(store: ObjectPath) -> None:
    path = store / "part-00000.parquet"
    assert path.exchange(b"first", None) is True and path.exchange(b"other", None) is False
    seen = path.version()
    time.sleep(0.01)  # a memory store tells versions by their dates
    assert path.exchange(b"second", seen) is True
    assert path.exchange(b"third", seen) is False and path.read_bytes() == b"second"
    now = path.version()
    path.unlink()
    assert path.exchange(b"fourth", now) is False and not path.exists(), "what was deleted does not come back"


@pytest.mark.parametrize("kind", ["lost", "reply lost", "409", "503", "500"])
@pytest.mark.parametrize("times", [1, 5])
def test_a_put_gets_through(kind: str, times: int, s3: FaultyS3, folder: ObjectPath) -> None:
    """Fault 21: puts that are lost, done without a reply, in conflict or asked to slow down: each is done once."""
    path = folder / f"{kind}-{times}"
    s3.fail("PUT", path.name.replace(" ", "%20"), kind, times)
    assert path.create(b"ours") is True, "it is there, and it is ours"
    assert s3.num_failed, "the fault was met"
    assert path.read_bytes() == b"ours"
    assert path.create(b"theirs") is False
    assert not [one for one in s3.requests if one[0] == "DELETE"], "nothing that may have landed is deleted"


@pytest.mark.parametrize("kind", ["lost", "reply lost", "409", "503"])
def test_an_exchange_gets_through(kind: str, s3: FaultyS3, folder: ObjectPath) -> None:
    """Fault 21: the same where one object takes the place of another."""
    path = folder / f"exchanged {kind}"
    path.replace(b"before")
    seen = path.version()
    s3.fail("PUT", "exchanged", kind, 1)
    assert path.exchange(b"after", seen) is True
    assert path.read_bytes() == b"after"
    assert path.exchange(b"too late", seen) is False


def test_an_object_of_somebody_else_is_not_taken_for_ours(s3: FaultyS3, folder: ObjectPath) -> None:
    """Fault 21: the put of another worker landed while our reply was lost: theirs stays, and we have lost."""
    path = folder / "claimed"
    path.replace(b"theirs")
    s3.fail("PUT", "claimed", "503", 2)
    assert path.create(b"ours") is False
    assert path.read_bytes() == b"theirs"


def test_a_store_that_stays_away_is_an_error(s3: FaultyS3, folder: ObjectPath) -> None:
    s3.fail("PUT", "never", "503", 10_000)
    with pytest.raises(OSError, match="so the test wants it"):
        (folder / "never").create(b"x")
    s3.fail("GET", "unread", "500", 10_000)
    (folder / "unread").replace(b"x")
    with pytest.raises(OSError, match="so the test wants it"):
        (folder / "unread").read_bytes()


def test_reading_gets_through(s3: FaultyS3, folder: ObjectPath) -> None:
    (folder / "read").replace(b"content")
    for method, kind in (("GET", "503"), ("GET", "lost"), ("HEAD", "500")):
        s3.fail(method, "read", kind, 2)
    assert (folder / "read").read_bytes() == b"content"
    assert (folder / "read").read_tail(4) == b"tent"
    assert (folder / "read").exists()


def test_a_place_is_proven_before_anything_is_planned(
    s3: FaultyS3, folder: ObjectPath, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_writable(folder)
    assert "If-None-Match" not in caplog.text and matching(folder, "*") == []
    with pytest.raises(OSError, match="bucket"):
        prove_writable(ObjectPath("s3://no-such-bucket/run"))
    monkeypatch.setattr(file_module.ObjectPath, "create", lambda path, content: path.replace(content) or True)
    prove_writable(folder)
    assert "If-None-Match" in caplog.text and "one worker at a time" in caplog.text


def test_the_time_of_the_store(folder: ObjectPath) -> None:
    assert abs(time_there(folder) - time.time()) < 60
    assert matching(folder, "*") == []


def test_which_addresses_are_objects() -> None:
    assert str(place("/data/out")) == "/data/out" and str(place("file:///data/out")) == "/data/out"
    assert isinstance(place("memory://x"), ObjectPath)
    with pytest.raises(UsageError, match=r"Expected a folder, or a URL that fsspec knows"):
        place("nosuch://x")
    with pytest.raises(UsageError, match=r"vlm-batch\[gcs\]"):
        place("gs://bucket/x")
