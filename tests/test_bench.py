"""The benchmark judges what it measured, and nothing it did not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
pytest.importorskip("psutil", reason="the benchmark watches processes with psutil (extra dev)")


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_a_target_is_held_against_the_median() -> None:
    from bench_figure import Sizes, compared

    assert compared("speed", "x", [1.0, 4.5, 5.0], ">= 4", Sizes()).passed is True
    assert compared("speed", "x", [1.0, 3.9, 5.0], ">= 4", Sizes()).passed is False
    assert compared("plan", "s", [29.0, 31.0, 99.0], "< 30", Sizes()).passed is False


def test_a_quick_run_judges_no_speed() -> None:
    from bench_figure import QUICK, compared, table

    figure = compared("speed", "x", [0.1], ">= 4", QUICK)
    assert figure.passed is None
    assert "| not judged |" in table([figure])


def test_a_missed_target_shows_in_the_table() -> None:
    from bench_figure import Sizes, compared, table

    assert "| NO |" in table([compared("speed", "x", [2.0, 3.0], ">= 4", Sizes())])


def test_what_could_not_be_measured_has_a_line_too() -> None:
    from bench_figure import Figure, table

    line = table([Figure("memory could not be measured", "", [], "measured", False)]).splitlines()[-1]
    assert line == "| memory could not be measured | - |  |  | measured | NO |  |"


def test_a_side_that_ran_fewer_rows_is_scaled_from_its_work_and_not_from_its_start_up() -> None:
    from bench_speed import Side, whole_seconds

    side = Side(num_rows=100, wall_seconds=15.0, work_seconds=5.0, cpu_seconds=0.0, load_average=0.0, answers={})
    assert whole_seconds(side, 100) == 15.0
    assert whole_seconds(side, 1_000) == 10.0 + 50.0


def test_the_rows_are_the_demos_as_often_as_needed_under_fresh_ids(tmp_path: Path) -> None:
    from bench_workload import write_rows

    write_rows(tmp_path / "rows.parquet", 2_000, num_images=1)
    rows = pq.read_table(tmp_path / "rows.parquet")
    assert len(rows) == len(set(rows["id"].to_pylist())) == 2_000
    assert {len(images) for images in rows["images"].to_pylist()} == {1}


def test_a_command_is_watched_until_it_ends_and_its_failure_is_told(tmp_path: Path) -> None:
    from bench_trace import traced

    code = "import time; kept = bytearray(50_000_000); time.sleep(0.3); print('said')"
    trace = traced([sys.executable, "-c", code], tmp_path, every=0.02)
    assert trace.output == "said\n"
    assert trace.wall_seconds > 0.3
    assert max(size for _, size in trace.resident["main"]) > 50_000_000
    with pytest.raises(RuntimeError, match="exit code 3"):
        traced([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_one_benchmark_writes_its_table_and_every_sample(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--quick", "--only", "plan", "--output", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [figure["name"] for figure in content["figures"]][:2] == ["plan: image files", "plan: Parquet rows"]
    assert content["circumstances"]["versions"]["torch"]
    assert (tmp_path / "bench.md").read_text() == found.stdout
