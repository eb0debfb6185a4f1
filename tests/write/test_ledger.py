"""The ledger: every record key ends in exactly one record, whatever is killed, torn or odd."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import FAULT, SETTINGS, answer, finished_run, keys_of, new_ledger, new_plan, row, tree, work

from pipeline.audit import audit
from pipeline.errors import RunFailed
from pipeline.plan import Plan, read_plan
from pipeline.records import RecordKey
from pipeline.tally import Tally
from pipeline.write.schema import WriteConfig, output_schema
from pipeline.write.shard import published_shards

# Where a process is killed: the function that is entered last.
CRASH_POINTS = ["os.fsync", "pyarrow.parquet.write_table", "os.link", "os.unlink"]


def read(output_dir: Path, number: int = 0) -> pa.Table:
    return pq.read_table(output_dir / f"data/part-{number:05d}.parquet", partitioning=None)


def work_files(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "work").iterdir())


def test_every_key_of_a_shard_ends_in_one_record_in_input_order(tmp_path: Path) -> None:
    """K prompts x n samples of a row lie beside each other, in the order of the configuration, not of arrival."""
    plan = new_plan(tmp_path, 3, prompt_names=("short", "about", "zoo"), num_samples=2)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0), keys=reversed(list(keys_of(plan, plan.shard(0)))))
    ledger.close()
    rows = read(tmp_path)
    found = list(zip(*(rows[name].to_pylist() for name in ("row_index", "prompt_name", "sample_index")), strict=True))
    assert found == [(i, name, n) for i in range(3) for name in ("short", "about", "zoo") for n in range(2)]
    assert rows["id"][0].as_py() == "00000.jpg"
    assert rows["year"].to_pylist() == [1900] * 6 + [1901] * 6 + [1902] * 6
    assert rows["response"][1].as_py() == "answer to (0, 'short', 1)"
    assert work_files(tmp_path) == []
    assert audit(tmp_path).passed


def test_the_file_does_not_depend_on_when_its_answers_came(tmp_path: Path) -> None:
    """In one go, backwards, or over two starts and five journal batches: the same bytes."""
    plan = new_plan(tmp_path, 6, shard_rows=6)
    shard, final = plan.shard(0), tmp_path / "data/part-00000.parquet"
    contents = []
    for way in range(3):
        keys = list(keys_of(plan, shard))
        ledger = new_ledger(tmp_path, plan, f"way{way}")
        if way == 2:
            work(ledger, plan, shard, keys[4:])
            ledger.close()
            ledger = new_ledger(tmp_path, plan, "again")
            ledger.open(shard)
            for key in keys[:4]:
                ledger.expect(row(key.row_index), [key], shard)
                ledger.record(answer(key))
                ledger.sync()
        else:
            work(ledger, plan, shard, keys[:: -1 if way else 1])
        ledger.close()
        contents.append(final.read_bytes())
        final.unlink()
    assert contents[0] == contents[1] == contents[2]


def test_what_was_synced_is_not_asked_again(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    keys = list(keys_of(plan, plan.shard(0)))
    first = new_ledger(tmp_path, plan, "first")
    work(first, plan, plan.shard(0), keys[:2])
    first.close()
    assert published_shards(tmp_path / "data", plan.plan_id) == {}
    tally = Tally(plan.num_records)
    second = new_ledger(tmp_path, plan, "second", tally=tally)
    assert work(second, plan, plan.shard(0)) == keys[2:]
    second.close()
    assert (tally.num_resumed, tally.num_answered, tally.num_done) == (2, 1, 3)
    assert audit(tmp_path).passed


def test_two_attempts_that_answered_the_same_key_leave_one_record(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    keys = list(keys_of(plan, plan.shard(0)))
    red, blue = new_ledger(tmp_path, plan, "red"), new_ledger(tmp_path, plan, "blue")
    work(red, plan, plan.shard(0), keys[:2])
    work(blue, plan, plan.shard(0), keys[1:])
    red.close()
    blue.close()
    third = new_ledger(tmp_path, plan, "third")
    assert third.open(plan.shard(0)) == set()
    third.close()
    assert third.num_published == 1
    assert audit(tmp_path).passed
    assert work_files(tmp_path) == []


def crash(output_dir: Path, point: str, num_synced: int) -> None:
    plan = read_plan(output_dir)
    assert plan is not None
    ledger = new_ledger(output_dir, plan, f"crash-{point}-{num_synced}")
    shard = plan.shard(0)
    missing = ledger.open(shard)
    keys = [key for key in keys_of(plan, shard) if key in missing]
    for key in keys:
        ledger.expect(row(key.row_index), [key], shard)
    for number, key in enumerate(keys):
        if number == num_synced:
            ledger.sync()
        if number == len(keys) - 1:
            module, _, name = point.rpartition(".")
            setattr(
                {"os": os, "pyarrow.parquet": pq}[module], name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            )
        ledger.record(answer(key))


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_between_the_last_answer_and_publication_loses_nothing_that_was_synced(
    tmp_path: Path, point: str
) -> None:
    plan = new_plan(tmp_path, 6, shard_rows=6)
    process = multiprocessing.get_context("spawn").Process(target=crash, args=(tmp_path, point, 4))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    done = published_shards(tmp_path / "data", plan.plan_id)
    assert list(done) == ([0] if point == "os.unlink" else [])
    tally = Tally(plan.num_records)
    ledger = new_ledger(tmp_path, plan, "resumed", tally=tally)
    redone = work(ledger, plan, plan.shard(0))
    ledger.close()
    # The last append comes before all of this but its own fsync, and a killed process leaves what it had written.
    assert redone == []
    assert tally.num_resumed == 6
    assert audit(tmp_path).passed


def test_a_published_shard_of_another_worker_is_not_done_again(tmp_path: Path) -> None:
    """It may have been published after this worker listed what is done."""
    plan = finished_run(tmp_path)
    before = tree(tmp_path / "data")
    tally = Tally(plan.num_records)
    late = new_ledger(tmp_path, plan, "late", tally=tally)
    assert work(late, plan, plan.shard(0)) == []
    late.close()
    assert (late.num_published, tally.num_resumed) == (1, 3)
    assert tree(tmp_path / "data") == before


@pytest.mark.parametrize("has_journal", [True, False])
def test_the_slower_of_two_workers_at_one_shard_finds_it_done_and_goes_on(tmp_path: Path, has_journal: bool) -> None:
    """Even if the quicker one finished the whole run and cleared work/ away."""
    plan = new_plan(tmp_path, 6)
    slow, quick = new_ledger(tmp_path, plan, "slow"), new_ledger(tmp_path, plan, "quick")
    keys = list(keys_of(plan, plan.shard(0)))
    slow.open(plan.shard(0))
    for key in keys:
        slow.expect(row(key.row_index), [key], plan.shard(0))
    slow.record(answer(keys[0]))
    if has_journal:
        slow.sync()
    work(quick, plan, plan.shard(0))
    before = (tmp_path / "data/part-00000.parquet").read_bytes()
    (tmp_path / "work").rmdir()  # empty: the quick one removed the slow one's journal with its own
    slow.record(answer(keys[1]))
    slow.sync()
    slow.record(answer(keys[2]))
    (tmp_path / "work").mkdir()
    work(slow, plan, plan.shard(1))
    slow.close()
    quick.close()
    assert slow.num_published == 2
    assert (tmp_path / "data/part-00000.parquet").read_bytes() == before
    assert audit(tmp_path).passed


def test_a_lone_surrogate_is_replaced_and_said(tmp_path: Path) -> None:
    """A model can end in half a character, a JSON file can hold half of one, anywhere."""
    plan = new_plan(tmp_path, 3, shard_rows=3)
    columns = pa.schema([("tags", pa.list_(pa.string())), ("path", pa.string())])
    ledger = new_ledger(tmp_path, plan, columns=columns)
    shard = plan.shard(0)
    ledger.open(shard)
    for key in keys_of(plan, shard):
        ledger.expect(row(key.row_index, tags=["ok", "\ud800" if key.row_index == 2 else ""]), [key], shard)
        ledger.record(answer(key, "half \udc80 a character" if key.row_index == 1 else "naïve \0 ☃"))
    ledger.close()
    rows = read(tmp_path)
    assert rows["response"].to_pylist() == ["naïve \0 ☃", "half \ufffd a character", "naïve \0 ☃"]
    assert rows["tags"].to_pylist() == [["ok", ""], ["ok", ""], ["ok", "\ufffd"]]
    assert rows["status"].to_pylist() == ["ok"] * 3
    assert [bool(warnings) for warnings in rows["warnings"].to_pylist()] == [False, True, True]


def test_a_value_that_does_not_fit_its_column_costs_its_own_record_and_is_counted(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    tally = Tally(plan.num_records)
    ledger = new_ledger(tmp_path, plan, tally=tally)
    shard = plan.shard(0)
    ledger.open(shard)
    for key in keys_of(plan, shard):
        ledger.expect(row(key.row_index, year="MCMI" if key.row_index == 1 else 1900), [key], shard)
        ledger.record(answer(key))
    ledger.close()
    rows = read(tmp_path)
    assert rows["status"].to_pylist() == ["ok", "error", "ok"]
    assert (rows["error_stage"][1].as_py(), rows["error_type"][1].as_py()) == ("write", "ArrowInvalid")
    assert "MCMI" in rows["error_message"][1].as_py()
    assert (rows["response"][1].as_py(), rows["year"][1].as_py()) == (None, None)
    assert tally.errors == Counter({"write/ArrowInvalid": 1}), "max_error_rate has to see it"
    assert audit(tmp_path).passed


def test_an_error_whose_columns_do_not_fit_keeps_its_first_cause(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 1)
    tally = Tally(plan.num_records)
    ledger = new_ledger(tmp_path, plan, tally=tally)
    key = RecordKey(0, "default", 0)
    ledger.open(plan.shard(0))
    ledger.expect(row(0, year="MCM"), [key], plan.shard(0))
    ledger.record(answer(key, fault=FAULT))
    ledger.close()
    assert read(tmp_path)["error_type"].to_pylist() == ["UnidentifiedImageError"]
    assert tally.errors == Counter({"decode/UnidentifiedImageError": 1})


def test_error_records_are_counted_across_starts(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    keys = list(keys_of(plan, plan.shard(0)))
    first = new_ledger(tmp_path, plan, "first")
    first.open(plan.shard(0))
    first.expect(row(0), [keys[0]], plan.shard(0))
    first.record(answer(keys[0], fault=FAULT))
    first.close()
    tally = Tally(plan.num_records)
    second = new_ledger(tmp_path, plan, "second", tally=tally)
    work(second, plan, plan.shard(0))
    second.close()
    assert (tally.num_done, tally.num_errors, tally.num_generated_tokens) == (3, 1, 6)
    summary = published_shards(tmp_path / "data", plan.plan_id)[0]
    assert (summary.num_errors, summary.errors) == (1, {"decode/UnidentifiedImageError": 1})


def test_a_slow_disk_does_not_hold_up_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = new_plan(tmp_path, 3)
    ledger = new_ledger(tmp_path, plan)
    keys = list(keys_of(plan, plan.shard(0)))
    work(ledger, plan, plan.shard(0), keys[:1])
    reached, go_on = threading.Event(), threading.Event()
    real = os.fsync

    def slow(number: int) -> None:
        reached.set()
        assert go_on.wait(30)
        real(number)

    monkeypatch.setattr(os, "fsync", slow)
    syncing = threading.Thread(target=ledger.sync)
    syncing.start()
    assert reached.wait(30)
    ledger.record(answer(keys[1]))  # would wait for ever if the journal's lock were its lock
    go_on.set()
    syncing.join()
    ledger.close()
    assert new_ledger(tmp_path, plan, "next").open(plan.shard(0)) == set(keys[2:])


def test_answers_that_the_journal_thread_cannot_write_end_the_run_with_the_folder_named(tmp_path: Path) -> None:
    """Fault 18: no room in a journal: the run ends with the folder named; with room nothing is lost."""
    plan = new_plan(tmp_path, 6, shard_rows=6)
    ledger = new_ledger(tmp_path, plan, sync_seconds=0.01)
    keys = list(keys_of(plan, plan.shard(0)))
    work(ledger, plan, plan.shard(0), keys[:2])
    ledger.sync()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(path.stat().st_size for path in (tmp_path / "work").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))  # room for half a frame
    try:
        ledger.record(answer(keys[2]))
        ledger._syncer.join(30)  # it ends with its first failure
        with pytest.raises(RunFailed, match=r"work cannot be written: File too large"):
            ledger.record(answer(keys[3]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ledger.close()  # room was made: what is finished goes down after all, behind no torn frame
    resumed = new_ledger(tmp_path, plan, "resumed")
    assert resumed.open(plan.shard(0)) == set(keys[3:])
    resumed.close()


def test_a_shard_that_could_not_be_published_is_whole_in_the_journals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 18: no room for a shard: its path is named, its answers are in the journals, and none is asked again."""
    plan = new_plan(tmp_path, 3)
    ledger = new_ledger(tmp_path, plan)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        with pytest.raises(RunFailed, match=r"part-00000\.parquet could not be written: No space left"):
            work(ledger, plan, plan.shard(0))
        ledger.close()
    assert list((tmp_path / "data").iterdir()) == []
    resumed = new_ledger(tmp_path, plan, "resumed")
    assert work(resumed, plan, plan.shard(0)) == []
    resumed.close()
    assert audit(tmp_path).num_ok == 3


