"""Killing it costs nothing but time: SIGKILL again and again, and the result is that of an unbroken run."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import CommandLine

# Small batches make the run last, short syncs give every kill something to find.
JOB = ["run", "write.shard_rows=70", "write.sync_seconds=0.1", "engine.max_batch_rows=3", "output_dir=killed"]


def finished_bytes(output_dir: Path) -> int:
    """Grows with every answer that reaches the disk."""
    files = [*(output_dir / "data").glob("part-*.parquet"), *(output_dir / "work").glob("*.journal")]
    total = 0
    for path in files:
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # published between the two lines
            continue
    return total


def without_run_id(output_dir: Path) -> pa.Table:
    table = pq.read_table(output_dir / "data")
    return table.drop_columns(["run_id"])


@pytest.mark.timeout(600)
@pytest.mark.slow  # make test has the kills of tests/torture
@pytest.mark.parametrize(("num_kills", "num_rows"), [(20, 600)])
def test_kills_lose_no_row_and_change_no_answer(
    num_kills: int, num_rows: int, vlm_batch: CommandLine, tmp_path: Path
) -> None:
    """Fault 1: SIGKILL of a real model's run at its start and at work: the result equals that of an unbroken run.

    Readers see whole shards only, at any moment.
    """
    rng = random.Random(2026)
    output_dir, job = tmp_path / "killed", [*JOB, f"dataset.max_rows={num_rows}"]
    num_kills_at_work = 0
    for kill in range(num_kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *job], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kill % 4 == 3:
            time.sleep(rng.uniform(0.2, 3.0))
        else:
            before, deadline = finished_bytes(output_dir), time.monotonic() + 90
            while process.poll() is None and finished_bytes(output_dir) <= before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert process.poll() is None, "the run ended before its kill: make it longer"
            time.sleep(rng.uniform(0, 0.4))
            num_kills_at_work += 1
        process.kill()
        process.wait()
        for path in (output_dir / "data").glob("*"):
            assert pq.ParquetFile(path, page_checksum_verification=True).read().num_rows in (70, num_rows % 70)
    assert num_kills_at_work >= num_kills * 3 // 4
    vlm_batch(*job)
    vlm_batch("audit", "output_dir=killed")
    vlm_batch(*[word.replace("killed", "unbroken") for word in job])
    assert without_run_id(output_dir).equals(without_run_id(tmp_path / "unbroken"))
    assert not (output_dir / "work").exists()
