"""Rows that end the whole process: found, put down as errors, and everybody else answered."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_model import BATCH_ROWS, POISON
from faultbox import KILLED, Box, Found


def starts_until_done(box: Box, found: Found, most: int) -> int:
    """Start the job again and again, as a scheduler does; how often it died."""
    for number in range(most):
        process = box.start()
        printed, _ = process.communicate(timeout=60)
        if process.returncode == 0:
            return number
        assert process.returncode == KILLED, printed
        found.num_faults += 1
        box.check_always()
    raise AssertionError(f"not done after {most} starts\n{printed}")


@pytest.mark.parametrize(
    ("batch_rows", "most"),
    [pytest.param(1, 5, marks=pytest.mark.torture), (3, 6), pytest.param(40, 8, marks=pytest.mark.torture)],
)
def test_a_row_that_ends_the_process(batch_rows: int, most: int, tmp_path: Path, found: Found) -> None:
    """Fault 50: a row that ends the process becomes an error row after a few deaths."""
    box = Box(tmp_path / "box", 100, shard_rows=60)
    box.environment = {POISON: "00037.png", BATCH_ROWS: str(batch_rows)}
    box.right["00037.png"] = None
    assert starts_until_done(box, found, most + 1) <= most
    box.finish(found)
    [row] = [row for row in pq.read_table(box.output / "data").to_pylist() if row["id"] == "00037.png"]
    assert (row["error_stage"], row["error_type"]) == ("generate", "ProcessEnded")
    # A retry asks it again; with the fault mended it is answered.
    box.environment = {}
    box.run("only=[ProcessEnded]", command="retry")
    [row] = [row for row in pq.read_table(box.output / "data").to_pylist() if row["id"] == "00037.png"]
    assert (row["status"], row["attempt"]) == ("ok", 2)


@pytest.mark.torture
def test_several_rows_that_end_the_process(tmp_path: Path, found: Found) -> None:
    """Fault 50: several rows that end the process, in one shard and in two."""
    box = Box(tmp_path / "box", 100, shard_rows=60)
    poison = ["00010.png", "00011.png", "00058.png", "00061.png"]
    box.environment = {POISON: ",".join(poison), BATCH_ROWS: "8"}
    box.right |= dict.fromkeys(poison)
    assert starts_until_done(box, found, 20) <= 16
    box.finish(found)
    kinds = Counter(row["error_type"] for row in pq.read_table(box.output / "data").to_pylist())
    assert kinds["ProcessEnded"] == len(poison)


@pytest.mark.parametrize(("batch_rows", "num_kills"), [(5, 2), (1, 3)])
def test_kills_from_outside_condemn_nobody(batch_rows: int, num_kills: int, tmp_path: Path, found: Found) -> None:
    """Fault 50: kills at the same rows again and again, once at one that is asked alone, cost time and no answer."""
    box = Box(tmp_path / "box", 60, shard_rows=60)
    box.environment = {POISON: "00023.png", BATCH_ROWS: str(batch_rows)}
    for _ in range(num_kills):
        process = box.start()
        process.communicate(timeout=60)
        assert process.returncode == KILLED
        found.num_faults += 1
    box.environment = {}
    box.finish(found)
