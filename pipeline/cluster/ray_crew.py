"""The actors of a run on a Ray cluster, and the process that looks after them.

As the processes of one host do (crew.py), they meet in the output folder alone. Ray says when one of them has died,
with its process or its node; it is started again wherever there is room, and takes part in what is left.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from pipeline.cluster.base import Job
from pipeline.cluster.ray_worker import Bell, Ending, Task, Worker, plan_in
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.ranks import Ranks
from pipeline.shown import shown

if TYPE_CHECKING:
    from pipeline.cluster.ray import Demand

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_WATCH_SECONDS, _SHORT_SECONDS = 1.0, 0.1
_GATHER_SECONDS = 5.0  # those who have a place wait for others, to know how many share a host
_PATIENCE_SECONDS = 10.0  # until it is said that there is no room, and again every so often
_REMINDER_SECONDS = 60.0
_FAREWELL_SECONDS = 5.0  # for the others, once all rows are there; then they are asked to stop
_RING_SECONDS = 10.0
_LAST_SECONDS = 120.0  # then they are not waited for


class Signals:
    """What came for this process."""

    def __init__(self) -> None:
        self.stop = False
        self._num_interrupts = 0

    def listen(self) -> None:
        """From now on, or again."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts >= 3:  # Ray ends the actors of a process that is gone
            os._exit(Interrupted.exit_code)


