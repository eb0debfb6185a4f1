"""Time that goes wrong: workers that sleep past their lease, clocks that are off or stand still, starts at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_model import BATCH_ROWS, CLOCK, GATES, LEASE
from faultbox import Box, Found, Watcher

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

SHARD_ROWS = 8


def wait_until(is_so: Callable[[], bool], what: str, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, f"never came: {what}"
        assert process is None or process.poll() is None, f"the process ended before this came: {what}"
        time.sleep(0.002)


def owners(box: Box) -> dict[int, str]:
    """Who has which shard now."""
    found = {}
    for path in (box.output / "work").glob("part-*.claim"):
        with contextlib.suppress(FileNotFoundError):
            found[int(path.name[5:10])] = json.loads(path.read_text())["owner"]
    return found


def ended_well(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def generated_twice(box: Box) -> set[int]:
    """Shards with a row that was generated more than once."""
    return {int(key.partition("/")[0]) // SHARD_ROWS for key, number in box.made().items() if number > 1}


def is_stopped(pid: int) -> bool:
    """Whether no thread of the process goes on: the signal is sent before the last one has obeyed it."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("lease_seconds", "num_rounds"), [(3, 1), pytest.param(3, 5, marks=pytest.mark.torture)], ids=["once", "often"]
)
@pytest.mark.parametrize("wakes", ["when all is done", "while another is at its shards"])
def test_a_worker_that_sleeps_past_its_lease(
    lease_seconds: float, num_rounds: int, wakes: str, tmp_path: Path, found: Found
) -> None:
    """Fault 8: a worker is stopped for longer than its lease and goes on: others did its shards, both end well."""
    for number in range(num_rounds):
        box = Box(tmp_path / str(number), 400, shard_rows=SHARD_ROWS, seed=number)
        box.environment = {LEASE: str(lease_seconds), BATCH_ROWS: "2"}
        with Watcher(box) as watcher:
            sleeper = box.start()
            num_made = 20 + 25 * number
            wait_until(lambda: box.made().total() >= num_made, "rows of the first worker", sleeper)  # noqa: B023
            os.killpg(sleeper.pid, signal.SIGSTOP)
            wait_until(lambda: is_stopped(sleeper.pid), "the stop", sleeper)  # noqa: B023 - a thread in fsync stops after it
            held = owners(box)
            assert held, "a worker with rows on their way has no claim"
            other = box.start()
            if wakes == "when all is done":
                ended_well(other)  # it got what the sleeper had claimed, or it would have waited
                os.killpg(sleeper.pid, signal.SIGCONT)
            else:
                wait_until(lambda: any(owners(box).get(n, who) != who for n, who in held.items()), "a takeover", other)  # noqa: B023
                os.killpg(sleeper.pid, signal.SIGCONT)
                ended_well(other)
            ended_well(sleeper)
        assert watcher.num_looks
        box.check_always()
        assert generated_twice(box) <= held.keys(), "more was done twice than what the sleeper had in work"
        found.num_faults += 1
        counted = box.finish(Found())  # the two did some rows at once: that is no work that was forgotten
        found.num_lost, found.num_doubled = found.num_lost + counted.num_lost, found.num_doubled + counted.num_doubled
        found.num_redone += counted.num_redone


CLOCKS = ("+3600", "-3600", "frozen", "jumping")


def durations(box: Box) -> list[tuple[str, float]]:
    """What workers said of how long things took, and how fast they were."""
    workers = [json.loads(path.read_text()) for path in (box.output / "stats").glob("worker-*.json")]
    return [
        (name, value)
        for worker in workers
        for name, value in worker.items()
        if name.endswith("seconds") or name.endswith("per_second")
    ]


def test_workers_with_different_clocks(tmp_path: Path, found: Found) -> None:
    """Fault 10: workers whose clocks are an hour ahead, an hour behind, frozen and jumping: no shard is done twice."""
    began = time.monotonic()
    box = Box(tmp_path / "box", 400, shard_rows=SHARD_ROWS)
    workers = []
    with Watcher(box) as watcher:
        for clock in CLOCKS:
            box.environment = {CLOCK: clock}
            workers.append(box.start())
        wait_until(lambda: len(set(owners(box).values())) > 1, "two workers at work")
        box.environment = {CLOCK: "+3600"}
        box.run(command="status")
        for worker in workers:
            printed = ended_well(worker)
            assert not re.search(r"-\d[\d.,]* (rows/s|tokens/s|d|h|min|s)\b", printed), printed
        found.num_faults += len(CLOCKS)
    assert watcher.num_looks
    seconds = time.monotonic() - began
    told = durations(box)
    assert len({name for name, _ in told}) >= 5
    assert [(name, value) for name, value in told if value < 0] == []
    measured = [(name, value) for name, value in told if name.endswith("seconds") and name != "heartbeat_seconds"]
    assert [(name, value) for name, value in measured if value > seconds] == []
    assert generated_twice(box) == set(), "a live claim was taken over"
    box.finish(found)


@pytest.mark.parametrize(
    "clock", [pytest.param(clock, marks=() if clock == "jumping" else pytest.mark.torture) for clock in CLOCKS]
)
def test_a_killed_worker_with_another_clock(clock: str, tmp_path: Path, found: Found) -> None:
    """Fault 10: what a killed worker with a wrong clock had claimed is taken over by one with the right clock."""
    box = Box(tmp_path / "box", 300, shard_rows=SHARD_ROWS)
    box.environment = {CLOCK: clock}
    killed = box.start()
    wait_until(lambda: box.made().total() >= 30, "rows of the first worker", killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    found.num_faults += 1
    assert owners(box), "a worker with rows on their way has no claim"
    box.environment = {}
    box.finish(found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_starts", [5, pytest.param(20, marks=pytest.mark.torture)])
def test_starts_at_the_same_moment(num_starts: int, tmp_path: Path, found: Found) -> None:
    """Fault 15: up to 20 starts at one moment, by clocks that stand still: one plan, an id each, every row once."""
    gates = tmp_path / "gates"
    gates.mkdir()
    box = Box(tmp_path / "box", 400, shard_rows=SHARD_ROWS)
    box.environment = {CLOCK: "frozen", GATES: str(gates)}
    starts = [box.start() for _ in range(num_starts)]
    for gate in ("plan", "work"):  # all plan at one moment, and then all take their first shard
        wait_until(lambda: len(list(gates.glob(f"{gate}.*"))) == num_starts, f"all starts at {gate}")  # noqa: B023
        (gates / gate).touch()
    for start in starts:
        ended_well(start)
    found.num_faults += num_starts
    attempts = box.began()
    assert len(attempts) == len(set(attempts)) == num_starts, attempts
    workers = [json.loads(path.read_text()) for path in (box.output / "stats").glob("worker-*.json")]
    assert len(workers) == num_starts
    assert {worker["plan_id"] for worker in workers} == {json.loads((box.output / "plan.json").read_text())["plan_id"]}
    assert sum(worker["num_answered"] for worker in workers) == box.num_rows
    box.environment = {}
    box.finish(found)
