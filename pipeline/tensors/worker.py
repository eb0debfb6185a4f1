"""The inside of a worker process: build once, then one result for each task, until the parent is gone."""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import resource
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from pipeline.errors import VlmBatchError

# glibc gives large temporaries back to the system and faults them in again for each image; keeping them is worth up to
# twice the throughput of processors that cut an image into tiles.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
}
# Workers run ahead of a model that computes on the same cores, and give way to it once they are.
_NICENESS = 10
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STACK_SIGNAL = signal.SIGUSR2  # has a worker print where it is


def serve(pipe: Connection, build: bytes, memory_bytes: int) -> None:
    """Answer tasks until the parent is gone. A reply is (number, result), or ("ready" | "refused" | "failed", ...)."""
    # The parent decides when a worker ends: a signal to the whole process group must not cost rows.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    faulthandler.register(STACK_SIGNAL, file=os.dup(2), all_threads=True)  # of its own: `silenced_libraries` takes 2
    try:
        # A thread empties the pipe, so that parent and worker never wait for each other with both directions full, and
        # notices when the parent is gone. It starts first: its stack is part of the baseline.
        tasks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(pipe, tasks), daemon=True).start()
        work = pickle.loads(build)()
        limit_memory(memory_bytes)
        pipe.send_bytes(pickle.dumps(("ready", None)))
        while (message := tasks.get()) is not None:
            number, task = pickle.loads(message)
            with silenced_libraries():
                result = work(task)
            pipe.send_bytes(pickle.dumps((number, result), protocol=5))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except VlmBatchError as problem:  # a sentence already
        pipe.send_bytes(pickle.dumps(("refused", str(problem))))
    except MemoryError:
        os._exit(1)  # not even an error row could be made: the pool isolates the row
    except Exception:
        pipe.send_bytes(pickle.dumps(("failed", traceback.format_exc())))


def _read(pipe: Connection, tasks: queue.SimpleQueue[bytes | None]) -> None:
    try:
        while True:
            tasks.put(pipe.recv_bytes())
    except (EOFError, OSError):
        tasks.put(None)
        # The worker may be deep in a decoder: with the parent gone nobody waits for it.
        os._exit(0)


@contextmanager
def silenced_libraries() -> Iterator[None]:
    """libtiff and others print hundreds of lines about one bad file; what is wrong with it stands in its error row."""
    try:
        loud = os.dup(2)
    except OSError:  # closed by whoever started the program
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(loud, 2)
        os.close(loud)


def limit_memory(memory_bytes: int) -> None:
    """Let this process take no more than this beyond what it has now (address space)."""
    with open("/proc/self/statm") as file:
        baseline_bytes = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = baseline_bytes + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def ending(exit_code: int | None) -> str:
    """How a process ended, in words: SIGKILL, or exit code 1."""
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


@contextmanager
def environment() -> Iterator[None]:
    """What the fork server, started within, passes on to its workers.

    Variables (the user's own setting of one of them holds), and blocked signals: one to the whole process group must
    not end it while it imports.
    """
    # First, and outside: starting it unblocks SIGINT and SIGTERM, and the fork server would start it.
    resource_tracker.ensure_running()
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for name in added:
            del os.environ[name]