def test_an_exception_in_the_middle_of_a_shard_leaves_no_valid_looking_file(tmp_path: Path) -> None:
    """Fault 4: an exception in the middle of a shard leaves no valid-looking file, and what was answered is kept."""
    plan = new_plan(tmp_path, 3)
    ledger = new_ledger(tmp_path, plan)
    with pytest.raises(ZeroDivisionError), contextlib.closing(ledger):
        raise ZeroDivisionError(work(ledger, plan, plan.shard(0), list(keys_of(plan, plan.shard(0)))[:2]))
    assert list((tmp_path / "data").iterdir()) == []
    assert len(new_ledger(tmp_path, plan, "next").open(plan.shard(0))) == 1


def test_a_folder_with_a_shards_name_is_refused_before_its_rows_are_answered(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    (tmp_path / "data/part-00000.parquet").mkdir()
    ledger = new_ledger(tmp_path, plan)
    with pytest.raises(RunFailed, match=r"part-00000\.parquet is a folder"):
        ledger.open(plan.shard(0))
    ledger.close()


def test_a_key_cannot_be_answered_twice(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3, num_samples=2)
    ledger = new_ledger(tmp_path, plan)
    key = RecordKey(0, "default", 0)
    work(ledger, plan, plan.shard(0), [key])
    with pytest.raises(AssertionError, match="answered twice"):
        ledger.record(answer(key))
    ledger.close()


def test_shards_can_be_opened_by_one_thread_while_another_records(tmp_path: Path) -> None:
    """As in a run: the pump opens and expects, the engine's thread records, the journal's thread syncs all the time."""
    plan = new_plan(tmp_path, 300, shard_rows=10, num_samples=2)
    tally = Tally(plan.num_records)
    ledger = new_ledger(tmp_path, plan, tally=tally, sync_seconds=0.001)
    ready: list[RecordKey | None] = []
    arrived = threading.Semaphore(0)

    def pump() -> None:
        for number in range(plan.num_shards):
            shard = plan.shard(number)
            ledger.open(shard)
            for index in range(shard.start, shard.stop):
                keys = [key for key in keys_of(plan, shard) if key.row_index == index]
                ledger.expect(row(index), keys, shard)
                ready.extend(keys)
                arrived.release(len(keys))
        ready.append(None)
        arrived.release()

    pumping = threading.Thread(target=pump)
    pumping.start()
    number = 0
    while True:
        assert arrived.acquire(timeout=30)
        if (key := ready[number]) is None:
            break
        ledger.record(answer(key))
        number += 1
    pumping.join()
    ledger.close()
    assert ledger.num_published == plan.num_shards == 30
    assert (tally.num_done, number) == (600, 600)
    assert audit(tmp_path).num_ok == 600
    assert work_files(tmp_path) == []


def test_memory_does_not_grow_with_the_shards_that_are_done(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 40, shard_rows=2)
    ledger = new_ledger(tmp_path, plan)
    for number in range(plan.num_shards):
        work(ledger, plan, plan.shard(number))
        assert (len(ledger._open), len(ledger._rows)) == (0, 0)
    ledger.close()


def test_a_column_is_kept_as_it_came(tmp_path: Path) -> None:
    """Types that a table may have, through the journal of one start and the shard of the next."""
    values: dict[str, tuple[pa.DataType, Any]] = {
        "struct": (pa.struct([("a", pa.int8()), ("b", pa.list_(pa.string()))]), {"a": 1, "b": ["x", None]}),
        "map": (pa.map_(pa.string(), pa.int32()), [("k", 1)]),
        "stamp": (pa.timestamp("us", "Europe/Berlin"), None),
        "float": (pa.float32(), 0.5),
        "null": (pa.null(), None),
        "flag": (pa.bool_(), True),
    }
    columns = pa.schema([(name, type_) for name, (type_, _) in values.items()])
    plan = new_plan(tmp_path, 2, shard_rows=2)
    keys = list(keys_of(plan, plan.shard(0)))
    for start, key in enumerate(keys):
        ledger = new_ledger(tmp_path, plan, f"start{start}", columns=columns)
        ledger.open(plan.shard(0))
        ledger.expect(row(start, **{name: value for name, (_, value) in values.items()}), [key], plan.shard(0))
        ledger.record(answer(key))
        ledger.close()
    rows = read(tmp_path)
    for name, (type_, value) in values.items():
        assert rows.schema.field(name).type == type_
        assert rows[name].to_pylist() == [value, value]


def test_other_names_for_our_columns_reach_file_and_audit(tmp_path: Path) -> None:
    options = WriteConfig(prefix="vlm_", response_column="caption")
    settings = SETTINGS | {"write.prefix": "vlm_", "write.response_column": "caption"}
    columns = pa.schema([("response", pa.string()), ("id", pa.int64())])
    plan = new_plan(tmp_path, 3, settings=settings, columns=columns)
    schema = output_schema(options, columns)
    ledger = new_ledger(tmp_path, plan, schema=schema)
    shard = plan.shard(0)
    ledger.open(shard)
    for key in keys_of(plan, shard):
        ledger.expect(row(key.row_index, response="the input's own", id=7), [key], shard)
        ledger.record(answer(key))
    ledger.close()
    rows = read(tmp_path)
    assert rows.column_names[:4] == ["vlm_id", "response", "id", "vlm_row_index"]
    assert rows["vlm_caption"][0].as_py() == "answer to (0, 'default', 0)"
    assert rows["response"][0].as_py() == "the input's own"
    assert audit(tmp_path).passed


def test_a_shard_says_in_its_footer_what_it_was_made_with(tmp_path: Path) -> None:
    plan: Plan = finished_run(tmp_path)
    summary = published_shards(tmp_path / "data", plan.plan_id)[1]
    assert (summary.shard, summary.num_rows, summary.num_errors, summary.num_generated_tokens) == (1, 3, 0, 9)
    assert summary.numerics == {"engine": "none"}
    assert read(tmp_path)["run_id"].to_pylist() == [plan.plan_id] * 3


def test_rows_that_were_under_way_are_noted_until_an_attempt_ends_in_good_order(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    ledger = new_ledger(tmp_path, plan)
    shard = plan.shard(0)
    keys = sorted(ledger.open(shard))
    for key in keys:
        ledger.expect(row(key.row_index), [key], shard)
    ledger.taken(keys[1])
    [path] = (tmp_path / "work").glob("*.taken")
    assert path.read_bytes() == (1).to_bytes(8, "little")
    ledger.record(answer(keys[1]))
    ledger.close()
    assert not list((tmp_path / "work").glob("*.taken"))
    again = new_ledger(tmp_path, plan, "again")
    work(again, plan, shard)
    again.close()
    assert work_files(tmp_path) == []
