"""Members of a Slurm array that are sent away, never begin, begin twice or are cancelled: no row is lost or doubled.

On the Slurm of scripts/slurm_node.sh, with the fake model.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_model import SECONDS
from faultbox import Box, Found
from slurm_node import ask, job_of, needs_slurm, num_restarts, states, wait_until, wait_until_all

pytestmark = [pytest.mark.slow, needs_slurm, pytest.mark.timeout(900)]

SHARD_ROWS = 8


def box_of(folder: Path, num_rows: int = 240, *, batch_seconds: float) -> Box:
    box = Box(folder / "box", num_rows, shard_rows=SHARD_ROWS)
    box.environment = {SECONDS: str(batch_seconds)}
    return box


def submitted(box: Box, *words: str, workers: int = 3) -> str:
    """The number of the array job, which is handed over."""
    return job_of(box.run("cluster=slurm", f"cluster.workers={workers}", *words, timeout=300))


def num_finished(box: Box) -> int:
    return len(list((box.output / "data").glob("*")))


def proven(box: Box, found: Found) -> None:
    """The members have done all of it, before any other start could."""
    assert num_finished(box) == -(-box.num_rows // SHARD_ROWS), "the members have left rows undone"
    box.check_always()
    box.environment = {}
    box.finish(found)


def wait_for_rows(box: Box) -> None:
    wait_until(lambda: num_finished(box) > 0, "the first shard")


def test_a_member_is_queued_again_by_an_operator(tmp_path: Path, found: Found) -> None:
    """Fault 16: scontrol requeue of one running task of a Slurm array: it begins again, and all rows are there once."""
    box = box_of(tmp_path, batch_seconds=0.4)
    job = submitted(box)
    wait_for_rows(box)
    ask("scontrol", "requeue", f"{job}_1")
    found.num_faults += 1
    wait_until_all(job, "COMPLETED")
    assert num_restarts(f"{job}_1") == 1 and num_restarts(f"{job}_0") == 0
    proven(box, found)


def test_a_member_never_begins(tmp_path: Path, found: Found) -> None:
    """Fault 16: an array with one task missing, cancelled before it began: the others do its rows."""
    box = box_of(tmp_path, batch_seconds=0.05)
    job = submitted(box, "cluster.max_running=1")
    ask("scancel", f"{job}_1")
    found.num_faults += 1
    wait_until_all(job, "COMPLETED", "CANCELLED")
    assert states(job)[f"{job}_1"] == "CANCELLED"
    assert not [attempt for attempt in box.began() if attempt.startswith("1-")]
    proven(box, found)


def test_every_rank_is_there_twice(tmp_path: Path, found: Found) -> None:
    """Fault 16: one task id started twice: the command is run again while its array runs, and members share the rows."""
    box = box_of(tmp_path, batch_seconds=0.3)
    jobs = [submitted(box, workers=2), submitted(box, workers=2)]
    found.num_faults += 1
    for job in jobs:
        wait_until_all(job, "COMPLETED")
    ranks = sorted(attempt.partition("-")[0] for attempt in box.began())
    assert ranks == ["0", "0", "1", "1"], "not all members took part"
    assert set(box.made().values()) == {1}, "rows were generated twice"
    proven(box, found)


def test_a_member_reaches_its_time_limit(tmp_path: Path, found: Found) -> None:
    """Fault 7, 16: SIGUSR1 before the time limit of a Slurm job: the member queues itself again and does the rest."""
    box = box_of(tmp_path, batch_seconds=0.7)
    job = submitted(box, "cluster.time=1", "cluster.signal_seconds=50", workers=1)
    found.num_faults += 1
    wait_until_all(job, "COMPLETED")
    restarts = num_restarts(f"{job}_0")
    log = (box.output / "slurm" / f"{job}_0.log").read_text()
    assert restarts >= 1 and log.count(f"{job}_0 is in the queue again") == restarts
    assert "Traceback" not in log
    proven(box, found)


def test_members_give_way_to_another_job(tmp_path: Path, found: Found) -> None:
    """Fault 16: Slurm preempts all members for a job of higher priority: they begin again after it."""
    box = box_of(tmp_path, batch_seconds=1.0)
    job = submitted(box, workers=2)
    wait_for_rows(box)
    ask("sbatch", "--partition=high", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1")
    found.num_faults += 2
    wait_until(lambda: set(states(job).values()) == {"PENDING"}, "preemption")
    box.environment = {}
    wait_until_all(job, "COMPLETED")
    assert [num_restarts(f"{job}_{number}") for number in (0, 1)] == [1, 1]
    proven(box, found)


def test_a_cancelled_job_stays_cancelled(tmp_path: Path, found: Found) -> None:
    """Fault 7, 16: scancel of a running array: members end in good order, none comes back; the next run goes on."""
    box = box_of(tmp_path, batch_seconds=1.0)
    job = submitted(box, workers=2)
    wait_for_rows(box)
    ask("scancel", job)
    found.num_faults += 1
    wait_until_all(job, "CANCELLED")
    assert [num_restarts(f"{job}_{number}") for number in (0, 1)] == [0, 0]
    assert "stopping, within" in (box.output / "slurm" / f"{job}_0.log").read_text()
    assert 0 < num_finished(box) < box.num_rows // SHARD_ROWS
    box.check_always()
    box.environment = {}
    box.finish(found)


def test_waiting_says_why_members_failed(tmp_path: Path) -> None:
    box = box_of(tmp_path, batch_seconds=0.1)
    said = box.run(
        "cluster=slurm", "wait=true", 'cluster.setup=["echo no such module: cuda >&2", "exit 3"]', code=1, timeout=300
    )
    job = job_of(said)
    assert re.search(rf"rows are missing: {job}_0 FAILED, {job}_1 FAILED", said)
    assert f"The end of {job}_0.log:\n  no such module: cuda" in said


def test_waiting_ends_when_the_work_is_done(tmp_path: Path, found: Found) -> None:
    box = box_of(tmp_path, batch_seconds=0.1)
    said = box.run("cluster=slurm", "cluster.workers=3", "wait=true", timeout=300)
    assert "rows     240 of 240 done" in said
    found.num_faults = 0
    proven(box, found)
