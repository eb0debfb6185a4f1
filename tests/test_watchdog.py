"""A run in which nothing gets done says where it hangs, and may end itself."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.preparation import Task
from pipeline.records import Row
from pipeline.tally import Tally
from pipeline.tensors.pool import WorkerPool
from pipeline.vlm.base import EngineCounts
from pipeline.watchdog import Watchdog


def sleep_at(task: Task) -> str:
    if task.row.id == "slow":
        Path(task.row.columns["begun"]).touch()
        time.sleep(60)
    return task.row.id


def sleeper() -> Callable[[Task], str]:
    return sleep_at


def pool_of() -> WorkerPool[Task, str]:
    return WorkerPool(
        partial(sleeper), num_workers=1, task_seconds=60, memory_bytes=1 << 30, max_waiting=4, preload=("pytest",)
    )


def task(name: str, **columns: str) -> Task:
    return Task(Row(0, name, (), columns), ())


def waited(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def stall(said: str) -> None:
    """A process of its own: what worker processes print goes where that of the first one that was started went.

    said: the file that is its stderr.
    """
    logging.basicConfig(format="%(message)s")
    gave_up = threading.Event()
    with pool_of() as pool:
        begun = Path(f"{said}.begun")
        results = pool.results(iter([task("quick"), task("slow", begun=str(begun))]))
        assert next(results) == "quick"
        assert waited(begun.exists)
        with Watchdog(0.3, Tally(2), pool, EngineCounts, gave_up.set):
            assert gave_up.wait(20)
        waited(lambda: "in sleep_at" in Path(said).read_text())  # a worker prints its stack by itself


def test_a_stall_is_told_with_row_and_stack(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    code = f"import test_watchdog; test_watchdog.stall({str(said)!r})"
    with said.open("w") as stderr:
        done = subprocess.run([sys.executable, "-c", code], stderr=stderr, timeout=90, cwd=Path(__file__).parent)
    found = said.read_text()
    assert done.returncode == 0, found
    lines = ("nothing got done for 0.3 s", "a worker process is at row slow for", "0 of 2 rows are done")
    stacks = ("in sleep_at", "in _report", "in stall")  # of the worker process, of the watchdog, of the main thread
    assert [text for text in (*lines, *stacks) if text not in found] == [], found
    own, of_worker = found.split("a worker process is at row slow")  # stacks are not printed into each other
    assert "in sleep_at" in of_worker and "in stall" in own and "in _report" not in of_worker


def test_progress_of_any_kind_is_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    tally, counts = Tally(100), EngineCounts()
    with pool_of() as pool, caplog.at_level(logging.ERROR), Watchdog(1.0, tally, pool, lambda: counts):
        for number in range(20):
            time.sleep(0.1)
            if number % 2:
                counts.num_decode_steps += 1
            else:
                tally.num_done += 1
    assert "nothing got done" not in caplog.text


def test_nobody_looks_where_nobody_asked() -> None:
    before = threading.active_count()
    with pool_of() as pool:
        running = threading.active_count()
        with Watchdog(None, Tally(1), pool, EngineCounts):
            assert threading.active_count() == running
    assert threading.active_count() <= before + 1


_HANGS = """
import sys, threading, time
from pipeline.interruption import Interruption
with Interruption(0.2) as stop:
    stop.last_words = lambda: {words}
    threading.Timer(0.1, stop.give_up).start()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("words", "printed"), [("print('kept', flush=True)", "kept\n"), ("time.sleep(60)", ""), ("1 / 0", "")]
)
def test_a_run_that_gives_up_brings_down_what_it_can_and_asks_for_another_start(words: str, printed: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _HANGS.format(words=words)], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (75, printed)
    assert time.monotonic() - began < 30


def test_the_stack_signal_ends_no_worker() -> None:
    with pool_of() as pool:
        results = pool.results(iter([task(str(number)) for number in range(3)]))
        assert next(results) == "0"
        handle = pool._workers[0].handle
        signal.pidfd_send_signal(handle, signal.SIGUSR2)
        assert list(results) == ["1", "2"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)
