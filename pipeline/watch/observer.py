"""A run as somebody sees it who looks at it every few seconds: what it does now, not on the average."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.errors import VlmBatchError
from pipeline.pace import Pace
from pipeline.status import Status, StatusReader, slower_than_most
from pipeline.worker_stats import WorkerStats, is_running
from pipeline.write.file import Place

_LEAST_SECONDS = 10.0  # of a pace: two heartbeats
_MOST_NEWEST = 5


class NewestError(NamedTuple):
    """As a worker's heartbeat says it."""

    time: float  # seconds since the epoch
    kind: str  # "stage/type"
    example: str  # id and message


@dataclass(frozen=True, slots=True)
class Look:
    """A run at a moment. What takes long with thousands of shards is counted once, since it is drawn twice a second."""

    output_dir: str
    num_records: int
    num_done: int  # records
    num_shards: int
    num_shards_done: int
    errors: Mapping[str, int]  # "stage/type" -> records, the commonest first
    at_work: Sequence[WorkerStats]  # newest first
    gone: Sequence[WorkerStats]  # who no longer is, of the crew that is at work, and was not started again
    rates: Mapping[str, float]  # of those at work, by name: rows/s over the last while
    window_seconds: float  # that while; 0 where the rates are those since the start
    slow: Collection[str]  # names of those that are much slower than most
    newest_errors: Sequence[NewestError]  # of all workers, the newest first
    idle_seconds: float = 0.0  # so long nobody has been at work, as far as was seen
    problem: str = ""  # why this is an older look

    @property
    def complete(self) -> bool:
        """Whether every shard is published; error rows may be asked again."""
        return self.num_shards_done == self.num_shards

    @property
    def ended(self) -> bool:
        """Whether the run is done: all is there, and nobody is at it any more."""
        return self.complete and not self.at_work

    @property
    def rate(self) -> float:
        """Rows/s of all, over the last while."""
        return sum(self.rates.values())

    @property
    def seconds_left(self) -> float | None:
        """At that rate; None where nothing gets done."""
        return (self.num_records - self.num_done) / self.rate if self.rate > 0 else None


class Observer:
    """Looks at one run again and again. `status` is that of the last look."""

    status: Status

    def __init__(self, output_dir: Place) -> None:
        self._output_dir = output_dir
        self._reader = StatusReader(output_dir)
        self._paces: dict[str, Pace] = {}
        self._seen_at_work = time.monotonic()

    def look(self) -> Look:
        """The run now.

        Raises:
            UsageError, RunFailed: as read_status().
        """
        status = self.status = self._reader.read()
        at_work = [worker for worker in status.workers if is_running(worker)]
        if at_work:
            self._seen_at_work = time.monotonic()
        rates, window_seconds = self._rates(at_work)
        answering = [worker for worker in at_work if worker["state"] == "running"]
        return Look(
            output_dir=str(self._output_dir),
            num_records=status.plan.num_records,
            num_done=status.num_done,
            num_shards=status.plan.num_shards,
            num_shards_done=status.num_shards_done,
            errors=status.errors,
            at_work=at_work,
            gone=_gone(status.workers, at_work),
            rates=rates,
            window_seconds=window_seconds,
            slow={worker["name"] for worker in slower_than_most(answering, lambda worker: rates[worker["name"]])},
            newest_errors=_newest_errors(status.workers),
            idle_seconds=0.0 if at_work else time.monotonic() - self._seen_at_work,
        )

    def look_again(self, last: Look) -> Look:
        """The run now, or the last look where it cannot be read: a file system may be away for a while."""
        try:
            return self.look()
        except (VlmBatchError, OSError) as problem:
            return replace(last, problem=str(problem))

    def _rates(self, running: Sequence[WorkerStats]) -> tuple[dict[str, float], float]:
        """Of each worker, and over how many seconds the longest of them."""
        self._paces = {worker["name"]: self._paces.get(worker["name"], Pace()) for worker in running}
        rates, window_seconds = {}, 0.0
        for worker in running:
            pace = self._paces[worker["name"]]
            if worker["state"] == "running":  # the time that a model takes to load says nothing about its pace
                pace.note(worker["updated"], worker.get("num_answered", 0))
            lately = pace.per_second
            if lately is None or pace.seconds < _LEAST_SECONDS:
                rates[worker["name"]] = float(worker["rows_per_second"])
            else:
                rates[worker["name"]] = lately
                window_seconds = max(window_seconds, pace.seconds)
        return rates, window_seconds


def _gone(workers: Sequence[WorkerStats], at_work: Sequence[WorkerStats]) -> list[WorkerStats]:
    """Newest first. A rank that was started again is not gone; nor is who belonged to an earlier crew missed."""
    began = min((worker["started"] for worker in at_work), default=0.0)
    ranks = {worker.get("rank") for worker in at_work}
    names = {worker["name"] for worker in at_work}
    gone = []
    for worker in workers:
        if worker["name"] not in names and worker["updated"] >= began and worker.get("rank") not in ranks:
            ranks.add(worker.get("rank"))
            gone.append(worker)
    return gone


def _newest_errors(workers: Sequence[WorkerStats]) -> list[NewestError]:
    found = [NewestError(*error) for worker in workers for error in worker.get("newest_errors", ())]
    return sorted(found, reverse=True)[:_MOST_NEWEST]
