"""A run of many shards: a resume looks at the footers of all of them, and at nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faultbox import HERE

from pipeline.plan import read_plan

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

MEGABYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Started:
    """One start: how long it took until it knew what to do, and what it took at most."""

    printed: str
    code: int
    seconds: float
    cpu_seconds: float  # what it would have taken on a machine that does nothing else
    peak_bytes: int


def start(folder: Path, *words: str, **environment: str) -> Started:
    began = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable, "-c", "import fake_model; fake_model.start()", "run", "dataset=parquet", "vlm=demo",
            f"dataset.path={folder}/rows.parquet", "dataset.image_column=null", f"output_dir={folder}/out",
            "prompt.user={{n}}", "write.shard_rows=200", "engine.num_workers=1", *words,
        ],
        env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    printed, seconds, cpu_seconds = [], 0.0, 0.0
    with process.stdout:
        for line in process.stdout:
            printed.append(line)
            if "rows to answer in" in line:
                seconds = time.monotonic() - began
                times = psutil.Process(process.pid).cpu_times()
                cpu_seconds = times.user + times.system
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Started("".join(printed), process.returncode, seconds, cpu_seconds, usage.ru_maxrss * 1024)


@pytest.mark.parametrize("num_shards", [1_000, pytest.param(10_000, marks=pytest.mark.torture)])
def test_a_run_of_many_shards_resumes(num_shards: int, tmp_path: Path) -> None:
    """Fault 24: 10,000 shards of 2 million rows: a resume starts in less than 10 s, and memory does not grow."""
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, num_rows in ((small, 400), (large, 200 * num_shards)):
        folder.mkdir()
        pq.write_table(pa.table({"n": pa.array(range(num_rows), pa.int32())}), folder / "rows.parquet")
        assert start(folder, VLM_BATCH_CRASH_AT="shard_published").code < 0
    plan, data = read_plan(large / "out"), large / "out/data"
    assert plan is not None and plan.num_shards == num_shards
    first = data / "part-00000.parquet"
    lacking = num_shards * 2 // 3
    for number in set(range(1, num_shards)) - {lacking}:  # a footer is a footer
        os.link(first, data / f"{plan.shard(number).name}.parquet")
    reference, resumed = start(small), start(large)
    for started in (reference, resumed):
        assert started.code == 0, started.printed
        assert "200 rows to answer in 1 shards" in started.printed
    rows = pq.read_table(data / f"{plan.shard(lacking).name}.parquet", columns=["row_index"])["row_index"]
    assert rows.to_pylist() == list(range(200 * lacking, 200 * lacking + 200))
    assert f"{200 * num_shards:,} of {200 * num_shards:,} done" in resumed.printed
    print(
        f"{num_shards:,} shards: resumed in {resumed.seconds:.1f} s, of which {resumed.cpu_seconds:.1f} s at work, "
        f"{resumed.peak_bytes / MEGABYTE:.0f} MB at most"
    )
    assert 0 < resumed.cpu_seconds < 10
    assert resumed.seconds < 60, "it waits for something; other tests that share the cores are no reason for this"
    assert resumed.peak_bytes - reference.peak_bytes < 64 * MEGABYTE
