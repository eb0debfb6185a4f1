"""Many workers at one folder: each shard is published once, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faultbox import Box, Found, Watcher

from pipeline.write.schema import ShardSummary
from pipeline.write.shard import publish_shard, read_shard


def racer(folder: Path, who: int, num_races: int, barrier: Any, won: Any) -> None:
    table = pa.table({"row_index": range(50), "response": [f"{who} {number}" for number in range(50)]})
    for shard in range(num_races):
        barrier.wait(60)
        if publish_shard(
            table,
            ShardSummary("p", shard, 50, 0, {}, 0, {}),
            final=folder / f"data/part-{shard:05d}.parquet",
            attempt_path=folder / f"work/part-{shard:05d}.{who}.parquet",
            compression="none",
        ):
            won.append((shard, who))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_racers", "num_races"), [(4, 30), pytest.param(8, 500, marks=pytest.mark.torture)])
def test_workers_that_publish_the_same_shard_at_once(
    num_racers: int, num_races: int, tmp_path: Path, found: Found
) -> None:
    """Fault 11: workers that publish the same shard at the same moment: one wins, the others discard their copies."""
    context = multiprocessing.get_context("spawn")
    for name in ("data", "work"):
        (tmp_path / name).mkdir()
    with context.Manager() as manager:
        won, barrier = manager.list(), context.Barrier(num_racers)
        processes = [
            context.Process(target=racer, args=(tmp_path, who, num_races, barrier, won)) for who in range(num_racers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        winners = list(won)
    found.num_faults = num_races
    found.num_doubled = len(winners) - len(dict(winners))
    found.num_lost = num_races - len(dict(winners))
    for shard, who in winners:
        rows = read_shard(tmp_path / f"data/part-{shard:05d}.parquet")["response"].to_pylist()
        found.num_wrong += rows != [f"{who} {number}" for number in range(50)]
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num_workers", "num_rows", "num_kills"), [(3, 300, 3), pytest.param(8, 1600, 30, marks=pytest.mark.torture)]
)
def test_workers_that_are_killed_and_started_again(
    num_workers: int, num_rows: int, num_kills: int, tmp_path: Path, found: Found
) -> None:
    """Fault 12: many workers at one job; now and then one is killed, and another started."""
    rng = random.Random(num_workers)
    box = Box(tmp_path / "box", num_rows, shard_rows=8)
    workers = [box.start() for _ in range(num_workers)]
    with Watcher(box) as watcher:
        while found.num_faults < num_kills and any(worker.poll() is None for worker in workers):
            time.sleep(rng.uniform(0.2, 1.5))
            place = rng.randrange(num_workers)
            if workers[place].poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(workers[place].pid, signal.SIGKILL)
                found.num_faults += 1
            workers[place].communicate()
            workers[place] = box.start()
        for worker in workers:
            printed, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, printed
        box.check_always()
    assert watcher.num_looks
    counted = box.finish(Found())  # what two workers did at once is no work that was forgotten
    found.num_lost, found.num_doubled, found.num_redone = counted.num_lost, counted.num_doubled, counted.num_redone
