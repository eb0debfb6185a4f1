"""The worker pool: every task ends in exactly one result, whatever happens to the process that works on it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.errors import RunFailed
from pipeline.tensors.pool import Lost, WorkerPool
from pipeline.tensors.worker import environment

Task = tuple[str, Any]  # what to do, with what

CHECKOUT = Path(__file__).resolve().parents[2]
MANY_SECONDS = 20.0


def work(task: Task) -> Any:
    """What the workers of these tests do."""
    order, value = task
    match order:
        case "echo":
            return value
        case "pid":
            return os.getpid()
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit once":  # `value` is a file that remembers the first time
            if not os.path.exists(value):
                open(value, "w").close()
                os._exit(3)
            return "second try"
        case "sleep":
            time.sleep(value)
            return "slept"
        case "hang in C":  # holds the GIL: no other thread of the worker runs
            return re.match(r"(a+)+$", "a" * 60 + "b")
        case "take bytes":
            try:
                return np.ones(value, np.uint8).nbytes
            except MemoryError:
                return "MemoryError"
        case "raise":
            raise ZeroDivisionError(value)
        case "signal":
            os.kill(os.getpid(), value)
            time.sleep(0.05)
            return "alive"
    raise AssertionError(order)


def build() -> Callable[[Task], Any]:
    return work


def build_refused() -> Callable[[Task], Any]:
    raise RunFailed("the chat template does not fit")


def build_broken() -> Callable[[Task], Any]:
    raise FileNotFoundError("preprocessor_config.json")


def build_dying() -> Callable[[Task], Any]:
    os._exit(7)


def pool_of(num_workers: int, builder: Callable[[], Any] = build, **options: Any) -> WorkerPool[Task, Any]:
    settings: dict[str, Any] = {"task_seconds": MANY_SECONDS, "memory_bytes": 1 << 30, "max_waiting": 64}
    return WorkerPool(builder, num_workers=num_workers, preload=("numpy", "pytest", "psutil"), **settings | options)


def results_of(tasks: list[Task], num_workers: int = 2, **options: Any) -> list[Any]:
    with pool_of(num_workers, **options) as pool:
        return list(pool.results(iter(tasks)))


def echoes(count: int) -> list[Task]:
    return [("echo", number) for number in range(count)]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# What is promised of every task --------------------------------------------------------------------------------------


def test_every_task_has_exactly_one_result() -> None:
    assert sorted(results_of(echoes(200))) == list(range(200))


def test_no_tasks_give_no_results() -> None:
    assert results_of([]) == []


@pytest.mark.parametrize(("order", "how"), [("exit", "exit code 3"), ("kill", "SIGKILL")])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_task_that_kills_its_worker_is_lost_after_a_second_try_and_nobody_else(
    order: str, how: str, num_workers: int
) -> None:
    """Fault 46: a row that kills its worker is tried once more, then it is an error row; no other row is."""
    tasks = echoes(30)
    tasks.insert(7, (order, None))
    results = results_of(tasks, num_workers)
    lost = [result for result in results if isinstance(result, Lost)]
    assert sorted(result for result in results if not isinstance(result, Lost)) == list(range(30))
    assert [(one.task, one.kind) for one in lost] == [((order, None), "WorkerDied")]
    assert lost[0].reason == f"its worker process ended twice ({how})"


def test_a_worker_that_dies_by_mischance_costs_nothing(tmp_path: Path) -> None:
    tasks = [*echoes(5), ("exit once", str(tmp_path / "mark")), *echoes(5)]
    assert sorted(map(str, results_of(tasks, 1))) == sorted([*map(str, [*range(5), *range(5)]), "second try"])


def test_many_killing_tasks_in_a_row_are_each_lost_once() -> None:
    results = results_of([("kill", 0), ("kill", 1), ("echo", 2), ("kill", 3), ("kill", 4)], 1)
    lost = sorted(result.task[1] for result in results if isinstance(result, Lost))
    assert lost == [0, 1, 3, 4]
    assert [result for result in results if not isinstance(result, Lost)] == [2]


def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    with pool_of(1, max_waiting=2) as pool:
        results = pool.results(iter([("pid", None)] * 6))
        first = next(results)
        time.sleep(0.1)  # two results wait to be taken: the worker may do nothing more
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: not psutil.pid_exists(first))
        pids = list(results)
    assert pids[:2] == [first, first]
    assert len(set(pids[2:])) == 1
    assert pids[2] != first


# Time and memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hang", [("sleep", 60), ("hang in C", None)])
def test_a_hanging_task_is_lost_at_its_time_limit_and_the_rest_goes_on(hang: Task) -> None:
    """Fault 46: a row that hangs, in Python or in C, ends at the time limit, and the others are done."""
    tasks = echoes(10)
    tasks.insert(4, hang)
    began = time.monotonic()
    results = results_of(tasks, 1, task_seconds=0.6)
    assert time.monotonic() - began < 10
    lost = [result for result in results if isinstance(result, Lost)]
    assert [(one.task, one.kind) for one in lost] == [(hang, "WorkerTimeout")]
    assert "took longer than 0.6 s (engine.worker_timeout_seconds)" in lost[0].reason
    assert sorted(result for result in results if not isinstance(result, Lost)) == list(range(10))


def test_a_hanging_worker_with_a_full_pipe_does_not_stop_the_others() -> None:
    big = bytes(1 << 20)
    tasks = [("hang in C", None), *(("echo", (number, big)) for number in range(20))]
    results = results_of(tasks, 2, task_seconds=0.6)
    assert [result.kind for result in results if isinstance(result, Lost)] == ["WorkerTimeout"]
    assert sorted(result[0] for result in results if not isinstance(result, Lost)) == list(range(20))


def test_a_slow_task_within_the_limit_is_waited_for() -> None:
    assert results_of([("sleep", 0.3)] * 4, 1, task_seconds=1.0) == ["slept"] * 4


def test_a_task_above_the_memory_limit_meets_MemoryError_and_its_worker_lives() -> None:
    tasks = [("pid", None), ("take bytes", 400 << 20), ("take bytes", 50 << 20), ("pid", None)]
    results = results_of(tasks, 1, memory_bytes=200 << 20)
    assert results[1:3] == ["MemoryError", 50 << 20]
    assert results[0] == results[3]


# Failures of the program ---------------------------------------------------------------------------------------------


def test_an_exception_in_the_work_ends_the_run_with_its_traceback() -> None:
    with pytest.raises(RunFailed, match=r"(?s)Traceback.*in work.*ZeroDivisionError: the reason"):
        results_of([*echoes(3), ("raise", "the reason"), *echoes(3)])


def test_an_exception_of_the_tasks_reaches_the_caller() -> None:
    def tasks() -> Iterator[Task]:
        yield ("echo", 1)
        raise LookupError("the source is damaged")

    with pool_of(1) as pool, pytest.raises(LookupError, match="the source is damaged"):
        list(pool.results(tasks()))


def test_a_worker_that_cannot_be_built_ends_the_run() -> None:
    with pytest.raises(RunFailed, match=r"FileNotFoundError: preprocessor_config\.json"):
        results_of(echoes(3), builder=build_broken)


def test_what_a_worker_says_in_a_sentence_ends_the_run_without_a_traceback() -> None:
    with pytest.raises(RunFailed) as caught:
        results_of(echoes(3), builder=build_refused)
    assert str(caught.value) == "the chat template does not fit"


def test_a_worker_that_dies_while_it_is_built_ends_the_run() -> None:
    with pytest.raises(RunFailed, match="exit code 7 before it was ready"):
        results_of(echoes(3), builder=build_dying)


# Bounds --------------------------------------------------------------------------------------------------------------


def test_tasks_are_not_handed_out_further_ahead_than_max_waiting() -> None:
    num_drawn, num_taken, furthest = 0, 0, 0

    def tasks() -> Iterator[Task]:
        nonlocal num_drawn, furthest
        for number in range(60):
            num_drawn += 1
            furthest = max(furthest, num_drawn - num_taken)
            yield ("echo", number)

    with pool_of(2, max_waiting=7) as pool:
        for _ in pool.results(tasks()):
            time.sleep(0.005)  # a slow consumer
            num_taken += 1
    assert num_taken == num_drawn == 60
    assert 2 <= furthest <= 8  # seven, and the one that the loop above holds


def test_tasks_are_not_handed_out_while_the_results_hold_too_many_bytes() -> None:
    num_drawn = 0

    def tasks() -> Iterator[Task]:
        nonlocal num_drawn
        for _ in range(40):
            num_drawn += 1
            yield ("echo", bytes(1 << 20))

    with pool_of(1, max_waiting_bytes=3 << 20) as pool:
        results = pool.results(tasks())
        next(results)
        time.sleep(0.5)
        assert num_drawn <= 10  # three megabytes waiting, a few more in the worker
        assert len(list(results)) == 39


def test_big_tasks_and_big_results_do_not_block_each_other() -> None:
    big = bytes(20 << 20)
    results = results_of([("echo", big)] * 6, 1)
    assert [len(result) for result in results] == [20 << 20] * 6


def test_stop_feeding_ends_an_endless_stream_with_what_was_handed_out() -> None:
    num_drawn = 0

    def tasks() -> Iterator[Task]:
        nonlocal num_drawn
        while True:
            num_drawn += 1
            yield ("echo", num_drawn)

    with pool_of(2) as pool:
        results = pool.results(tasks())
        taken = [next(results) for _ in range(5)]
        pool.stop_feeding()
        taken += results
    assert sorted(taken) == list(range(1, num_drawn + 1))


# Ending --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_a_worker_does_not_end_it(number: signal.Signals) -> None:
    assert results_of([("signal", number)], 1) == ["alive"]


def test_closing_in_the_middle_of_work_ends_all_workers_at_once() -> None:
    num_threads = threading.active_count()
    pool = pool_of(2)
    results = pool.results(iter([("pid", None), ("pid", None), *[("sleep", 30)] * 8]))
    pids = {next(results), next(results)}
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert threading.active_count() <= num_threads


def test_a_pool_that_was_never_used_closes() -> None:
    pool_of(2).close()


def test_a_stop_request_after_closing_is_harmless() -> None:
    pool = pool_of(1)
    pool.close()
    pool.stop_feeding()


def test_workers_end_with_a_parent_that_was_killed() -> None:
    script = """
        import sys, time
        sys.path.insert(0, sys.argv[1])
        from test_pool import pool_of
        if __name__ == "__main__":
            pool = pool_of(2)
            results = pool.results(iter([("pid", None)] * 20 + [("sleep", 60)] * 4))
            print(*{next(results) for _ in range(20)}, flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        family = psutil.Process(parent.pid).children(recursive=True)
        assert pids
        parent.kill()
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert wait_until(lambda: not any(one.is_running() for one in family))


def test_no_file_descriptor_is_left_behind() -> None:
    def used() -> int:
        return len(os.listdir("/proc/self/fd"))

    results_of(echoes(3), 1)
    before = used()
    for _ in range(20):
        assert len(results_of([*echoes(3)], 1)) == 3
    results_of([("kill", None)], 1)
    assert used() <= before


def test_the_fork_server_starts_with_one_thread_per_worker_and_the_users_own_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with environment():
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1073741824"
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_pool_is_built_from_what_can_be_pickled() -> None:
    assert results_of(echoes(2), 1, builder=partial(build)) == [0, 1]
