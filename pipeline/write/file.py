"""How a small file gets its name: written beside, on disk, then there in one step. And whether a folder takes files."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# File systems without hard links (some FUSE and network mounts) answer with one of these.
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def create_file(path: Path, content: bytes, *, beside: Path) -> bool:
    """Publish a file under a name that must not exist; False if another process was quicker.

    beside: folder for the file while it is written, on the same file system.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    temporary = _written(path.name, content, beside)
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
    sync_directory(path.parent)
    return True


def replace_file(path: Path, content: bytes, *, beside: Path) -> None:
    """Publish a file in place of the one that may be there, in one step.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    temporary = _written(path.name, content, beside)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Have the disk confirm the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until nobody else is within, on this file; a process that dies leaves it. The file stays.

    Raises:
        OSError: the folder cannot be written, or its file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prove_writable(folder: Path) -> None:
    """Write into the folder, or into the one that it would be made in; nothing is left behind.

    Raises:
        OSError: it cannot be made or written.
    """
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as probe:  # has no name on Linux, so that a kill leaves none
        probe.write(b"probe")


def _written(name: str, content: bytes, folder: Path) -> Path:
    path = folder / f"{name}.{uuid.uuid4().hex}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path
