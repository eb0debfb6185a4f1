"""One start of the whole program around the fake model, over whatever a test made: its records, and what it printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

HERE = Path(__file__).parent
# Nothing of these may be in what the program prints of a dataset, or writes of an error.
CONTROLS = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n"}


@dataclass(frozen=True, slots=True)
class Ended:
    """What a start came to."""

    printed: str
    rows: list[dict[str, Any]]  # in the order of the shards

    def row(self, row_id: str) -> dict[str, Any]:
        [found] = [row for row in self.rows if row["id"] == row_id]
        return found


def fake_run(
    folder: Path,
    *words: str,
    code: int = 0,
    model: str = "fake_model",
    timeout: float = 120,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run the job `words`, with its results in folder/out; no process of it may be left.

    model: the module whose `start` is the program. environment: what it has besides.
    """
    output = folder / "out"
    process = subprocess.Popen(
        [
            sys.executable, "-c", f"import {model}; {model}.start()", "run", f"output_dir={output}", "vlm=demo",
            "engine.parity_rows=0", "report=false", *words,
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"} | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{printed}"
    assert "Traceback" not in printed, printed
    assert_nobody_is_left(process.pid)
    shards = sorted((output / "data").glob("part-*.parquet"))
    return Ended(printed, [row for shard in shards for row in pq.read_table(shard).to_pylist()])


def assert_nobody_is_left(group: int) -> None:
    """The fork server and the workers end with the process that started them, at once or nearly so."""
    deadline = time.monotonic() + 20
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "the run has ended, and a process of it has not"
        time.sleep(0.02)
