"""A file system that fails as network file systems and old disks do, under the whole program with the fake model.

    PYTHONPATH=tests/torture python -c "import faulty_storage; faulty_storage.start()" run dataset=images ...

FAULTY_STORAGE holds faults, separated by semicolons, each of four words: CALL WHEN ERROR PATTERN.

    link after EEXIST *            every os.link is done and says that the name exists: the reply was lost
    replace before ESTALE:1 *.json the first os.replace onto such a path is not done and fails; :2 = the second alone
    fsync before EIO *.parquet     the disk refuses to confirm such a file or folder
    read before EIO *.parquet      such a file cannot be opened for reading
    list lags 3 */data             names in the folder are listed so many seconds late, and so long after they are gone
    unlink leaves .nfs */work      a file that is removed stays under another name until the process ends

Only calls below the folder FAULTY_STORAGE_ROOT fail. One that is asked for by number says so on its standard error, so
that a test can tell that it happened.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import fnmatch
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_model

FAULTS, ROOT = "FAULTY_STORAGE", "FAULTY_STORAGE_ROOT"


@dataclass(slots=True)
class Fault:
    """One of the faults; `number`: which of the calls that fit fails, 0 = all."""

    call: str
    when: str
    error: str
    number: int
    pattern: str
    num_calls: int = 0

    @classmethod
    def parsed(cls, words: str) -> Fault:
        call, when, error, pattern = words.split()
        error, _, number = error.partition(":")
        return cls(call, when, error, int(number or 0), pattern)

    def meets(self, path: str) -> bool:
        """Whether this call is one that fails."""
        if not path.startswith(os.environ[ROOT] + "/") or not fnmatch.fnmatchcase(path, self.pattern):
            return False
        self.num_calls += 1
        fails = self.number in (0, self.num_calls)
        if fails:
            print(f"faulty storage: {self.call} {self.error} {path}", file=sys.stderr, flush=True)
        return fails

    def failure(self, path: str) -> OSError:
        number = getattr(errno, self.error)
        return OSError(number, os.strerror(number), path)


def failing(real: Callable[..., Any], fault: Fault, path_of: Callable[..., str]) -> Callable[..., Any]:
    """The call, which fails before it does anything, or after it has done all of it."""

    def call(*args: Any, **more: Any) -> Any:
        path = path_of(*args)
        if not fault.meets(path):
            return real(*args, **more)
        if fault.when == "after":
            real(*args, **more)
        raise fault.failure(path)

    return call


def _target(source: Any, target: Any, *_: Any) -> str:
    return str(os.fspath(target))


def _of_descriptor(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _read_path(path: Any, mode: str = "r", *_: Any) -> str:
    return os.fspath(path) if isinstance(path, (str, Path)) and mode.startswith("r") else ""


@dataclass(frozen=True, slots=True)
class _Ghost:
    """A name that a listing still has and that is gone."""

    name: str
    path: str

    def is_file(self, **_: Any) -> bool:
        return True

    def is_dir(self, **_: Any) -> bool:
        return False

    is_symlink = is_dir


def lagging(real: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    """os.scandir that shows what came so many seconds ago, and what has gone since."""
    seconds = float(fault.error)
    last_seen: dict[str, float] = {}

    def scandir(path: Any = ".") -> Any:
        folder = "" if isinstance(path, int) else str(os.fspath(path))
        if not fault.meets(folder):
            return real(path)

        @contextmanager
        def listing() -> Iterator[Iterator[Any]]:
            now, entries = time.time(), []
            with real(path) as found:
                for entry in found:
                    with suppress(FileNotFoundError):
                        if now - entry.stat(follow_symlinks=False).st_ctime >= seconds:
                            entries.append(entry)
                        last_seen[entry.path] = now
            there = {entry.path for entry in entries}
            for name, seen in last_seen.items():
                if name not in there and os.path.dirname(name) == folder and 0 < now - seen < seconds:
                    entries.append(_Ghost(os.path.basename(name), name))
            yield iter(entries)

        return _Listing(listing())

    return scandir


class _Listing:
    """What os.scandir returns: to be entered, or to be gone through as it is."""

    def __init__(self, listing: Any) -> None:
        self._listing = listing

    def __enter__(self) -> Iterator[Any]:
        entries: Iterator[Any] = self._listing.__enter__()
        return entries

    def __exit__(self, *problem: Any) -> None:
        self._listing.__exit__(*problem)

    def __iter__(self) -> Iterator[Any]:
        with self._listing as entries:
            yield from entries


def leaving(real: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    """os.unlink as an NFS client does it where somebody has the file open."""
    numbers = itertools.count()
    left: list[str] = []

    @atexit.register
    def close() -> None:
        for path in left:
            with suppress(FileNotFoundError):
                real(path)

    def unlink(path: Any, **more: Any) -> None:
        name = os.fspath(path)
        if not fault.meets(os.path.dirname(name)) or ".nfs" in name:
            real(path, **more)
            return
        left.append(os.path.join(os.path.dirname(name), f".nfs{os.getpid():08x}{next(numbers):08x}"))
        os.rename(path, left[-1])

    return unlink


def install() -> None:
    """Put the faults of the environment under this process."""
    for fault in map(Fault.parsed, filter(None, map(str.strip, os.environ.get(FAULTS, "").split(";")))):
        match fault.call:
            case "link":
                os.link = failing(os.link, fault, _target)
            case "replace":
                os.replace = failing(os.replace, fault, _target)
            case "fsync":
                os.fsync = failing(os.fsync, fault, _of_descriptor)
            case "read":
                builtins.open = failing(open, fault, _read_path)
            case "list":
                os.scandir = lagging(os.scandir, fault)
            case "unlink":
                os.unlink = leaving(os.unlink, fault)
            case _:
                raise ValueError(f"{FAULTS}: there is no call {fault.call!r}")


def start() -> None:
    """What `python -m pipeline` does, with the fake model, on such a file system."""
    install()
    fake_model.start()
