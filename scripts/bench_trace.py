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

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all processes, short of what each took after the last look at it."""
        return sum(self.cpu.values())


def traced(
    command: Sequence[str],
    folder: Path,
    *,
    every: float = 0.2,
    look: Callable[[], None] = lambda: None,
    timeout: float | None = None,
) -> Trace:
    """Run a command in `folder`; look at its processes, and call `look`, `every` so many seconds.

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
    """The last line of a command's output."""
    return json.loads(trace.output.strip().splitlines()[-1])


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
        for process in processes:
            try:
                with process.oneshot():
                    name = _role(process, main)
                    times = process.cpu_times()
                    trace.cpu[name] = times.user + times.system
                    trace.resident.setdefault(name, []).append((time.time(), process.memory_info().rss))
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended between two questions
                continue


def _role(process: psutil.Process, main: psutil.Process) -> str:
    if process.pid == main.pid:
        return "main"
    forked = process.ppid() != main.pid and "forkserver" in " ".join(process.cmdline())
    return f"{'worker' if forked else 'helper'} {process.pid}"
