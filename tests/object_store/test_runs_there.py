"""Whole runs whose results, or whose pictures, are objects in a store: killed, shared by workers, resumed elsewhere."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import FaultyS3

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torture"))

from fake_model import BATCH_SECONDS, LOG
from faultbox import HERE, PROGRAM, PROMPT, make_pictures, right_records

from pipeline.audit import audit
from pipeline.write.crash_point import VARIABLE
from pipeline.write.file import matching
from pipeline.write.object_store import ObjectPath
from pipeline.write.shard import read_shard

NUM_ROWS = 90
KILLED = -signal.SIGKILL


class Job:
    """A job of some ninety pictures, and the answers that are right."""

    def __init__(self, folder: ObjectPath, local: Path, source: str = "") -> None:
        self.folder, self.local = folder, local
        make_pictures(local / "pictures", 0, NUM_ROWS)
        self.right = right_records(local / "pictures")
        self.source = source or str(local / "pictures")

    def start(self, *words: str, crash_at: str = "") -> subprocess.Popen[str]:
        environment = os.environ | {
            "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}",
            LOG: str(self.local / "log"),
        }
        job = [
            "dataset=images", f"dataset.path={self.source}", f"output_dir={self.folder}", f"prompt.user={PROMPT}",
            "write.shard_rows=30", "write.sync_seconds=0.05", "vlm=demo", "max_error_rate=null", "engine.num_workers=1",
            "engine.parity_rows=0", "report=false",
        ]  # fmt: skip
        return subprocess.Popen(
            [*PROGRAM, "run", *job, *words],
            cwd=self.local,
            env=environment | ({VARIABLE: crash_at} if crash_at else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, crash_at: str = "", code: int = 0) -> str:
        process = self.start(*words, crash_at=crash_at)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == code, printed
        return printed

    def records(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path in matching(self.folder / "data", "*"):
            found += read_shard(path).to_pylist()
        return found

    def check(self) -> None:
        """All is there, right, once; and nothing else."""
        found = self.records()
        assert {row["id"]: row["response"] for row in found} == self.right and len(found) == NUM_ROWS
        assert [row["row_index"] for row in found] == list(range(NUM_ROWS))
        assert audit(self.folder).passed and matching(self.folder / "work", "*") == []

    def answers_made(self) -> int:
        log = self.local / "log"
        return log.read_text().count("made ") if log.exists() else 0


@pytest.fixture
def job(folder: ObjectPath, tmp_path: Path) -> Job:
    return Job(folder, tmp_path)


@pytest.mark.slow
def test_pictures_and_answers_in_a_store(folder: ObjectPath, tmp_path: Path) -> None:
    job = Job(folder / "out", tmp_path, source=f"{folder}/pictures")
    for path in (tmp_path / "pictures").iterdir():
        (folder / "pictures" / path.name).replace(path.read_bytes())
    printed = job.run()
    assert f"rows     {NUM_ROWS} of {NUM_ROWS} done" in printed and f"folder   {folder}/out" in printed
    job.check()
    made = job.answers_made()
    assert "no model was loaded" in job.run() and job.answers_made() == made


POINTS = ["shard_checked"]
SLOW_POINTS = [
    "plan_created", "claim_taken", "journal_synced:3", "journal_synced", "shard_opened", "shard_published",
    "shard_settled", "journal_removed", "manifest_ready", "manifest_written",
]  # fmt: skip


@pytest.mark.parametrize("point", [*POINTS, *(pytest.param(point, marks=pytest.mark.slow) for point in SLOW_POINTS)])
def test_a_crash_at_each_point(job: Job, point: str) -> None:
    """Fault 2: SIGKILL at named points of a run whose results go to an object store."""
    job.run(crash_at=point, code=KILLED)
    job.run()
    job.check()


@pytest.mark.slow
def test_kills_at_random_moments(job: Job, s3: FaultyS3) -> None:
    """Fault 1, 21: SIGKILL of workers at random moments, on a line that loses every now and then a reply."""
    rng = random.Random(7)
    for _ in range(12):
        for kind in ("reply lost", "lost", "503"):
            s3.fail("PUT", rng.choice(["work/", "data/", "part-"]), kind, 1)
        process = job.start()
        time.sleep(rng.uniform(0.3, 2.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    s3.faults.clear()
    job.run()
    job.check()


@pytest.mark.slow
def test_workers_share_a_store(job: Job) -> None:
    """Fault 12: four workers at one job in an object store, one of which is killed: every row once."""
    processes = [job.start() for _ in range(4)]
    time.sleep(1.5)
    os.killpg(processes[0].pid, signal.SIGKILL)
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes[1:]] == [0, 0, 0], printed
    job.run()
    job.check()


@pytest.mark.slow
def test_a_signal_and_another_start(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 7: SIGTERM ends a run in an object store with code 75, and the next start goes on."""
    monkeypatch.setenv(BATCH_SECONDS, "0.1")  # else it may be done before it is told to stop
    process = job.start("write.shard_rows=90")
    deadline = time.monotonic() + 60
    while not matching(job.folder / "work", "*.journal") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    kept = job.answers_made()
    job.run("write.shard_rows=90")
    job.check()
    good = sum(answer is not None for answer in job.right.values())
    assert kept > 0 and job.answers_made() == good, "what was finished is not asked for again"


@pytest.mark.slow
def test_secrets_of_an_address_stay_out_of_what_is_written(job: Job) -> None:
    job.run()
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    for folder in ("", "plan", "data", "stats"):
        for path in matching(job.folder / folder if folder else job.folder, "*"):
            assert secret not in path.read_bytes(), path
