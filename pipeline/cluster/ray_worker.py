"""What an actor of a run on a Ray cluster does, and what it says of itself."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.ending import log_to_stderr
from pipeline.errors import Interrupted, UsageError, VlmBatchError
from pipeline.ranks import Ranks

_SHARED_SECONDS = 30.0  # in which a shared folder has told other hosts what is new in it
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ended, as an exit code and a sentence; '' where all is well. trace: of a bug."""

    exit_code: int
    said: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker has to know.

    folder: where the command was started: paths are relative to it.
    plan: of the run in the output folder, to know that folder again; None = anything will do.
    num_threads: OMP_NUM_THREADS where the command was started.
    max_cores: that the worker may use; None = its share of the host's.
    """

    work: Callable[[int, int], None]
    output_dir: str
    folder: str
    plan: bytes | None
    num_threads: str | None
    max_cores: float | None

    def bounded(self, ranks: Ranks) -> Ranks:
        """With so many beside it on its host that its share is no more than it may use (ranks.num_own_cores)."""
        if not self.max_cores:
            return ranks
        return replace(ranks, local_world=max(ranks.local_world, int(len(os.sched_getaffinity(0)) / self.max_cores)))


class Worker:
    """The actor. Its work runs in the main thread of its process, which has it to itself."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __repr__(self) -> str:  # what Ray puts before each line that it writes
        return f"worker {self._rank}"

    def host(self) -> str:
        """Where it is."""
        return socket.gethostname()

    def work(self, task: Task, ranks: Ranks, bell: Any) -> Ending:
        """Do it; nothing is raised, so that a sentence arrives as a sentence."""
        threading.Thread(target=_listen, args=(bell,), name="bell", daemon=True).start()
        log_to_stderr(level=logging.WARNING if ranks.rank else logging.INFO)
        try:
            enter(task)
            os.environ.update(task.bounded(ranks).environment)
            if task.num_threads is None:
                os.environ.pop("OMP_NUM_THREADS", None)  # Ray's, made of the CPUs that it sets aside
            else:
                os.environ["OMP_NUM_THREADS"] = task.num_threads
            task.work(ranks.rank, ranks.world)
        except VlmBatchError as problem:
            return Ending(problem.exit_code, str(problem))
        except KeyboardInterrupt:
            return Ending(Interrupted.exit_code, "interrupted")
        except Exception as problem:  # a bug, ours or a library's: the process that looks after us says so
            return Ending(1, f"{type(problem).__name__}: {problem}", traceback.format_exc())
        return Ending(0)


class Bell:
    """An actor that all others listen to: when it rings, they stop, as by a signal."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    async def ring(self) -> None:
        """Now."""
        self._rung.set()

    async def rung(self) -> None:
        """Return once it has."""
        await self._rung.wait()


def _listen(bell: Any) -> None:
    """The thread of a worker that hears the bell: its main thread is at work, and hears signals alone."""
    import ray

    with suppress(ray.exceptions.RayError):  # nobody can ring it any more
        ray.get(bell.rung.remote())
        os.kill(os.getpid(), signal.SIGTERM)


def enter(task: Task) -> None:
    """Go where the command was started, and see that the run is the same there.

    Raises:
        UsageError: this host does not see the folder, or another one under its name.
    """
    host = socket.gethostname()
    try:
        os.chdir(task.folder)
    except OSError as problem:
        raise UsageError(
            f"{host} has no folder {task.folder}, where the command was started ({problem.strerror}). Start it in a "
            "folder that all nodes see."
        ) from None
    deadline = time.monotonic() + _SHARED_SECONDS
    while task.plan is not None and plan_in(task.output_dir) != task.plan:
        if time.monotonic() > deadline:
            raise UsageError(
                f"output_dir={task.output_dir}: {host} does not see the run that was begun there. It has to be a "
                "folder that all nodes see under this name."
            )
        time.sleep(_POLL_SECONDS)


def plan_in(output_dir: str) -> bytes | None:
    """The plan of a local folder, which no other has; None where there is none, and for addresses of stores."""
    if "://" in output_dir:
        return None
    try:
        return Path(output_dir, "plan.json").read_bytes()
    except OSError:
        return None
