"""What a run did so far: counts, rates, waiting. Shown as a bar or as lines, and written to stats/ as a heartbeat.

Each worker writes what it did itself. Rank 0 shows what all of them did, as the others' heartbeats say it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from pipeline.tally import Tally
from pipeline.worker_stats import Series, WorkerStats, heartbeat_seconds, is_running, read_worker_stats
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_LINE_SECONDS = 30.0


class Meter:
    """Times one worker; rank 0 shows them all: a bar on a terminal, a line every half minute elsewhere.

    While it is entered, until it is closed, a thread writes the heartbeat, so that a worker whose model takes long to
    load, or to answer, does not pass for dead.
    """

    def __init__(
        self, tally: Tally, stats_dir: Place, *, rank: int, plan_id: str, stream: TextIO | None = None
    ) -> None:
        self._tally, self._rank, self._plan_id = tally, rank, plan_id
        self._path = stats_dir / f"worker-{rank}-{uuid.uuid4().hex[:8]}.json"
        self._heartbeat_seconds = heartbeat_seconds(stats_dir)
        self._others = _Others(self._path, plan_id)
        self._num_done_before = tally.num_done
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._started_at = time.time()
        self._last_look = self._last_line = self._started
        self.waiting_for_input_seconds = self.writing_seconds = 0.0
        self.loading_seconds = 0.0
        self._series = Series("seconds", "num_answered", "waiting_for_input_seconds")
        self._bar: Any = None
        self._state = "loading"
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Meter:
        self.write(self._state, {})
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Since the worker began."""
        return time.monotonic() - self._started

    @property
    def rows_per_second(self) -> float:
        """Answered by this start, from the moment the model was loaded."""
        return self._tally.num_answered / max(1e-9, self.seconds - self.loading_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self._tally.num_generated_tokens / max(1e-9, self.seconds - self.loading_seconds)

    def loaded(self) -> None:
        """The model is loaded: answers can come from here on."""
        self.loading_seconds, self._state = self.seconds, "running"
        self._last_line = time.monotonic()
        if self._rank == 0 and self._stream.isatty():
            self._bar = tqdm(
                total=self._tally.num_records, initial=self._num_done, unit="row", file=self._stream, smoothing=0.05
            )

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass items through, and time how long the engine waited for them."""
        while True:
            began = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.waiting_for_input_seconds += time.monotonic() - began
            yield item

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Time what is done within: answers on their way to the disk."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.writing_seconds += time.monotonic() - began

    def show(self) -> None:
        """Bring bar or line up to date; cheap, called after every answer."""
        self._series.add(*self._point)
        if self._rank:
            return
        if self._bar is not None:
            self._bar.update(self._num_done - self._bar.n)
        now = time.monotonic()
        if now - self._last_look >= self._heartbeat_seconds:
            self._last_look = now
            self._others.look()
            self._postfix()
        if self._bar is None and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            print(self._line(), file=self._stream, flush=True)

    def write(self, state: str, more: Mapping[str, Any]) -> None:
        """stats/worker-RANK-*.json: what this worker did, replaced in one step."""
        tally = self._tally
        self._series.add(*self._point)
        content = {
            "plan_id": self._plan_id,
            "rank": self._rank,
            "state": state,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._started_at,
            "updated": time.time(),
            "heartbeat_seconds": self._heartbeat_seconds,
            "seconds": round(self.seconds, 3),
            "loading_seconds": round(self.loading_seconds, 3),
            "waiting_for_input_seconds": round(self.waiting_for_input_seconds, 3),
            "writing_seconds": round(self.writing_seconds, 3),
            "num_answered": tally.num_answered,
            "num_errors": tally.num_failed,
            "num_generated_tokens": tally.num_generated_tokens,
            "rows_per_second": round(self.rows_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "error_examples": tally.examples,
            "series": self._series.until(*self._point),
        }
        text = json.dumps(content | dict(more), indent=1)
        try:
            if isinstance(self._path, ObjectPath):
                self._path.replace(text.encode())
            else:
                beside = self._path.with_suffix(".tmp")
                beside.write_text(text)
                os.replace(beside, self._path)
        except OSError as problem:  # a full disk ends the run where an answer cannot be kept, not where a figure cannot
            log.warning("%s could not be written: %s", self._path, problem)

    def close(self) -> None:
        """No heartbeat follows: what is written after this is the last word."""
        self._closing.set()
        if self._heart.is_alive():
            self._heart.join()
        if self._bar is not None:
            self._bar.update(self._num_done - self._bar.n)
            self._postfix()
            self._bar.close()
            self._bar = None

    def _beat(self) -> None:
        while not self._closing.wait(self._heartbeat_seconds):
            self.write(self._state, {})

    @property
    def _point(self) -> tuple[float, float, float]:
        return self.seconds, self._tally.num_answered, self.waiting_for_input_seconds

    @property
    def _num_done(self) -> int:
        """By all workers, about: two may have answered the same record."""
        tally = self._tally
        by_all = self._num_done_before + tally.num_answered + self._others.num_answered
        return min(tally.num_records, max(tally.num_done, by_all))

    def _postfix(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)

    def _line(self) -> str:
        num_records, rate = self._tally.num_records, self.rows_per_second + self._others.rows_per_second
        left = duration((num_records - self._num_done) / max(1e-9, rate))
        return f"{self._num_done:,} of {num_records:,} rows, {rate:.1f} rows/s, {self._rates()}, {left} left"

    def _rates(self) -> str:
        tokens_per_second = self.tokens_per_second + self._others.tokens_per_second
        workers = f", {1 + self._others.num_running} workers" if self._others.num_running else ""
        return f"{tokens_per_second:.0f} tokens/s, {self._tally.num_errors + self._others.num_errors:,} errors{workers}"


class _Others:
    """The other workers of a run, as their heartbeats say; what they did before this one began does not count."""

    def __init__(self, own_path: Place, plan_id: str) -> None:
        self._own_path, self._plan_id = own_path, plan_id
        self.num_answered = self.num_errors = self.num_running = 0
        self.rows_per_second = self.tokens_per_second = 0.0
        self._before = {worker["name"]: worker for worker in self._stats()}

    def look(self) -> None:
        """Read their heartbeats."""
        there = list(self._stats())
        running = [worker for worker in there if is_running(worker)]
        self.num_running = len(running)
        self.num_answered, self.num_errors = (self._since(there, key) for key in ("num_answered", "num_errors"))
        self.rows_per_second, self.tokens_per_second = (
            sum(worker[key] for worker in running) for key in ("rows_per_second", "tokens_per_second")
        )

    def _since(self, there: Iterable[WorkerStats], key: str) -> int:
        return sum(worker.get(key, 0) - self._before.get(worker["name"], {}).get(key, 0) for worker in there)

    def _stats(self) -> list[WorkerStats]:
        found = read_worker_stats(self._own_path.parent, self._plan_id)
        return [worker for worker in found if worker["name"] != self._own_path.stem]


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
