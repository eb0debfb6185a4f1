"""Time, price and disk from what was measured; workers as cluster.* says."""

from __future__ import annotations

import os
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from small_run import COLUMNS, answer, row

from pipeline.compose import compose
from pipeline.errors import UsageError
from pipeline.forecast import fleet as fleet_module
from pipeline.forecast.estimate import Estimate, estimated
from pipeline.forecast.fleet import Fleet, fleet
from pipeline.forecast.pace import Pace
from pipeline.forecast.volume import volume
from pipeline.forecast.warm_run import WarmRun
from pipeline.records import RecordKey
from pipeline.write.columns import journal_batch
from pipeline.write.schema import WriteConfig, journal_row, output_schema
from pipeline.write.shard import write_content

CONSTANTS = {"model_id": "demo", "model_revision": None, "run_id": "0" * 32}


def estimate(num_rows: int, team: Fleet = Fleet(1), start_seconds: float = 10.0, **costs: float) -> Estimate:  # noqa: B008
    known = {"vision": 0.0, "prefill": 0.5, "other": 0.0, "writing": 0.0, "preparing": 0.0, "input": 0.01}
    expected = Pace(**(known | costs), records_per_row=1, decoding=None)  # type: ignore[arg-type]
    found: Any = SimpleNamespace(num_left=num_rows, num_rows_left=num_rows, plan=SimpleNamespace(records_per_row=1))
    warm = WarmRun(engine="slots", device="cpu", records_per_row=1, indices=set(range(20)))
    return estimated(found, warm, expected, team, start_seconds)


def test_time_is_start_up_and_work_and_hours_are_of_all_accelerators() -> None:
    one = estimate(1000)
    assert one.seconds.value == pytest.approx(510)
    assert one.seconds.low < 510 < one.seconds.high
    four = estimate(1000, Fleet(4, accelerators=2))
    assert four.seconds.value == pytest.approx(10 + 125)
    assert four.accelerator_hours.value == pytest.approx(135 * 8 / 3600), "each of them starts up"
    assert four.rows_per_second == pytest.approx(4 * 2.0)


def test_what_limits_is_named() -> None:
    assert estimate(1000).limit == "model"
    late = estimate(1000, input=2.0)
    assert late.limit == "input"
    assert late.seconds.value == pytest.approx(2010)
    assert late.model_rows_per_second == pytest.approx(2.0), "what it could do"
    assert late.input_rows_per_second == pytest.approx(0.5)
    assert estimate(10).limit == "start-up"


def test_what_is_not_measured_here_widens_the_interval() -> None:
    def width(found: Estimate) -> float:
        return found.seconds.high / found.seconds.low

    assert width(estimate(10_000)) < width(estimate(10_000, Fleet(2))) < width(estimate(10_000, Fleet(2, num_here=2)))


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some libraries set what a launcher sets, for the whole process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
def test_workers_are_those_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def team(*words: str) -> Fleet:
        return fleet(compose(words).config)

    monkeypatch.setattr(fleet_module, "visible_gpus", lambda: [])
    assert team() == Fleet(1)
    assert team("cluster=gpus", "cluster.workers=3") == Fleet(3, 1.0, 3)
    with pytest.raises(UsageError, match="no GPU is visible"):
        team("cluster=gpus")
    slurm = team("cluster=slurm", "cluster.workers=8", "cluster.gpus=a100:4", "cluster.max_running=5")
    assert (slurm.num_workers, slurm.accelerators, slurm.num_here) == (5, 4.0, 1)
    assert slurm.note is not None and "measured on this machine" in slurm.note
    ray = team("cluster=ray")
    assert ray.num_workers == 1 and ray.note is not None and "cluster.workers is not set" in ray.note
    assert team("cluster=ray", "cluster.workers=7", "cluster.gpus=0.5").accelerators == 0.5
    monkeypatch.setattr(fleet_module, "visible_gpus", lambda: ["0", "1"])
    assert team("cluster=gpus").num_workers == 2
    assert team("vlm.device_map=auto").accelerators == 2


@pytest.mark.usefixtures("no_launcher")
def test_a_worker_is_measured_on_its_share_of_the_machine() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    with Fleet(2, num_here=2).environment():
        assert [os.environ[name] for name in names] == ["0", "2", "0", "2"]
    assert {name: os.environ.get(name) for name in names} == before


@pytest.mark.parametrize("num_sampled", [100, 200])
def test_bytes_of_a_shard_are_foreseen_from_a_part_of_it(num_sampled: int) -> None:
    schema = output_schema(WriteConfig(), COLUMNS)

    def answers(start: int, stop: int) -> list[Any]:
        return [
            (answer(RecordKey(index, "default", 0), f"An answer about {index * 7919} things."), row(index).columns)
            for index in range(start, stop)
        ]

    found = volume(answers(0, num_sampled), schema, CONSTANTS, "zstd")
    batch, _ = journal_batch([journal_row(one, columns, schema, 1) for one, columns in answers(0, 1000)], schema)
    file = BytesIO()
    write_content(schema.publish(pa.Table.from_batches([batch]), CONSTANTS), file, "zstd")
    assert found.data_bytes(1000, 1) == pytest.approx(file.tell(), rel=0.2)
    assert found.journal_bytes > found.record_bytes


def test_few_answers_are_counted_as_they_are() -> None:
    schema = output_schema(WriteConfig(), COLUMNS)
    found = volume([(answer(RecordKey(0, "default", 0)), row(0).columns)], schema, CONSTANTS, "zstd")
    assert found.file_bytes == 0 and found.record_bytes > 0
    assert volume([], schema, CONSTANTS, "zstd").record_bytes > 0
