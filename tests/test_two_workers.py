"""Two starts on one folder: they share the work, and one that is killed leaves its shards to the other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import CommandLine, wait_for_journal

JOB = ["run", "dataset.max_rows=400", "write.shard_rows=40", "write.sync_seconds=0.1", "output_dir=shared"]


def start(folder: Path) -> subprocess.Popen[str]:
    # Small batches, so that neither is done before the other begins.
    words = [sys.executable, "-m", "pipeline", *JOB, "engine.max_batch_rows=4"]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def num_answered(output_dir: Path) -> list[int]:
    return sorted(json.loads(path.read_text())["num_answered"] for path in (output_dir / "stats").glob("worker-*.json"))


@pytest.mark.slow
def test_two_workers_share_the_shards_and_do_none_twice(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 12: two workers share the shards; both end with exit code 0 when all is done, whoever did it."""
    both = [start(tmp_path), start(tmp_path)]
    for process in both:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    vlm_batch("audit", "output_dir=shared")
    answered = num_answered(tmp_path / "shared")
    assert sum(answered) == 400
    assert answered[0] > 0, "one of them found nothing to do"


@pytest.mark.slow
def test_the_shards_of_a_killed_worker_are_taken_over_at_once(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 12, 13: the claim of a killed worker holds nobody up, and its journal is not asked for again."""
    killed = start(tmp_path)
    wait_for_journal(tmp_path / "shared", killed)
    other = start(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    _, said = other.communicate(timeout=200)
    assert other.returncode == 0, said
    vlm_batch("audit", "output_dir=shared")
    rows = pq.read_table(tmp_path / "shared" / "data", columns=["row_index"])["row_index"].to_pylist()
    assert rows == list(range(400))
    assert num_answered(tmp_path / "shared")[-1] < 400, "what the killed worker had journalled was asked for again"
