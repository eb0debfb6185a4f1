"""Where a run stands, read from its files alone: no model, no source, no torch. Works while the run is on."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.meter import duration
from pipeline.option import option
from pipeline.plan import Plan, plan_of_run
from pipeline.worker_stats import WorkerStats, is_running, read_worker_stats
from pipeline.write.file import Place
from pipeline.write.journal import count_journal_rows
from pipeline.write.schema import ShardSummary
from pipeline.write.shard import published_shards

_MOST_LINES = 16  # about workers


@dataclass(kw_only=True, slots=True)
class StatusOptions:
    """The words that only `vlm-batch status` knows."""

    watch: bool = option(False, "show it every 5 seconds until the run is done")


@dataclass(frozen=True, slots=True)
class Status:
    """A run's progress. Records are (row, prompt, sample); with one prompt and one sample they are the rows."""

    plan: Plan
    shards: Mapping[int, ShardSummary]  # the published ones, by number
    num_journalled: int  # records in journals of other shards, about: two attempts may have answered the same one
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
        """Published error records by "stage/type", the commonest first."""
        found: Counter[str] = Counter()
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
    """
    plan = plan_of_run(output_dir)
    shards = published_shards(output_dir / "data", plan.plan_id, range(plan.num_shards) if ended else ())
    workers = read_worker_stats(output_dir / "stats", plan.plan_id)
    return Status(
        plan=plan,
        shards=shards,
        num_journalled=sum(_journalled(output_dir, plan, done=shards.keys())),
        workers=tuple(sorted(workers, key=lambda worker: -worker["started"])),
    )


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
    usual = statistics.median(worker["rows_per_second"] for worker in at_work) if at_work else 0.0
    slow = [worker for worker in at_work if worker["rows_per_second"] < usual / 2]
    told = running if len(running) <= _MOST_LINES else slow[:_MOST_LINES]
    for worker in sorted(told, key=lambda worker: worker["rank"]):
        heard = duration(max(0.0, time.time() - worker["updated"]))
        yield (
            f"worker   {worker['rank']} on {worker['host']}: {worker['state']}, {worker['num_answered']:,} rows, "
            f"{worker['rows_per_second']:.1f} rows/s, heard of {heard} ago"
            + (", slower than most" if worker in slow else "")
        )


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


def _journalled(output_dir: Place, plan: Plan, done: Collection[int]) -> Iterator[int]:
    """Records of each journal whose shard is not published: what a killed worker left beside a shard counts once."""
    names = {plan.shard(number).name for number in done}
    for path in (output_dir / "work").glob("part-*.journal"):
        if path.name.partition(".")[0] not in names:
            yield count_journal_rows(path, plan_id=plan.plan_id)
