"""Where a run stands, read from its files alone: no model, no source, no torch. Works while the run is on."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.meter import duration
from pipeline.option import option
from pipeline.plan import Plan, plan_of_run
from pipeline.worker_stats import WorkerStats, WorkerStatsFiles, is_running
from pipeline.write.file import Place
from pipeline.write.journal import JournalCount
from pipeline.write.object_store import ObjectPath
from pipeline.write.schema import ShardSummary
from pipeline.write.seen import SeenFiles
from pipeline.write.shard import shards_there, summary_of_plan

_MOST_LINES = 16  # about workers


@dataclass(kw_only=True, slots=True)
class StatusOptions:
    """The words that only `vlm-batch status` knows."""

    watch: bool = option(False, "show it live until the run is done; q or Ctrl-C ends the look, never the run")
    idle_seconds: float = option(300.0, "seconds without any worker at work after which watch=true ends", least=0)


@dataclass(frozen=True, slots=True)
class Status:
    """A run's progress. Records are (row, prompt, sample); with one prompt and one sample they are the rows."""

    plan: Plan
    shards: Mapping[int, ShardSummary]  # the published ones, by number
    num_journalled: int  # records in journals of other shards, about: two attempts may have answered the same one
    journalled_errors: Mapping[str, int] = field(default_factory=dict)  # by "stage/type"
    workers: tuple[WorkerStats, ...] = ()  # of this plan, newest first

    @property
    def num_shards_done(self) -> int:
        return len(self.shards)

    @property
    def num_published(self) -> int:
        """Records in published shards."""
        return sum(summary.num_rows for summary in self.shards.values())

    @property
    def errors(self) -> Mapping[str, int]:
        """Error records by "stage/type", the commonest first."""
        found = Counter(self.journalled_errors)
        for summary in self.shards.values():
            found.update(summary.errors)
        return dict(found.most_common())

    @property
    def complete(self) -> bool:
        return self.num_shards_done == self.plan.num_shards

    @property
    def num_done(self) -> int:
        return min(self.plan.num_records, self.num_published + self.num_journalled)

    @property
    def running(self) -> list[WorkerStats]:
        """Workers that are at work now."""
        return [worker for worker in self.workers if is_running(worker)]


def read_status(output_dir: Place, *, ended: bool = False) -> Status:
    """The status of a run.

    ended: every shard should be there, and is looked for by name where a listing is late.

    Raises:
        UsageError: there is no run in this folder.
        RunFailed: a shard is there and cannot be read now.
    """
    return StatusReader(output_dir).read(ended=ended)


class StatusReader:
    """Reads the status of a run again and again, and of its files only what is new: a run has thousands of shards."""

    def __init__(self, output_dir: Place) -> None:
        self._output_dir = output_dir
        self._stats = WorkerStatsFiles(output_dir / "stats")
        self._plan_id = ""

    def read(self, *, ended: bool = False) -> Status:
        """The status now. ended: as read_status() takes it.

        Raises:
            UsageError, RunFailed: as read_status().
        """
        plan = plan_of_run(self._output_dir)
        if plan.plan_id != self._plan_id:
            self._plan_id = plan.plan_id
            self._shards = SeenFiles(partial(summary_of_plan, plan_id=plan.plan_id))
            self._journals: dict[str, JournalCount] = {}
        files = shards_there(self._output_dir / "data", range(plan.num_shards) if ended else ())
        numbers = {path.name: (number, path) for number, path in files.items()}
        summaries = self._shards.read(path for _, path in numbers.values())
        shards = {numbers[name][0]: found for name, found in summaries.items() if found is not None}
        self._count_journals(plan, done=shards.keys())
        workers = self._stats.read(plan.plan_id)
        return Status(
            plan=plan,
            shards=shards,
            num_journalled=sum(count.num_rows for count in self._journals.values()),
            journalled_errors=sum((count.errors for count in self._journals.values()), Counter()),
            workers=tuple(sorted(workers, key=lambda worker: -worker["started"])),
        )

    def _count_journals(self, plan: Plan, done: Collection[int]) -> None:
        """Those whose shard is not published: what a killed worker left beside a shard counts once."""
        names = {plan.shard(number).name for number in done}
        known, self._journals = self._journals, {}
        for path in (self._output_dir / "work").glob("part-*.journal"):
            if path.name.partition(".")[0] in names:
                continue
            count = self._journals[path.name] = known.get(path.name, JournalCount())
            if not count.num_bytes or not isinstance(path, ObjectPath):  # an object never grows
                count.look(path, plan_id=plan.plan_id)


