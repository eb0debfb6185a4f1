"""A long run needs no more memory, and holds no more files open, at its end than near its beginning."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from fake_model import BATCH_ROWS
from faultbox import Box

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

MEGABYTE = 1 << 20


class Sample(NamedTuple):
    """A look at a run."""

    num_rows: int  # answered so far
    rss_bytes: int  # of all its processes
    num_files: int  # that they hold open


def samples_of(box: Box, process: subprocess.Popen[str]) -> list[Sample]:
    found = []
    while process.poll() is None:
        time.sleep(0.03)
        num_rows = box.log.stat().st_size if box.log.exists() else 0  # bytes of a log with a line or two for each
        pids = processes_of(process.pid)
        try:
            rss = sum(rss_bytes(pid) for pid in pids)
            num_files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        except OSError:  # one has just ended
            continue
        found.append(Sample(num_rows, rss, num_files))
    return found


def processes_of(group: int) -> list[int]:
    """The processes of a group: a worker process is in that of the run."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.getpgid(int(entry)) == group:
                found.append(int(entry))
        except ProcessLookupError:
            continue
    return found


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_rows", [20_000, pytest.param(50_000, marks=pytest.mark.torture)])
def test_memory_and_open_files_do_not_grow_with_the_rows(num_rows: int, tmp_path: Path) -> None:
    """Fault 51: over 50,000 rows memory grows by less than 1 MB for 1,000 rows, and no file stays open."""
    box = Box(tmp_path / "box", num_rows, shard_rows=500)
    box.environment[BATCH_ROWS] = "32"
    process = box.start()
    samples = samples_of(box, process)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    whole = samples[-1].num_rows
    steady = [sample for sample in samples if 0.2 * whole < sample.num_rows < 0.98 * whole]
    assert len(steady) > 20, f"only {len(steady)} looks at the run"
    rows = np.array([sample.num_rows for sample in steady]) / whole * num_rows
    slope = np.polyfit(rows, [sample.rss_bytes / MEGABYTE for sample in steady], 1)[0] * 1000
    print(f"{len(steady)} looks: {steady[0].rss_bytes / MEGABYTE:.0f} .. {steady[-1].rss_bytes / MEGABYTE:.0f} MB")
    print(f"{slope:.3f} MB for 1,000 rows; files {steady[0].num_files} .. {steady[-1].num_files}")
    assert slope < 1
    quarter = len(steady) // 4  # a shard that is being written has a file or two open for a moment
    first, last = (np.median([sample.num_files for sample in part]) for part in (steady[:quarter], steady[-quarter:]))
    assert last <= first + 1
