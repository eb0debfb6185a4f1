"""What was read of files before, for whoever looks at them again and again: a file that has not changed is not read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath

Content = TypeVar("Content")
_Stamp = tuple[float, ...]

_NUM_THREADS = 16  # that ask an object store


class SeenFiles(Generic[Content]):
    """Files by name with what was read of them, until their date, size or inode is another one.

    An object is compared by date and size, as a listing gives them: no request is made for one that is known.

    Args:
        read: reads one file; what it raises is raised.
    """

    def __init__(self, read: Callable[[Place], Content]) -> None:
        self._read = read
        self._seen: dict[str, tuple[_Stamp, Content]] = {}

    def read(self, files: Iterable[Place]) -> dict[str, Content]:
        """The content of each file by its name; one that went away meanwhile is left out."""
        found = [(path, stamp) for path in files if (stamp := _stamp(path)) is not None]
        fresh = [(path, stamp) for path, stamp in found if self._seen.get(path.name, ((), None))[0] != stamp]
        contents = self._contents([path for path, _ in fresh])
        now = {path.name: self._seen[path.name] for path, stamp in found if path.name in self._seen}
        now |= {path.name: (stamp, content) for (path, stamp), content in zip(fresh, contents, strict=True)}
        self._seen = now
        return {name: content for name, (_, content) in now.items()}

    def _contents(self, files: list[Place]) -> list[Content]:
        if not any(isinstance(path, ObjectPath) for path in files):
            return [self._read(path) for path in files]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return list(pool.map(self._read, files))


def _stamp(path: Place) -> _Stamp | None:
    """What is another one once the content is."""
    try:
        if isinstance(path, ObjectPath):
            listed = path.stat()
            return (listed.st_mtime, listed.st_size)
        there = os.stat(path)
    except OSError:
        return None
    return (there.st_mtime_ns, there.st_size, there.st_ino)
