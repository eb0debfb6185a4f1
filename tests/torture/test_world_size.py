"""Other numbers of workers, batches and shares from start to start: what is finished stays, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_model import BATCH_ROWS
from faultbox import KILLED, Box, Found, Watcher

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

SHARD_ROWS = 8

# (workers, rows in a batch, processes that decode): every start of a series is another one.
SERIES = ((4, 16, 1), (1, 3, 2), (7, 5, 1))
LONG_SERIES = (*SERIES, (3, 1, 1), (2, 40, 2), (8, 2, 1), (5, 7, 1))


def started(box: Box, world: int, batch_rows: int, num_decoders: int) -> list[subprocess.Popen[str]]:
    """One process for each rank, as a cluster starts them."""
    processes = []
    for rank in range(world):
        box.environment = {"RANK": str(rank), "WORLD_SIZE": str(world), BATCH_ROWS: str(batch_rows)}
        words = (f"engine.num_workers={num_decoders}", f"engine.max_batch_rows={batch_rows}")
        processes.append(box.start(*words, f"write.sync_seconds={0.02 * (1 + rank)}"))
    return processes


def finished_shards(box: Box) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (box.output / "data").glob("*")}


def wait_for_shards(box: Box, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(list((box.output / "data").glob("*"))) < number:
        assert time.monotonic() < deadline, f"never came: {number} shards"
        time.sleep(0.005)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("series", "num_rows"),
    [(SERIES, 240), pytest.param(LONG_SERIES, 1600, marks=pytest.mark.torture)],
    ids=["short", "long"],
)
def test_the_number_of_workers_changes_between_starts(
    series: tuple[tuple[int, int, int], ...], num_rows: int, tmp_path: Path, found: Found
) -> None:
    """Fault 17: 4, then 1, then 7 workers with other batches, killed in between: finished shards are never redone."""
    rng = random.Random(num_rows)
    box = Box(tmp_path / "box", num_rows, shard_rows=SHARD_ROWS)
    num_shards = num_rows // SHARD_ROWS
    with Watcher(box) as watcher:
        for number, (world, batch_rows, num_decoders) in enumerate(series):
            before = finished_shards(box)
            made = box.made()
            is_last = number == len(series) - 1
            processes = started(box, world, batch_rows, num_decoders)
            if not is_last:
                wait_for_shards(box, num_shards * (number + 1) // len(series))
                time.sleep(rng.uniform(0, 0.1))  # not right after a publication
                for process in processes:
                    os.killpg(process.pid, signal.SIGKILL)
                found.num_faults += world
            for process in processes:
                printed, _ = process.communicate(timeout=300)
                assert process.returncode in ((0,) if is_last else (0, KILLED)), printed
            box.check_always()
            assert before.items() <= finished_shards(box).items(), "a finished shard was touched"
            fresh = {int(key.partition("/")[0]) // SHARD_ROWS for key in box.made() - made}
            again = fresh & {int(name[5:10]) for name in before}
            assert not again, "rows of finished shards were generated again"
    assert watcher.num_looks
    assert len(finished_shards(box)) == num_shards, "the last start has left something undone"
    box.environment = {}
    box.finish(found)


def test_starts_that_disagree_on_the_number_of_workers(tmp_path: Path, found: Found) -> None:
    """Fault 17: shares of 3 and of 2 workers at the same time, so that every shard is in two: each is done once."""
    box = Box(tmp_path / "box", 240, shard_rows=SHARD_ROWS)
    for process in started(box, 3, 2, 1) + started(box, 2, 5, 1):
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    box.check_always()
    assert set(box.made().values()) == {1}
    found.num_faults += 1
    box.environment = {}
    box.finish(found)
