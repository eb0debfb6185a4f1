"""What a worker says of itself while it works, and what rank 0 shows of all."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import meter as meter_module
from pipeline import worker_stats
from pipeline.meter import Meter
from pipeline.records import Answer, Fault, RecordKey, Stage
from pipeline.tally import Tally
from pipeline.vlm.base import EngineCounts


def answer(row_index: int, fault: Fault | None = None) -> Answer:
    return Answer(RecordKey(row_index, "default", 0), f"row {row_index}", fault=fault)


def meter(tally: Tally, folder: Path, rank: int = 0) -> tuple[Meter, io.StringIO]:
    shown = io.StringIO()
    return Meter(tally, folder, rank=rank, plan_id="plan", stream=shown), shown


def heartbeats(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("worker-*.json"))]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_stats, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(meter_module, "_LINE_SECONDS", 0.0)


def wait_until_updated(folder: Path, after: float) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while (found := heartbeats(folder)[0])["updated"] <= after:
        assert time.monotonic() < deadline, "no heartbeat"
        time.sleep(0.01)
    return found


def test_a_worker_is_heard_of_while_it_loads_and_while_no_answer_comes(tmp_path: Path) -> None:
    one, _ = meter(Tally(10), tmp_path)
    with one:
        first = heartbeats(tmp_path)[0]
        assert first["state"] == "loading" and first["pid"] == os.getpid()
        assert wait_until_updated(tmp_path, first["updated"])["state"] == "loading"
        one.loaded()
        assert wait_until_updated(tmp_path, time.time())["state"] == "running"
        one.end("done", {"num_shards_published": 1})
    time.sleep(0.2)
    assert heartbeats(tmp_path)[0]["state"] == "done", "a heartbeat came after the last word"


def test_a_heartbeat_says_what_the_engine_did_and_what_went_wrong_lately(tmp_path: Path) -> None:
    """Which those who watch a run show before it has ended."""

    class Engine:
        counts = EngineCounts()

    engine, tally = Engine(), Tally(10)
    one, _ = meter(tally, tmp_path)
    one.loaded(engine)
    engine.counts.decode_seconds = 1.5
    tally.add(answer(7, Fault(Stage.DECODE, "Broken", "no picture")))
    one.beat()
    said = heartbeats(tmp_path)[0]
    assert said["engine"]["decode_seconds"] == 1.5 and said["memory_bytes"] > 1 << 20
    assert [error[1:] for error in said["newest_errors"]] == [["decode/Broken", "row 7: no picture"]]


def test_rank_0_shows_what_all_do(tmp_path: Path) -> None:
    earlier = {"plan_id": "plan", "rank": 1, "state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    earlier |= {"updated": time.time(), "num_answered": 5, "num_errors": 1}
    earlier |= {"rows_per_second": 2.0, "tokens_per_second": 20.0}
    path = tmp_path / "worker-1-x.json"
    path.write_text(json.dumps(earlier))
    (tmp_path / "worker-2-y.json").write_text(json.dumps(earlier | {"plan_id": "another"}))
    tally = Tally(100)
    tally.resume(10, {})
    one, shown = meter(tally, tmp_path)
    one.loaded()
    tally.add(answer(0, Fault(Stage.DECODE, "Broken", "broken")))
    path.write_text(json.dumps(earlier | {"num_answered": 25, "num_errors": 3}))  # 20 since rank 0 began
    one.beat()
    one.show()
    line = shown.getvalue().splitlines()[-1]
    assert line.startswith("31 of 100 rows, ") and "3 errors, 2 workers" in line
    path.write_text(json.dumps(earlier | {"num_answered": 500, "state": "done"}))  # some rows were answered twice
    one.beat()
    one.show()
    line = shown.getvalue().splitlines()[-1]
    assert line.startswith("100 of 100 rows, ") and "workers" not in line


def test_other_ranks_show_nothing(tmp_path: Path) -> None:
    one, shown = meter(Tally(10), tmp_path, rank=3)
    one.loaded()
    one.show()
    one.end("done", {})
    assert shown.getvalue() == ""
    assert heartbeats(tmp_path)[0]["rank"] == 3


def test_a_heartbeat_has_how_far_the_worker_was_at_which_time(tmp_path: Path) -> None:
    tally = Tally(10)
    one, _ = meter(tally, tmp_path)
    tally.add(answer(0))
    one.beat()
    one.waiting_for_input_seconds = 1.26
    tally.add(answer(1))
    one.end("done", {})
    series = heartbeats(tmp_path)[0]["series"]
    assert series["num_answered"] == [1, 2], "the last word is a point, however near the one before"
    assert series["waiting_for_input_seconds"] == [0.0, 1.3]
    assert len(series["seconds"]) == 2 and series["seconds"] == sorted(series["seconds"])


def test_a_series_is_bounded_and_even() -> None:
    series = worker_stats.Series("seconds", "rows")
    for tenth in range(200_000):
        series.add(tenth / 10, tenth)
    found = series.until(20_000.0, 200_000)
    assert 60 <= len(found["seconds"]) <= 121
    steps = {round(later - before, 6) for before, later in itertools.pairwise(found["seconds"][:-1])}
    assert len(steps) == 1, "every point is as far from the next"
    assert found["seconds"][0] == 0 and found["seconds"][-1] == 20_000
    assert found["rows"] == [10 * seconds for seconds in found["seconds"]]


def test_a_short_series_has_a_point_a_second() -> None:
    series = worker_stats.Series("seconds")
    for tenth in range(55):
        series.add(tenth / 10)
    assert series.until(5.4) == {"seconds": [0, 1, 2, 3, 4, 5, 5.4]}
