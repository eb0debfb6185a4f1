"""A supervised pool of worker processes: a worker that dies or hangs costs the task it was at, not the run.

torch's DataLoader and concurrent.futures end with their first killed worker. Here one thread of the parent hands tasks
to workers over pipes, one message a task, so that a dead worker's culprit is known: the oldest task it had not
answered. That task gets a second try with nothing queued behind it, then it is reported as lost; the tasks behind it
are simply given to others.

    tasks -> [pump thread] -> outbox -> pipe -> worker -> pipe -> [pump thread] -> bounded buffer -> results()

Backpressure: no task is handed out while more than `max_waiting` results, or `max_waiting_bytes` of them, are
unconsumed.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from pipeline.errors import RunFailed
from pipeline.tensors.worker import STACK_SIGNAL, ending, environment, serve

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")

_STACK_SECONDS = 0.2  # in which a worker has printed its stack
# Tasks a worker holds besides the one it is at: its pipe never runs dry, and little is redone when it dies.
_AHEAD = 3
_TICK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Lost(Generic[Task]):
    """A task that no worker could finish: its worker died twice, or it ran out of time."""

    task: Task
    reason: str
    kind: str  # WorkerDied, WorkerTimeout


@dataclass(slots=True)
class _Assignment(Generic[Task]):
    number: int
    task: Task
    num_deaths: int = 0


@dataclass(slots=True)
class _Worker(Generic[Task]):
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    outbox: queue.SimpleQueue[bytes | None]
    writer: threading.Thread
    handle: int  # of the process (pidfd): its number may be somebody else's once it is gone
    assigned: deque[_Assignment[Task]] = field(default_factory=deque)
    ready: bool = False
    busy_since: float = 0.0  # when it began the oldest assigned task


class WorkerPool(Generic[Task, Result]):
    """Workers that turn tasks into results, in the order in which they finish.

    Args:
        build: makes the function that a worker applies to each task; called once in each worker. What it raises is
            the program's fault and ends the run; so does what the function raises (a row's fault is a result).
        task_seconds: a task that takes longer costs its worker, and is lost.
        memory_bytes: what a worker may take above what it holds once it is built (address space).
        preload: modules that the fork server imports once, so that a worker starts in milliseconds.
    """

    def __init__(
        self,
        build: Callable[[], Callable[[Task], Result]],
        *,
        num_workers: int,
        task_seconds: float,
        memory_bytes: int,
        max_waiting: int,
        max_waiting_bytes: int = 1 << 30,
        preload: tuple[str, ...] = (),
    ) -> None:
        self._build = pickle.dumps(build)
        self._num_workers = num_workers
        self._task_seconds, self._memory_bytes = task_seconds, memory_bytes
        self._max_waiting, self._max_waiting_bytes = max_waiting, max_waiting_bytes
        self._context = multiprocessing.get_context("forkserver")
        self._buffer: queue.SimpleQueue[tuple[str, Any, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_unconsumed = 0  # handed out and not yet taken from results()
        self._unconsumed_bytes = 0  # results only
        self._stopping = self._closing = False  # set from a signal handler: no lock may be involved
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._workers: list[_Worker[Task]] = []
        self._tasks: queue.SimpleQueue[Iterator[Task] | None] = queue.SimpleQueue()
        self._streaming = False
        start_fork_server(preload)
        # The fork server's imports take seconds: the pump waits for them, while the caller loads its model.
        self._pump = threading.Thread(target=self._run, name="encode-pump", daemon=True)
        self._pump.start()

    def results(self, tasks: Iterator[Task]) -> Iterator[Result | Lost[Task]]:
        """Every task's result exactly once, as they finish. One stream at a time; another may follow its end.

        Raises:
            RunFailed: a worker could not be built, or the program failed in it.
            whatever `tasks` raises.
        """
        assert not self._streaming, "a pool serves one stream of tasks at a time"
        self._streaming = True
        self._tasks.put(tasks)
        while True:
            kind, value, size_bytes = self._buffer.get()
            if kind == "end":
                self._streaming = False
                return
            if kind == "raise":
                raise value
            with self._lock:
                self._num_unconsumed -= 1
                self._unconsumed_bytes -= size_bytes
            self._wake()
            yield value

    def has_results(self) -> bool:
        """Whether results() has one that can be had without waiting."""
        return not self._buffer.empty()

    def at_work(self) -> Iterator[tuple[Task, float]]:
        """What the workers are at, and for how many seconds each; each prints its stack. For a report: a rough look."""
        for worker in list(self._workers):
            if assigned := list(worker.assigned):
                yield assigned[0].task, time.monotonic() - worker.busy_since
                with contextlib.suppress(OSError):  # it has just ended
                    signal.pidfd_send_signal(worker.handle, STACK_SIGNAL)
                time.sleep(_STACK_SECONDS)  # all of them print to one stream, a word at a time

    def stop_feeding(self) -> None:
        """Hand out no further task; results() ends with what is in the workers. May be called by a signal handler."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """End the workers at once."""
        self._closing = True
        self._tasks.put(None)
        self._wake()
        self._pump.join()  # first: it would replace the workers that end here
        for worker in self._workers:
            _end(worker)
        reader, writer = self._wake_reader, self._wake_writer
        self._wake_writer = -1  # a late signal finds nothing to write to
        os.close(reader)
        os.close(writer)

    def __enter__(self) -> WorkerPool[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The pump thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for _ in range(self._num_workers):
                self._workers.append(self._start())
            while (tasks := self._tasks.get()) is not None:
                self._pump_tasks(tasks)
                self._buffer.put(("end", None, 0))
        except BaseException as problem:  # handed to results(): a thread has no caller
            self._buffer.put(("raise", problem, 0))

    def _pump_tasks(self, tasks: Iterator[Task]) -> None:
        returned: deque[_Assignment[Task]] = deque()  # from workers that died
        number, exhausted = 0, False
        while not self._closing:
            while (worker := self._free_worker()) is not None:
                if returned:
                    assignment = returned.popleft()
                elif exhausted or self._stopping or not self._may_hand_out():
                    break
                else:
                    try:
                        task = next(tasks)
                    except StopIteration:
                        exhausted = True
                        break
                    assignment = _Assignment(number, task)
                    number += 1
                    with self._lock:
                        self._num_unconsumed += 1
                self._assign(worker, assignment)
            idle = not returned and not any(worker.assigned for worker in self._workers)
            if idle and (exhausted or self._stopping):
                return
            for ready in wait([self._wake_reader, *(worker.pipe for worker in self._workers)], _TICK_SECONDS):
                if ready == self._wake_reader:
                    os.read(self._wake_reader, 4096)
                else:
                    worker = next(worker for worker in self._workers if worker.pipe is ready)
                    returned.extendleft(reversed(self._receive(worker)))
            for worker in list(self._workers):
                if worker.assigned and worker.ready and time.monotonic() - worker.busy_since > self._task_seconds:
                    returned.extendleft(reversed(self._bury(worker, timed_out=True)))

    def _may_hand_out(self) -> bool:
        with self._lock:
            return self._num_unconsumed < self._max_waiting and self._unconsumed_bytes < self._max_waiting_bytes

    def _free_worker(self) -> _Worker[Task] | None:
        # A task whose worker died is tried alone: its worker takes nothing else while it has it.
        free = [
            worker
            for worker in self._workers
            if worker.ready and len(worker.assigned) <= _AHEAD and not any(task.num_deaths for task in worker.assigned)
        ]
        return min(free, key=lambda worker: len(worker.assigned), default=None)

    def _assign(self, worker: _Worker[Task], assignment: _Assignment[Task]) -> None:
        if not worker.assigned:
            worker.busy_since = time.monotonic()
        worker.assigned.append(assignment)
        worker.outbox.put(pickle.dumps((assignment.number, assignment.task), protocol=5))

    def _receive(self, worker: _Worker[Task]) -> list[_Assignment[Task]]:
        """Take one message from a worker; what is to be handed out again if it was its last."""
        try:
            message = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            return self._bury(worker, timed_out=False)
        kind, value = pickle.loads(message)
        if kind == "ready":
            worker.ready = True
        elif kind == "refused":
            raise RunFailed(value)
        elif kind == "failed":
            raise RunFailed(f"a worker process failed:\n{value}")
        else:
            assignment = worker.assigned.popleft()
            assert assignment.number == kind, "a worker answers in order"
            worker.busy_since = time.monotonic()
            self._deliver(value, len(message))
        return []

    def _bury(self, worker: _Worker[Task], *, timed_out: bool) -> list[_Assignment[Task]]:
        """Replace a dead or hanging worker; the tasks to hand out again, the suspect first."""
        _end(worker)
        if not worker.ready:
            raise RunFailed(f"a worker process ended with exit code {worker.process.exitcode} before it was ready.")
        self._workers[self._workers.index(worker)] = self._start()
        waiting = list(worker.assigned)
        if not waiting:
            log.warning("an idle worker process ended (%s) and was replaced", ending(worker.process.exitcode))
            return []
        suspect = waiting[0]
        suspect.num_deaths += 1
        if timed_out:
            reason = f"took longer than {self._task_seconds:g} s (engine.worker_timeout_seconds)"
            self._deliver(Lost(suspect.task, reason, "WorkerTimeout"), 0)
        elif suspect.num_deaths > 1:
            reason = f"its worker process ended twice ({ending(worker.process.exitcode)})"
            self._deliver(Lost(suspect.task, reason, "WorkerDied"), 0)
        else:
            log.warning("a worker process ended (%s); its row is tried once more", ending(worker.process.exitcode))
            return waiting
        log.warning("a row is lost: it %s", reason)
        return waiting[1:]

    def _deliver(self, value: Any, size_bytes: int) -> None:
        with self._lock:
            self._unconsumed_bytes += size_bytes
        self._buffer.put(("result", value, size_bytes))

    def _start(self) -> _Worker[Task]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, self._build, self._memory_bytes), name="encode-worker", daemon=True
        )
        process.start()
        theirs.close()
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        writer = threading.Thread(target=_write, args=(ours, outbox), name="encode-outbox", daemon=True)
        writer.start()
        return _Worker(process, ours, outbox, writer, _handle(process.pid))

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the pipe is full of wake-ups already, or closed
            os.write(self._wake_writer, b"\0")


def start_fork_server(preload: Sequence[str]) -> None:
    """Start the process that imports `preload` once for all workers, unless it runs; it imports beside the caller."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*preload, "pipeline.tensors.preloaded"])
    with environment():
        forkserver.ensure_running()


def _write(pipe: Connection, outbox: queue.SimpleQueue[bytes | None]) -> None:
    """Send what the pump hands out: a worker that hangs leaves its pipe full, which must not stop the pump."""
    with contextlib.suppress(OSError):  # it died: its pipe reports the end, and _bury takes its tasks back
        while (message := outbox.get()) is not None:
            pipe.send_bytes(message)


def _end(worker: _Worker[Any]) -> None:
    if worker.process.is_alive():  # the number of a process that is gone may be somebody else's by now
        worker.process.kill()
    worker.process.join()
    worker.outbox.put(None)
    worker.writer.join()
    worker.pipe.close()
    if worker.handle >= 0:  # may be ended twice
        os.close(worker.handle)
        worker.handle = -1


def _handle(pid: int | None) -> int:
    try:
        return os.pidfd_open(pid or 0)
    except OSError:  # it has ended already
        return -1
