"""The worker processes of one host, and one that looks after them.

They know nothing of each other and meet in the output folder: one that dies leaves its shards to the others, and is
started again, so that it takes part in what is left.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from pipeline.ending import exit_code_of, log_to_stderr
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.ranks import Ranks

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 5.0  # with workers that are at something when another one has returned
_MAX_RESTARTS = 16  # of each rank: enough to find some rows that end processes (pipeline/write/suspects.py)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_OWN_ENDINGS = {0, RunFailed.exit_code, UsageError.exit_code, Interrupted.exit_code}
_WATCH_SECONDS = 1.0


class Crew:
    """The processes of all ranks.

    Args:
        work: see cluster.base.Job.
        gpus: names for CUDA_VISIBLE_DEVICES; each process sees one of them. Empty = the processes see what is there.
        first: the rank of the first process, where other hosts have ranks as well.
        world: the number of all ranks; None = there are no others.
    """

    def __init__(
        self,
        work: Callable[[int, int], None],
        num_workers: int,
        gpus: Sequence[str],
        *,
        first: int = 0,
        world: int | None = None,
    ) -> None:
        self._work, self._num_workers, self._gpus = work, num_workers, gpus
        self._first, self._world = first, world or num_workers
        self.signals: set[int] = set()  # that came while it ran
        self._processes: dict[int, SpawnProcess] = {}  # of each rank that has not ended
        self._exit_codes: dict[int, int] = {}  # of each that has
        self._num_restarts: Counter[int] = Counter()
        self._dismissed: set[int] = set()  # ranks that were asked to stop because all rows are there
        self._stopping = False
        self._num_interrupts = 0

    def run(self) -> None:
        """Start all, and return when the work is done.

        Raises:
            Interrupted: a signal came; each process had its time to put down what was finished.
            RunFailed: all have ended, and none of them because the work was done.
        """
        with self._listening():
            for rank in range(self._first, self._first + self._num_workers):
                self._start(rank)
            done_since: float | None = None
            while self._processes:
                wait([process.sentinel for process in self._processes.values()], timeout=_WATCH_SECONDS)
                if done_since is None and 0 in self._exit_codes.values():
                    done_since = time.monotonic()
                if done_since is not None and time.monotonic() - done_since > _PATIENCE_SECONDS:
                    done_since = math.inf
                    self._dismiss()
                for rank, process in list(self._processes.items()):
                    if process.exitcode is not None:
                        del self._processes[rank]
                        self._ended(rank, process.exitcode)
        self._conclude()

    def _start(self, rank: int) -> None:
        own = Ranks(rank, self._world, rank - self._first, self._num_workers)
        visible = {"CUDA_VISIBLE_DEVICES": self._gpus[own.local_rank % len(self._gpus)]} if self._gpus else {}
        process = multiprocessing.get_context("spawn").Process(
            target=_rank, args=(self._work, own, os.getpid()), name=f"worker {rank}"
        )
        with _environment(own.environment | visible), _no_interrupts():
            process.start()
        self._processes[rank] = process
        if self._stopping:  # a signal that came while it was started has not reached it
            process.terminate()

    def _ended(self, rank: int, exit_code: int) -> None:
        done = 0 in self._exit_codes.values()
        if exit_code in _OWN_ENDINGS or self._stopping or done:
            self._exit_codes[rank] = exit_code
        elif self._num_restarts[rank] >= _MAX_RESTARTS:
            log.warning("worker %d %s, and is not started again", rank, _how(exit_code))
            self._exit_codes[rank] = exit_code
        else:
            self._num_restarts[rank] += 1
            log.warning(
                "worker %d %s; it is started again (%d of %d times)",
                rank,
                _how(exit_code),
                self._num_restarts[rank],
                _MAX_RESTARTS,
            )
            self._start(rank)

    def _dismiss(self) -> None:
        """All rows are there: nobody needs what a slow worker is still at."""
        self._dismissed = set(self._processes)
        for process in self._processes.values():
            process.terminate()

    def _conclude(self) -> None:
        codes = dict(sorted(self._exit_codes.items()))
        failed = {rank: code for rank, code in codes.items() if code}
        if len(failed) < len(codes):
            for rank, code in failed.items():
                if rank in self._dismissed:
                    continue
                log.warning("worker %d %s; what it left was done by others", rank, _how(code))
            return
        if self._stopping or set(codes.values()) == {Interrupted.exit_code}:
            raise Interrupted("Stopped by a signal; what is finished is on disk. Run the same command again to go on.")
        what = "; ".join(f"worker {rank} {_how(code)}" for rank, code in failed.items())
        if set(codes.values()) == {UsageError.exit_code}:
            raise UsageError(f"{what}. The reason stands above.")
        raise RunFailed(f"no worker is left: {what}. Reasons stand above; the same command goes on.")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """A terminal's Ctrl-C has reached the processes, too, each of which counts for itself."""
        self.signals.add(number)
        self._num_interrupts += number == signal.SIGINT
        self._stopping = True
        for process in self._processes.values():
            if self._num_interrupts >= 3:
                process.kill()
            else:
                process.terminate()
        if self._num_interrupts >= 3:
            os._exit(Interrupted.exit_code)


def _rank(work: Callable[[int, int], None], own: Ranks, parent: int) -> None:
    """What a process does; the first of a host speaks for all of what they do alike."""
    threading.Thread(target=_follow, args=(parent,), name="parent", daemon=True).start()
    log_to_stderr(level=logging.WARNING if own.local_rank else logging.INFO, prefix=f"[{own.rank}] ")

    def done() -> int:
        work(own.rank, own.world)
        return 0

    sys.exit(exit_code_of(done, name=f"[{own.rank}] vlm-batch"))


def _follow(parent: int) -> None:
    """Whoever looks after us was killed: end in good order."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


@contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    """What a process that is started now finds in its environment."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """A process that is started now ignores a terminal's Ctrl-C until it has begun to listen to signals itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
