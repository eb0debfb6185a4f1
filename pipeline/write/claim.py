"""Claims: who is at which shard now, so that two workers do not do the same work. Advisory: nothing relies on them.

A claim is a file `work/part-00042.claim` that names its owner. The owner touches it every now and then (on an object
store it is put again); one that was not touched for the length of a lease, or whose process on this host is gone, may
be taken over. Two workers that take a claim over at the same moment both do the shard, and its exclusive publication
keeps one result.

Whoever has nothing else left helps with a shard that somebody has, under a claim `part-00042.help.claim`, so that one
helps and the owner looks what the helper has.

A shard that somebody else has is left for later: never wait for it while rows of one's own are on their way, or two
workers wait for each other.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from pipeline.write.crash_point import crash_point
from pipeline.write.file import Place, create_file, replace_file, time_there
from pipeline.write.object_store import ObjectPath

HELP = ".help"  # behind the name of a shard: the claim of a worker that helps with what another one has
LEASE_SECONDS = 60.0
_LEASE_SECONDS_OF_OBJECTS = 300.0  # each heartbeat is two requests there
_TRIES = 20  # to take a claim while one after the other clears work/ away
_MOST_BYTES = 4096  # of a claim


@dataclass(frozen=True, slots=True)
class Claim:
    """Who has a shard, as its claim file says it; empty where the file is not readable."""

    owner: str = ""
    host: str = ""
    pid: int = 0


class Claims:
    """The claims of one worker. While it is entered, a thread keeps them alive; leaving it gives them up.

    Args:
        owner: unique to this start of this worker, as the attempt of a journal is.
        lease_seconds: how long a claim holds without a heartbeat; None = what suits the place.
    """

    def __init__(self, work_dir: Place, owner: str, *, lease_seconds: float | None = None) -> None:
        self._work_dir = work_dir
        usual = _LEASE_SECONDS_OF_OBJECTS if isinstance(work_dir, ObjectPath) else LEASE_SECONDS
        self._lease_seconds = usual if lease_seconds is None else lease_seconds
        self._store_ahead_seconds: float | None = None  # of our monotonic clock, once it is known
        self._num_beats = 0
        self._own = Claim(owner, _host(), os.getpid())
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> Claims:
        threading.Thread(target=self._beat_forever, name="claims", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.close()

    def _beat_forever(self) -> None:
        while not self._closing.wait(self._lease_seconds / 6):
            with suppress(OSError):  # a lease that ends costs double work, nothing else
                self.beat()

    def take(self, shard_name: str) -> bool:
        """Claim a shard; False while another live worker has it.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._lock:
            for tries_left in reversed(range(_TRIES)):
                try:
                    return self._take(shard_name)
                except FileNotFoundError:  # whoever has just finished the run cleared work/ away under our hands
                    if not tries_left:
                        raise
        raise AssertionError("unreachable")

    def _take(self, shard_name: str) -> bool:
        path = self.path(shard_name)
        self._work_dir.mkdir(exist_ok=True)
        if not create_file(path, self._content(), beside=self._work_dir, durable=False):
            version = path.version() if isinstance(path, ObjectPath) else None
            if not self._may_take_over(path):
                return False
            if not isinstance(path, ObjectPath):
                replace_file(path, self._content(), beside=self._work_dir, durable=False)
            elif not path.exchange(self._content(), version):
                return False
        taken = _read(path) == self._own  # of two that take over, the last one has it
        if taken:
            self._held.add(shard_name)
            crash_point("claim_taken")
        return taken

    def release(self, shard_name: str) -> None:
        """Give a shard up, done or not. What somebody took over meanwhile stays theirs."""
        with self._lock:
            self._held.discard(shard_name)
            if _read(self.path(shard_name)) == self._own:
                self.path(shard_name).unlink(missing_ok=True)

    def leave(self, shard_name: str) -> None:
        """Have a claim stand there without an owner, as a sign: whoever clears work/ removes it."""
        with self._lock:
            self._held.discard(shard_name)

    def beat(self) -> None:
        """Renew the lease of every claim that is held; forget those that somebody took over."""
        with self._lock:
            for shard_name in list(self._held):
                path = self.path(shard_name)
                if _read(path) != self._own:
                    self._held.discard(shard_name)
                    continue
                if isinstance(path, ObjectPath):
                    self._num_beats += 1
                    path.replace(self._content())
                    continue
                with suppress(FileNotFoundError):
                    os.utime(path)  # the file system's clock, which all workers share

    def close(self) -> None:
        """Give everything up."""
        for shard_name in list(self._held):
            self.release(shard_name)

    def path(self, shard_name: str) -> Place:
        """The file that says whose a shard is."""
        return self._work_dir / f"{shard_name}.claim"

    def _content(self) -> bytes:
        """What a claim of ours says; another version of an object after each heartbeat."""
        return json.dumps(asdict(self._own) | {"beats": self._num_beats}).encode()

    def _now(self) -> float:
        """By the clock that dates claims: that of a file system may be set at any time, that of a store is not."""
        if not isinstance(self._work_dir, ObjectPath):
            return time_there(self._work_dir)
        if self._store_ahead_seconds is None:
            self._store_ahead_seconds = time_there(self._work_dir) - time.monotonic()
        return time.monotonic() + self._store_ahead_seconds

    def _may_take_over(self, path: Place) -> bool:
        claim = _read(path)
        if claim == self._own:
            return True
        if claim.host == self._own.host and not is_alive(claim.pid):
            return True
        try:
            # A date in the future is as stale as one in the past: a live owner would have touched it since.
            return abs(self._now() - path.stat().st_mtime) >= self._lease_seconds
        except FileNotFoundError:  # just released
            return True


def claim_of(work_dir: Place, name: str) -> Claim:
    """Who has a shard, or helps with it, now; empty where nobody has."""
    return _read(work_dir / f"{name}.claim")


def _read(path: Place) -> Claim:
    try:
        content = json.loads(_read_bytes(path))
        return Claim(str(content["owner"]), str(content["host"]), int(content["pid"]))
    # Gone, torn, or not ours, with whatever is in it: the lease decides.
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Claim()


def _read_bytes(path: Place) -> bytes:
    if isinstance(path, ObjectPath):
        return path.read_bytes()[:_MOST_BYTES]
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would never answer
    try:
        return os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)


def _host() -> str:
    """The machine, and on Linux the process namespace: containers may share a host name, never a namespace."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def is_alive(pid: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
