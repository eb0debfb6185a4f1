"""Members of a Slurm array that are sent away, never begin, begin twice or are cancelled: no row is lost or doubled.

On the Slurm of scripts/slurm_node.sh, with the fake model.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from command_line import CHECKOUT
from fake_model import BATCH_SECONDS, LOG
from faultbox import PROGRAM, Box, Found
from slurm_node import ask, job_of, needs_slurm, num_restarts, states, wait_until, wait_until_all

pytestmark = [pytest.mark.slow, needs_slurm, pytest.mark.timeout(900)]

SHARD_ROWS = 8


def box_of(folder: Path, num_rows: int = 240, *, batch_seconds: float) -> Box:
    box = Box(folder / "box", num_rows, shard_rows=SHARD_ROWS)
    box.environment = {BATCH_SECONDS: str(batch_seconds)}
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
    assert states(job).get(f"{job}_1", "CANCELLED") == "CANCELLED"  # Slurm forgets it at once
    assert not [attempt for attempt in box.began() if attempt.startswith("1-")]
    proven(box, found)


def test_every_rank_is_there_twice(tmp_path: Path, found: Found) -> None:
    """Fault 16: one task id started twice: the command is run again while its array runs; members share rows."""
    box = box_of(tmp_path, batch_seconds=0.3)
    jobs = [submitted(box, workers=2), submitted(box, workers=2)]
    found.num_faults += 1
    for job in jobs:
        wait_until_all(job, "COMPLETED")
    ranks = sorted(attempt.partition("-")[0] for attempt in box.began())
    assert ranks == ["0", "0", "1", "1"], "not all members took part"
    proven(box, found)  # towards the end idle members help others, and both may generate what neither has put down


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
    wait_until_all(job, "PENDING")
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


def script_of_the_docs(box: Box, *, time_limit: str) -> Path:
    """The script of docs/clusters.md for three members, which finds our job under the name of vlm-batch."""
    text = (CHECKOUT / "docs" / "clusters.md").read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if block.startswith("#!"))
    for written, ours in (
        ("--array=0-7", "--array=0-2"),
        ("--cpus-per-task=6 --gres=gpu:1", "--cpus-per-task=1"),
        ("--time=4:00:00", f"--time={time_limit}"),
        ("B:USR1@120", "B:USR1@50"),
        ("run output_dir=outputs/captions", "run"),
    ):
        assert script.count(written) == 1, f"{written} is not in the script"
        script = script.replace(written, ours)
    folder = box.output.parent.parent / "bin"
    folder.mkdir()
    (folder / "vlm-batch").write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@" {shlex.join(box.words)}\n')
    (folder / "vlm-batch").chmod(0o755)
    path = folder / "job.sh"
    path.write_text(script)
    return path


def submitted_by_hand(box: Box, script: Path) -> str:
    environment = os.environ | box.environment | {
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{CHECKOUT}",
        LOG: str(box.log),
    }  # fmt: skip
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)],
        cwd=script.parent, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_script_of_the_docs(tmp_path: Path, found: Found) -> None:
    """Fault 7, 16: a batch script of one's own with srun, warned before its time limit: it queues itself again."""
    box = box_of(tmp_path, batch_seconds=1.2)
    script = script_of_the_docs(box, time_limit="1")
    job = submitted_by_hand(box, script)
    found.num_faults += 3
    wait_until_all(job, "COMPLETED")
    assert all(num_restarts(f"{job}_{number}") >= 1 for number in range(3))
    assert "SIGUSR1: stopping" in (script.parent / f"{job}_0.log").read_text()
    proven(box, found)


def test_the_script_of_the_docs_is_cancelled(tmp_path: Path, found: Found) -> None:
    """Fault 7, 16: scancel of a batch script of one's own: it ends in good order, and does not come back."""
    box = box_of(tmp_path, batch_seconds=1.0)
    script = script_of_the_docs(box, time_limit="10")
    job = submitted_by_hand(box, script)
    wait_for_rows(box)
    ask("scancel", job)
    found.num_faults += 1
    wait_until_all(job, "CANCELLED")
    assert [num_restarts(f"{job}_{number}") for number in range(3)] == [0, 0, 0]
    assert num_finished(box) < box.num_rows // SHARD_ROWS
    box.environment = {}
    box.finish(found)
