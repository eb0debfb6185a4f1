"""Says what everybody is at when nothing gets done any more: which part, which row, which line of code.

A run that hangs looks like one that works: a file system that does not answer, a kernel that never returns, a worker
that waits for a process which is gone. The watchdog only reads, so that it works where the rest does not.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline.preparation import Task
from pipeline.tally import Tally
from pipeline.tensors.pool import WorkerPool
from pipeline.vlm.base import EngineCounts

log = logging.getLogger(__name__)

_TICKS = 10  # looks in one period


class Watchdog:
    """While it is entered, a thread looks whether anything gets done: answers, decode steps, batches.

    Args:
        seconds: so long without progress is a stall; None = nobody looks.
        counts: what the engine did so far; None while the model loads.
        give_up: called after the report, if the run is to end; None = it goes on, and the next report comes after as
            long again.
    """

    def __init__(
        self,
        seconds: float | None,
        tally: Tally,
        pool: WorkerPool[Task, Any],
        counts: Callable[[], EngineCounts | None],
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self._seconds, self._give_up = seconds, give_up
        self._tally, self._pool, self._counts = tally, pool, counts
        self._closing = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()

    def _watch(self, seconds: float) -> None:
        last, since = self._progress, time.monotonic()
        while not self._closing.wait(seconds / _TICKS):
            now = self._progress
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since >= seconds:
                self._report(seconds)
                since = time.monotonic()
                if self._give_up is not None:
                    self._give_up()

    @property
    def _progress(self) -> object:
        counts = self._counts()
        return self._tally.num_done, counts and (counts.num_decode_steps, counts.num_batches, counts.num_images_encoded)

    def _report(self, seconds: float) -> None:
        tally, what = self._tally, "the model is loading"
        if counts := self._counts():
            what = (
                f"{counts.num_batches:,} batches of prompts and {counts.num_decode_steps:,} decode steps were computed"
            )
        log.error("nothing got done for %g s (stall_seconds); %s", seconds, what)
        log.error("  %s of %s rows are done", f"{tally.num_done:,}", f"{tally.num_records:,}")
        log.error("  the threads of this process:")
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        for task, busy_seconds in self._pool.at_work():
            log.error("  a worker process is at row %s for %.0f s", task.row.id, busy_seconds)
