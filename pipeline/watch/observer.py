"""A run as somebody sees it who looks at it every few seconds: what it does now, not on the average."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.errors import VlmBatchError
from pipeline.pace import Pace
from pipeline.status import Status, StatusReader, slower_than_most
from pipeline.worker_stats import WorkerStats, is_running
from pipeline.write.file import Place

_LEAST_SECONDS = 10.0  # of a pace: two heartbeats


@dataclass(frozen=True, slots=True)
class Look:
    """A run at a moment."""

    output_dir: str
    status: Status
    running: Collection[str]  # names of the workers that are at work
    rates: Mapping[str, float]  # of those: rows/s over the last while
    window_seconds: float  # that while; 0 where the rates are those since the start
    idle_seconds: float = 0.0  # so long nobody has been at work, as far as was seen
    problem: str = ""  # why this is an older look

    @property
    def ended(self) -> bool:
        """Whether the run is done: all is there, and nobody asks error rows again."""
        return self.status.complete and not self.running

    @property
    def workers(self) -> list[WorkerStats]:
        """Who is at work, and who no longer is without another start in its place; those of earlier crews left out."""
        at_work = [worker for worker in self.status.workers if worker["name"] in self.running]
        began = min((worker["started"] for worker in at_work), default=0.0)
        ranks = {worker.get("rank") for worker in at_work}
        gone = []
        for worker in self.status.workers:
            if worker["name"] not in self.running and worker["updated"] >= began and worker.get("rank") not in ranks:
                ranks.add(worker.get("rank"))
                gone.append(worker)
        return at_work + gone

    @property
    def at_work(self) -> list[WorkerStats]:
        return [worker for worker in self.status.workers if worker["name"] in self.running]

    @property
    def rate(self) -> float:
        """Rows/s of all, over the last while."""
        return sum(self.rates.values())

    @property
    def seconds_left(self) -> float | None:
        """At that rate; None where nothing gets done."""
        return (self.status.plan.num_records - self.status.num_done) / self.rate if self.rate > 0 else None

    @property
    def slow(self) -> Collection[str]:
        """Names of the workers that are much slower than most."""
        answering = [worker for worker in self.at_work if worker["state"] == "running"]
        return {worker["name"] for worker in slower_than_most(answering, lambda worker: self.rates[worker["name"]])}


class Observer:
    """Looks at one run again and again."""

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
        status = self._reader.read()
        running = [worker for worker in status.workers if is_running(worker)]
        if running:
            self._seen_at_work = time.monotonic()
        rates, window_seconds = self._rates(running)
        return Look(
            output_dir=str(self._output_dir),
            status=status,
            running=rates.keys(),
            rates=rates,
            window_seconds=window_seconds,
            idle_seconds=0.0 if running else time.monotonic() - self._seen_at_work,
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
            pace.note(worker["updated"], worker.get("num_answered", 0))
            lately = pace.per_second
            if lately is None or pace.seconds < _LEAST_SECONDS:
                rates[worker["name"]] = float(worker["rows_per_second"])
            else:
                rates[worker["name"]] = lately
                window_seconds = max(window_seconds, pace.seconds)
        return rates, window_seconds
