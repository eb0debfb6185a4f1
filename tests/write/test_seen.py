"""Files that are looked at again and again are read once."""

from __future__ import annotations

import os
import struct
import tracemalloc
import uuid
from pathlib import Path

from small_run import SETTINGS, answer, finished_run, keys_of, new_ledger, new_plan, row, work

from pipeline import status as status_module
from pipeline.overwrite import move_aside
from pipeline.status import StatusReader
from pipeline.write.file import Place
from pipeline.write.journal import JournalCount
from pipeline.write.object_store import ObjectPath
from pipeline.write.seen import SeenFiles


class Reader:
    """Notes what it reads."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, path: Place) -> bytes:
        self.names.append(path.name)
        return path.read_bytes()


def test_a_file_is_read_again_when_it_is_another_one(tmp_path: Path) -> None:
    read = Reader()
    seen = SeenFiles(read)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    assert seen.read([one, two]) == {"one": b"1", "two": b"2"}
    assert seen.read([one, two]) == {"one": b"1", "two": b"2"} and read.names == ["one", "two"]
    date = one.stat().st_mtime_ns
    beside = tmp_path / "beside"
    beside.write_bytes(b"3")
    os.utime(beside, ns=(date, date))
    os.replace(beside, one)  # of the same date and size, as a clock that is coarse has it
    assert seen.read([one, two]) == {"one": b"3", "two": b"2"} and read.names == ["one", "two", "one"]
    one.unlink()
    assert seen.read([one, two]) == {"two": b"2"}
    one.write_bytes(b"4")
    assert seen.read([one, two]) == {"one": b"4", "two": b"2"}


def test_objects_that_a_listing_shows_unchanged_cost_no_request() -> None:
    folder, read = ObjectPath(f"memory://{uuid.uuid4().hex}"), Reader()
    seen = SeenFiles(read)
    for name in ("a.json", "b.json"):
        (folder / name).create(name.encode())
    assert seen.read(folder.glob("*.json")) == {"a.json": b"a.json", "b.json": b"b.json"}
    (folder / "b.json").replace(b"longer than before")
    assert seen.read(folder.glob("*.json")) == {"a.json": b"a.json", "b.json": b"longer than before"}
    assert sorted(read.names) == ["a.json", "b.json", "b.json"]


def test_a_second_look_at_a_run_reads_what_is_new_alone(tmp_path: Path, monkeypatch: object) -> None:
    plan = new_plan(tmp_path, 12)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0))
    footers = Reader()
    whole = status_module.summary_of_plan
    reader = StatusReader(tmp_path)
    status_module.summary_of_plan = lambda path, plan_id: (footers.names.append(path.name), whole(path, plan_id))[1]
    try:
        assert reader.read().num_done == 3
        work(ledger, plan, plan.shard(1))
        assert reader.read().num_done == 6
        assert reader.read().num_done == 6
    finally:
        status_module.summary_of_plan = whole
    assert footers.names == ["part-00000.parquet", "part-00001.parquet"]
    ledger.close()


def test_a_journal_that_grows_is_read_on_from_its_old_end(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    ledger = new_ledger(tmp_path, plan)
    keys = list(keys_of(plan, plan.shard(0)))
    ledger.open(plan.shard(0))
    for key in keys:
        ledger.expect(row(key.row_index), [key], plan.shard(0))
    count = JournalCount()
    for number, key in enumerate(keys[:2], 1):
        ledger.record(answer(key))
        ledger.sync()
        (path,) = (tmp_path / "work").glob("*.journal")
        count.look(path, plan_id=plan.plan_id)
        assert count.num_rows == number and count.num_bytes == path.stat().st_size
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))  # what was counted is not looked at again
    count.look(path, plan_id=plan.plan_id)
    assert count.num_rows == 2
    path.write_bytes(content[:-1])
    torn = JournalCount()
    torn.look(path, plan_id=plan.plan_id)
    assert torn.num_rows == 1 and torn.num_bytes < path.stat().st_size
    path.write_bytes(content)
    torn.look(path, plan_id=plan.plan_id)
    assert torn.num_rows == 2, "the rest of a frame that was half there"
    ledger.close()


def test_a_run_that_is_begun_anew_is_counted_anew(tmp_path: Path) -> None:
    plan = finished_run(tmp_path)
    reader = StatusReader(tmp_path)
    assert reader.read().complete
    move_aside(tmp_path, plan.plan_id)
    plan = new_plan(tmp_path, 6, settings=SETTINGS | {"prompt.user": "Another?"})
    status = reader.read()
    assert (status.num_done, status.num_shards_done) == (0, 0)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0))
    assert reader.read().num_done == 3
    ledger.close()


def test_an_absurd_length_asks_for_no_memory(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0), list(keys_of(plan, plan.shard(0)))[:1])
    ledger.close()
    (path,) = (tmp_path / "work").glob("*.journal")
    with open(path, "ab") as file:
        file.write(struct.pack("<II", 1 << 30, 1) + b"x")
    count = JournalCount()
    tracemalloc.start()
    count.look(path, plan_id=plan.plan_id)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count.num_rows == 1 and most_bytes < 10 << 20
