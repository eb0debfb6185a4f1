"""How a small file gets its name: written beside, on disk, then there in one step. And whether a folder takes files.

A Place is a path of the operating system or of an object store, where an object is there in one step anyway.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.write.object_store import ObjectPath

log = logging.getLogger(__name__)

Place = Path | ObjectPath

# File systems without hard links (some FUSE and network mounts) answer with one of these.
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def place(address: str) -> Place:
    """The place that a path or URL means.

    Raises:
        UsageError: nothing that is installed reads such URLs.
    """
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    return ObjectPath(address) if "://" in address else Path(address).expanduser()


def matching(folder: Place, pattern: str) -> list[Place]:
    """What lies right in a folder and has such a name, in order; nothing where there is no folder."""
    return [*folder.glob(pattern)] if isinstance(folder, ObjectPath) else sorted(folder.glob(pattern))


def open_read(path: Place) -> IO[bytes]:
    """A file opened for reading, at its beginning."""
    return path.open_read() if isinstance(path, ObjectPath) else open(path, "rb")


def create_file(path: Place, content: bytes, *, beside: Place, durable: bool = True) -> bool:
    """Publish a file under a name that must not exist; False if another process was quicker.

    beside: folder for the file while it is written, on the same file system.
    durable: have the disk confirm it.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    if isinstance(path, ObjectPath):
        return path.create(content)
    assert isinstance(beside, Path)
    temporary = _written(path.name, content, beside, durable)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as problem:
        if problem.errno not in NO_HARD_LINKS:
            raise
        if path.exists():
            return False
        os.replace(temporary, path)  # not exclusive, which is the best that such a file system has
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_directory(path.parent)
    return True


def replace_file(path: Place, content: bytes, *, beside: Place, durable: bool = True) -> None:
    """Publish a file in place of the one that may be there, in one step.

    durable: have the disk confirm it.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    if isinstance(path, ObjectPath):
        path.replace(content)
        return
    assert isinstance(beside, Path)
    temporary = _written(path.name, content, beside, durable)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_directory(path.parent)


def version_of(path: Place) -> str | None:
    """What exchange_file() compares; None for a file, which is exchanged under a lock (see alone)."""
    return path.version() if isinstance(path, ObjectPath) else None


def exchange_file(path: Place, content: bytes, version: str | None, *, beside: Place) -> bool:
    """Publish a file in place of that version of it; False if it is another one by now.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    if isinstance(path, ObjectPath):
        return path.exchange(content, version)
    replace_file(path, content, beside=beside)
    return True


def time_there(folder: Place) -> float:
    """The time by the clock that dates the files of a folder, which all hosts share.

    Raises:
        OSError: the folder cannot be written.
    """
    probe = folder / f"clock-{uuid.uuid4().hex}.tmp"
    try:
        replace_file(probe, b"now", beside=folder, durable=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def sync_directory(folder: Place) -> None:
    """Have the disk confirm the names in a folder."""
    if isinstance(folder, ObjectPath):
        return  # a store confirms each object
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Place) -> Iterator[None]:
    """Wait until nobody else is within, on this file; a process that dies leaves it. The file stays.

    An object store has no locks: there what is done within has to end in an exchange that fails for the second.

    Raises:
        OSError: the folder cannot be written, or its file system has no locks.
    """
    if isinstance(path, ObjectPath):
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prove_writable(folder: Place) -> None:
    """Write into the folder, or into the one that it would be made in; nothing is left behind.

    Raises:
        OSError: it cannot be made or written.
    """
    if isinstance(folder, ObjectPath):
        _prove_conditions(folder)
        return
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as probe:  # has no name on Linux, so that a kill leaves none
        probe.write(b"probe")


def _prove_conditions(folder: ObjectPath) -> None:
    probe = folder / f"probe-{uuid.uuid4().hex}"
    probe.create(b"probe")
    try:
        if probe.create(b"another"):
            log.warning(
                "%s puts an object where another one is, though it was asked not to (If-None-Match): start one worker "
                "at a time there",
                folder,
            )
    finally:
        probe.unlink(missing_ok=True)


def _written(name: str, content: bytes, folder: Path, durable: bool = True) -> Path:
    path = folder / f"{name}.{uuid.uuid4().hex}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path
