"""A command watched from outside: wall clock, and resident memory and CPU time of each of its processes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass(slots=True)
class Trace:
    """A command that ended well. Processes are called "main", "worker PID" (they encode images) and "helper PID"."""

    wall_seconds: float = 0.0
    main_cpu_seconds: float = 0.0  # exact, of the main process and of children it waited for
    output: str = ""
    resident: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # process -> (clock time, bytes)
    cpu: dict[str, float] = field(default_factory=dict)  # process -> seconds
    used: list[tuple[float, float]] = field(default_factory=list)  # (clock time, CPU seconds of all processes so far)
    peak_bytes: int = 0  # resident, of all processes at one moment; pages that they share count in each

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all processes, short of what each took after the last look at it."""
        return sum(self.cpu.values())

    def cpu_seconds_after(self, moment: float) -> float:
        """The part of it that was used after a clock time."""
        before = [seconds for when, seconds in self.used if when <= moment]
        return self.cpu_seconds - max(before, default=0.0)


def traced(
    command: Sequence[str],
    folder: Path,
    *,
    every: float = 0.2,
    look: Callable[[], None] = lambda: None,
    timeout: float | None = None,
) -> Trace:
    """Run a command in `folder`; look at its processes, and call `look`, `every` so many seconds.

    What the command wrote to its standard output and error is in the trace's `output`, in the order it came.

    Raises:
        RuntimeError: it failed; with the end of what it said.
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was ended.
    """
    trace, over = Trace(), threading.Event()
    with tempfile.TemporaryFile("w+") as said:
        began, cpu_before = time.perf_counter(), _children_cpu_seconds()
        process = subprocess.Popen(command, cwd=folder, env=_environment(), stdout=said, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), trace, every, look, over))
        watcher.start()
        try:
            code = process.wait(timeout)
            trace.wall_seconds = time.perf_counter() - began
        finally:
            over.set()
            watcher.join()
            process.kill()
            process.wait()
        trace.main_cpu_seconds = _children_cpu_seconds() - cpu_before
        said.seek(0)
        trace.output = said.read()
    if code:
        raise RuntimeError(f"{' '.join(command)[:200]} ended with exit code {code}:\n{trace.output[-2000:]}")
    return trace


def last_json(trace: Trace) -> Any:
    """The last line of a command's output that is JSON: libraries may have words after it, as a process ends."""
    for line in reversed(trace.output.strip().splitlines()):
        if line.startswith(("{", "[")):
            with suppress(ValueError):
                return json.loads(line)
    raise RuntimeError(f"expected a last line of JSON, got: {trace.output[-500:]!r}")


def vlm_batch(*words: str) -> list[str]:
    """The command line of this checkout."""
    return [sys.executable, "-m", "pipeline", *words]


def vlm_batch_modules(*words: str) -> list[str]:
    """The same, with a last line of output that lists the heavy modules which the command has loaded."""
    code = (
        "import json, sys\n"
        "from pipeline.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]))\n"
        "sys.exit(code)\n"
    )
    return [sys.executable, "-c", code, *words]


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    """This checkout first; threads and hub as the program itself sets them."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return inherited | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _watch(main: psutil.Process, trace: Trace, every: float, look: Callable[[], None], over: threading.Event) -> None:
    while not over.wait(every):
        look()
        try:
            processes = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        resident_bytes = 0
        for process in processes:
            try:
                with process.oneshot():
                    name = _role(process, main)
                    times = process.cpu_times()
                    trace.cpu[name] = times.user + times.system
                    size_bytes = process.memory_info().rss
                    trace.resident.setdefault(name, []).append((time.time(), size_bytes))
                    resident_bytes += size_bytes
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended between two questions
                continue
        trace.used.append((time.time(), trace.cpu_seconds))
        trace.peak_bytes = max(trace.peak_bytes, resident_bytes)


def _role(process: psutil.Process, main: psutil.Process) -> str:
    if process.pid == main.pid:
        return "main"
    forked = process.ppid() != main.pid and "forkserver" in " ".join(process.cmdline())
    return f"{'worker' if forked else 'helper'} {process.pid}"