def status_lines(output_dir: Place, status: Status) -> Iterator[str]:
    """The status as people read it."""
    plan, errors = status.plan, status.errors
    share = status.num_done / plan.num_records if plan.num_records else 1.0
    yield f"folder   {output_dir}"
    yield f"rows     {status.num_done:,} of {plan.num_records:,} done ({share:.1%})"
    yield f"shards   {status.num_shards_done:,} of {plan.num_shards:,} published"
    yield f"errors   {sum(errors.values()):,}" + "".join(
        f"\n           {number:,} x {kind}" for kind, number in errors.items()
    )
    if status.complete:
        yield "state    done"
        return
    running = status.running
    if not running:
        last = f", last heard of as {status.workers[0]['state']!r}" if status.workers else ""
        yield f"state    not running{last}; the same command goes on where it stopped"
        return
    rate = sum(worker["rows_per_second"] for worker in running)
    left = duration((plan.num_records - status.num_done) / rate) if rate else "unknown time"
    yield f"state    running, {_number(running, 'worker')}, {rate:.1f} rows/s, {left} left"
    if len(running) > 1:
        yield from _worker_lines(running)


def progress_line(output_dir: Place) -> str:
    """How far a run is, in one line.

    Raises:
        UsageError: there is no run in this folder.
    """
    status = read_status(output_dir)
    rate = sum(worker["rows_per_second"] for worker in status.running)
    return f"{status.num_done:,} of {status.plan.num_records:,} rows, {rate:.1f} rows/s"


def _worker_lines(running: Sequence[WorkerStats]) -> Iterator[str]:
    """A few workers one by one; of many those that are much slower than most."""
    at_work = [worker for worker in running if worker["state"] == "running"]
    slow = slower_than_most(at_work, lambda worker: float(worker["rows_per_second"]))
    told = running if len(running) <= _MOST_LINES else slow[:_MOST_LINES]
    for worker in sorted(told, key=lambda worker: worker["rank"]):
        heard = duration(max(0.0, time.time() - worker["updated"]))
        yield (
            f"worker   {worker['rank']} on {worker['host']}: {worker['state']}, {worker['num_answered']:,} rows, "
            f"{worker['rows_per_second']:.1f} rows/s, heard of {heard} ago"
            + (", slower than most" if worker in slow else "")
        )


def slower_than_most(workers: Sequence[WorkerStats], rate: Callable[[WorkerStats], float]) -> list[WorkerStats]:
    """Workers with less than half of the usual rate (the median)."""
    usual = statistics.median(map(rate, workers)) if workers else 0.0
    return [worker for worker in workers if rate(worker) < usual / 2]


def _number(things: Sequence[object], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def phases(workers: Sequence[WorkerStats]) -> dict[str, float]:
    """Shares of the workers' time since their models were loaded, by what they did; they sum to 1."""
    seconds: dict[str, float] = defaultdict(float)
    for worker in workers:
        engine = worker.get("engine", {})
        seconds["waiting for input"] += worker["waiting_for_input_seconds"]
        for name in ("trial", "vision", "prefill", "decode"):
            seconds[name] += engine.get(f"{name}_seconds", 0.0)
        seconds["writing"] += worker["writing_seconds"]
    whole = max(1e-9, sum(worker["seconds"] - worker["loading_seconds"] for worker in workers))
    shares = {
        name: value / whole for name, value in seconds.items() if value or name in ("waiting for input", "writing")
    }
    return shares | {"other": max(0.0, 1 - sum(shares.values()))}
