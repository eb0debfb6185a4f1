"""What a run did so far: counts, rates, waiting. Shown as a bar or as lines, and written to stats/ as a heartbeat.

Each worker writes what it did itself. Rank 0 shows what all of them did, as the others' heartbeats say it.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from pipeline.other_workers import OtherWorkers
from pipeline.pace import Pace
from pipeline.tally import Tally
from pipeline.tracking.base import Figures, RunFigures
from pipeline.tracking.relay import Relay, close_all
from pipeline.vlm.base import CountingEngine
from pipeline.worker_stats import Series, WorkerStats, heartbeat_seconds
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_LINE_SECONDS = 30.0


class Meter:
    """Times one worker; rank 0 shows them all: a bar on a terminal, a line every half minute elsewhere.

    While it is entered, until it ends, a thread writes the heartbeat, so that a worker whose model takes long to load,
    or to answer, does not pass for dead.

    Args:
        relays: who is told the figures of each heartbeat.
    """

    def __init__(
        self,
        tally: Tally,
        stats_dir: Place,
        *,
        rank: int,
        plan_id: str,
        relays: Sequence[Relay] = (),
        stream: TextIO | None = None,
    ) -> None:
        self._tally, self._rank, self._plan_id, self._relays = tally, rank, plan_id, relays
        self._path = stats_dir / f"worker-{rank}-{uuid.uuid4().hex[:8]}.json"
        self._heartbeat_seconds = heartbeat_seconds(stats_dir)
        self._others = OtherWorkers(self._path, plan_id)
        self._num_done_before = tally.num_done
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._started_at = time.time()
        self._last_line = self._started
        self.waiting_for_input_seconds = self.writing_seconds = 0.0
        self.loading_seconds = 0.0
        self._series = Series("seconds", "num_answered", "waiting_for_input_seconds")
        self._bar: Any = None
        self._engine: CountingEngine | None = None
        self._rows, self._tokens = Pace(), Pace()  # of all workers, where somebody is told
        self._state = "loading"
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Meter:
        self.beat()
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        close_all(self._relays)

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

    def loaded(self, engine: CountingEngine | None = None) -> None:
        """The model is loaded: answers can come from here on. engine: says in each heartbeat what it did so far."""
        self.loading_seconds, self._state, self._engine = self.seconds, "running", engine
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
        if self._bar is None and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            print(self._line(), file=self._stream, flush=True)

    def beat(self) -> None:
        """A heartbeat: say what this worker did, and at rank 0 look what the others say."""
        self._say(self._state, {})

    def end(self, state: str, more: Mapping[str, Any]) -> None:
        """The last word, after which no heartbeat follows. more: what is known at the end alone."""
        self._close()
        self._say(state, more)
        close_all(self._relays)

    def _close(self) -> None:
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
            self.beat()

    def _say(self, state: str, more: Mapping[str, Any]) -> None:
        content = self._content(state)
        self._write(content | dict(more))
        if self._rank == 0:
            self._others.look()
            self._postfix()
        if self._relays:
            run = self._run_figures(content) if self._rank == 0 else None
            for relay in self._relays:
                relay.tell(Figures(content, self._tally.num_records, run))

    def _write(self, content: Mapping[str, Any]) -> None:
        """stats/worker-RANK-*.json: what this worker did, replaced in one step."""
        text = json.dumps(content, indent=1)
        try:
            if isinstance(self._path, ObjectPath):
                self._path.replace(text.encode())
            else:
                beside = self._path.with_suffix(".tmp")
                beside.write_text(text)
                os.replace(beside, self._path)
        except OSError as problem:  # a full disk ends the run where an answer cannot be kept, not where a figure cannot
            log.warning("%s could not be written: %s", self._path, problem)

    def _content(self, state: str) -> dict[str, Any]:
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
            "memory_bytes": resident_bytes(),
            "error_examples": dict(tally.examples),
            "newest_errors": list(tally.newest_errors),
            "series": self._series.until(*self._point),
        }
        return content | ({"engine": asdict(self._engine.counts)} if self._engine else {})

    def _run_figures(self, own: WorkerStats) -> RunFigures:
        """Of all workers, as of the last look at the others."""
        others, at_work = self._others, [own, *self._others.running]
        self._rows.note(self.seconds, self._num_done)
        self._tokens.note(self.seconds, own["num_generated_tokens"] + others.num_generated_tokens)
        seconds = sum(worker["seconds"] - worker["loading_seconds"] for worker in at_work if worker["loading_seconds"])
        waiting = sum(worker["waiting_for_input_seconds"] for worker in at_work)
        return RunFigures(
            rows_done=self._num_done,
            errors=self._tally.num_errors + others.num_errors,
            workers=others.num_running + (own["state"] in ("loading", "running")),
            rows_per_second=self._rows.per_second or 0.0,
            tokens_per_second=self._tokens.per_second or 0.0,
            waiting_share=waiting / max(1e-9, seconds),
            memory_bytes=sum(worker.get("memory_bytes", 0) for worker in at_work),
        )

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


def resident_bytes() -> int:
    """Memory of this process that is in use now, or where Linux does not say it, the most that ever was."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