@contextmanager
def listening() -> Iterator[Signals]:
    """Signals are noted, and handled as before once it is left."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    signals = Signals()
    try:
        signals.listen()
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class _Member:
    """A worker that has not ended. reply: a reference to its place, then to its ending; None in between."""

    actor: Any
    reply: Any
    host: str | None = None
    at_work: bool = False


class RayCrew:
    """The actors of all ranks. This process has to be connected to a cluster.

    Args:
        demand: how many, and what Ray sets aside for each.
        max_restarts: of each rank.
    """

    def __init__(self, job: Job, demand: Demand, max_restarts: int, signals: Signals) -> None:
        self._demand, self._max_restarts, self._signals = demand, max_restarts, signals
        threads = os.environ.get("OMP_NUM_THREADS")
        plan = plan_in(job.output_dir)
        self._task = Task(job.work, job.output_dir, os.getcwd(), plan, threads, demand.max_cores)
        self._members: dict[int, _Member] = {}
        self._endings: dict[int, Ending] = {}
        self._num_restarts: Counter[int] = Counter()
        self._gathered_at = self._looked_at = time.monotonic()
        self._num_missed = 0  # of whom it was said that there is no room
        self._done_at: float | None = None
        self._bell: Any = None
        self._has_rung = False

    def run(self) -> None:
        """Start all, and return when the work is done.

        Raises:
            Interrupted: a signal came; each worker had its time to put down what was finished.
            RunFailed, UsageError: all have ended, and none of them because the work was done.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        num_listeners = (self._max_restarts + 1) * self._demand.num_workers + 1  # and who rings
        self._bell = (
            ray.remote(Bell).options(num_cpus=0, max_concurrency=num_listeners, scheduling_strategy=here).remote()
        )
        for rank in range(self._demand.num_workers):
            self._start(rank)
        self._gathered_at = self._looked_at = time.monotonic()
        while self._members:
            replies = {member.reply: rank for rank, member in self._members.items() if member.reply is not None}
            if not replies:  # all have a place, or will have one in a moment
                time.sleep(_SHORT_SECONDS)
            for reference in ray.wait(list(replies), timeout=_WATCH_SECONDS)[0] if replies else ():
                self._hear(replies[reference], reference)
            self._hand_out()
            self._say_who_waits()
            if self._signals.stop:
                self._stop_all()
            elif self._done_at is not None:
                self._part(time.monotonic() - self._done_at)
        self._conclude()

    def _start(self, rank: int) -> None:
        import ray

        actor = (
            ray.remote(Worker)
            .options(
                num_gpus=self._demand.gpus,
                num_cpus=self._demand.cpus,
                max_restarts=0,  # what it was given is given to the next one here
                scheduling_strategy="SPREAD",
            )
            .remote(rank)
        )
        self._members[rank] = _Member(actor, actor.host.remote())

    def _hear(self, rank: int, reference: Any) -> None:
        import ray

        member = self._members[rank]
        try:
            said = ray.get(reference)
        except ray.exceptions.RayTaskError as problem:  # its work cannot be unpacked there: a module is missing
            self._end(rank, Ending(1, _last_line(problem)))
        except ray.exceptions.RayError as problem:
            self._mourn(rank, problem)
        else:
            if isinstance(said, Ending):
                self._end(rank, said)
            else:
                member.host, member.reply = said, None

    def _mourn(self, rank: int, problem: Exception) -> None:
        how = _how(problem)
        if self._signals.stop or self._done_at is not None:
            self._end(rank, Ending(Interrupted.exit_code, how))
        elif "creation task" in str(problem):
            self._end(rank, Ending(1, f"{_last_line(problem)} (vlm-batch has to be installed on every node)"))
        elif self._num_restarts[rank] >= self._max_restarts:
            self._end(rank, Ending(1, f"{how}, and is not started again"))
        else:
            self._num_restarts[rank] += 1
            times = f"{self._num_restarts[rank]} of {self._max_restarts} times"
            log.warning("worker %d died: %s; it is started again (%s)", rank, how, times)
            self._kill(rank)  # what does not answer may still be there
            self._start(rank)

    def _end(self, rank: int, ending: Ending) -> None:
        self._kill(rank)  # it keeps its GPU until it is gone
        del self._members[rank]
        self._endings[rank] = ending
        if ending.trace:
            log.error("worker %d: %s", rank, shown(ending.trace))
        if not ending.exit_code:
            self._done_at = self._done_at or time.monotonic()
        elif self._members and not self._signals.stop and self._done_at is None:
            log.warning("worker %d %s; what it leaves is done by others", rank, _ended(ending))

    def _hand_out(self) -> None:
        """Give work to those who have a place, once it is known who shares a host."""
        placed = [(rank, member) for rank, member in sorted(self._members.items()) if member.host is not None]
        late = time.monotonic() - self._gathered_at > _GATHER_SECONDS
        if self._signals.stop or not (late or len(placed) == len(self._members)):
            return
        for rank, member in placed:
            if member.at_work:
                continue
            beside = [other for other, its in placed if its.host == member.host]
            ranks = Ranks(rank, self._demand.num_workers, beside.index(rank), len(beside))
            member.reply = member.actor.work.remote(self._task, ranks, self._bell)
            member.at_work = True

    def _say_who_waits(self) -> None:
        """What has no room yet may never have it; and others may be at work meanwhile."""
        waiting = [rank for rank, member in self._members.items() if member.host is None]
        now = time.monotonic()
        if not waiting or self._signals.stop or self._done_at is not None:
            self._looked_at, self._num_missed = now, 0
            return
        if now - self._looked_at < (_REMINDER_SECONDS if self._num_missed else _PATIENCE_SECONDS):
            return
        self._looked_at = now
        if len(waiting) == len(self._members) or len(waiting) != self._num_missed:
            self._num_missed = len(waiting)
            log.warning("%s", self._what_is_missing(len(waiting)))

    def _what_is_missing(self, num_waiting: int) -> str:
        import ray

        there, free = ray.cluster_resources(), ray.available_resources()
        has = ", ".join(
            f"{name}s: {there.get(name, 0):g}, of which {free.get(name, 0):g} free" for name in ("GPU", "CPU")
        )
        rest = "the others do its work meanwhile" if num_waiting < len(self._members) else "nothing is done until then"
        return (
            f"ray: {num_waiting} of {self._demand} wait for room; {rest}. The cluster has {has}. If it does not grow "
            "by itself, stop the run (Ctrl-C) and ask for less with cluster.workers, cluster.gpus or cluster.cpus."
        )

    def _stop_all(self) -> None:
        """Ask those at work to stop, in the way of signals, and dismiss the others."""
        import ray

        for rank, member in list(self._members.items()):
            if not member.at_work:
                self._end(rank, Ending(Interrupted.exit_code, "had not begun"))
        if self._has_rung:
            return
        self._has_rung = True
        try:
            ray.get(self._bell.ring.remote(), timeout=_RING_SECONDS)
        except ray.exceptions.RayError as problem:  # its process is gone, and nothing else reaches them
            log.warning("workers cannot be asked to stop (%s); they are ended", _how(problem))
            for rank in self._members:
                self._kill(rank)

    def _part(self, seconds: float) -> None:
        """All rows are there: the others find that out for themselves, unless something holds them up."""
        for rank, member in list(self._members.items()):
            if not member.at_work or seconds > _LAST_SECONDS:
                self._end(rank, Ending(Interrupted.exit_code, "was not needed any more"))
        if seconds > _FAREWELL_SECONDS and not self._has_rung:
            for rank in self._members:
                log.info("worker %d is still loading or waiting; all rows are there, and it is asked to stop", rank)
            self._stop_all()

    def _kill(self, rank: int) -> None:
        import ray

        ray.kill(self._members[rank].actor)

    def _conclude(self) -> None:
        endings = dict(sorted(self._endings.items()))
        failed = {rank: ending for rank, ending in endings.items() if ending.exit_code}
        if len(failed) < len(endings):
            return
        codes = {ending.exit_code for ending in failed.values()}
        if self._signals.stop or codes == {Interrupted.exit_code}:
            raise Interrupted("Stopped by a signal; what is finished is on disk. Run the same command again to go on.")
        said = {ending.said for ending in failed.values()}
        kind = UsageError if codes == {UsageError.exit_code} else RunFailed
        if len(said) == 1:
            raise kind(said.pop())
        what = "; ".join(f"worker {rank} {_ended(ending)}" for rank, ending in failed.items())
        raise kind(f"no worker is left: {what}. The same command goes on.")


def _ended(ending: Ending) -> str:
    return f"ended with exit code {ending.exit_code} ({ending.said.rstrip('.')})"


def _how(problem: Exception) -> str:
    """What Ray says of a death, in one line."""
    text = str(problem)
    if type(problem).__name__ == "ActorUnavailableError":
        return "it cannot be reached"
    if "low on memory" in text or "memory pressure" in text:
        return "its node ran low on memory"
    because = re.search(r"because (its .*?)(?:[.:\n]|$)", text)
    return (
        because[1] if because else f"{type(problem).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"
    )


def _last_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1] if lines else type(problem).__name__
