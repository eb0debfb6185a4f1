"""Claims: who is at which shard now, so that two workers do not do the same work. Advisory: nothing relies on them.

A claim is a file `work/part-00042.claim` that names its owner. The owner touches it every now and then; one that was
not touched for the length of a lease, or whose process on this host is gone, may be taken over. Two workers that take a
claim over at the same moment both do the shard, and its exclusive publication keeps one result.

A shard that somebody else has is left for later: never wait for it while rows of one's own are on their way, or two
workers wait for each other.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.write.crash_point import crash_point

LEASE_SECONDS = 60.0
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
        lease_seconds: how long a claim holds without a heartbeat.
    """

    def __init__(self, work_dir: Path, owner: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._work_dir, self._lease_seconds = work_dir, lease_seconds
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
        path = self._path(shard_name)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        content = json.dumps({"owner": self._own.owner, "host": self._own.host, "pid": self._own.pid})
        self._work_dir.mkdir(exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        try:
            try:
                os.link(temporary, path)
            except OSError:  # somebody has it, or there are no hard links here
                if path.exists() and not self._may_take_over(path, now=temporary.stat().st_mtime):
                    return False
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        taken = _read(path) == self._own  # of two that take over, the last one has it
        if taken:
            self._held.add(shard_name)
            crash_point("claim_taken")
        return taken

    def release(self, shard_name: str) -> None:
        """Give a shard up, done or not. What somebody took over meanwhile stays theirs."""
        with self._lock:
            self._held.discard(shard_name)
            if _read(self._path(shard_name)) == self._own:
                self._path(shard_name).unlink(missing_ok=True)

    def beat(self) -> None:
        """Renew the lease of every claim that is held; forget those that somebody took over."""
        with self._lock:
            for shard_name in list(self._held):
                path = self._path(shard_name)
                if _read(path) != self._own:
                    self._held.discard(shard_name)
                    continue
                with suppress(FileNotFoundError):
                    os.utime(path)  # the file system's clock, which all workers share

    def close(self) -> None:
        """Give everything up."""
        for shard_name in list(self._held):
            self.release(shard_name)

    def _path(self, shard_name: str) -> Path:
        return self._work_dir / f"{shard_name}.claim"

    def _may_take_over(self, path: Path, now: float) -> bool:
        claim = _read(path)
        if claim == self._own:
            return True
        if claim.host == self._own.host and not is_alive(claim.pid):
            return True
        try:
            # A date in the future is as stale as one in the past: a live owner would have touched it since.
            return abs(now - path.stat().st_mtime) >= self._lease_seconds
        except FileNotFoundError:  # just released
            return True


def _read(path: Path) -> Claim:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would never answer
        try:
            content = json.loads(os.read(descriptor, _MOST_BYTES))
        finally:
            os.close(descriptor)
        return Claim(str(content["owner"]), str(content["host"]), int(content["pid"]))
    # Gone, torn, or not ours, with whatever is in it: the lease decides.
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Claim()


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
