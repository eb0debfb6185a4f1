"""The end of a run: a worker that has nothing left helps another one with its shard, and they meet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_run import FAULT, answer, keys_of, new_ledger, new_plan, row

from pipeline import feed as feed_module
from pipeline.agenda import Agenda
from pipeline.feed import Feed
from pipeline.plan import Plan
from pipeline.records import RecordKey, Row, Shard
from pipeline.tally import Tally
from pipeline.write.claim import HELP, Claims
from pipeline.write.ledger import Ledger


def expect(ledger: Ledger, shard: Shard, keys: Sequence[RecordKey]) -> None:
    for key in keys:
        ledger.expect(row(key.row_index), [key], shard)


def responses(output_dir: Path, shard: Shard) -> list[str | None]:
    found: list[str | None] = pq.read_table(output_dir / "data" / f"{shard.name}.parquet")["response"].to_pylist()
    return found


class Pair:
    """A worker that has a shard of ten rows, and one that helps with it."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.plan = new_plan(output_dir, 10, shard_rows=10)
        self.shard = self.plan.shard(0)
        self.keys = list(keys_of(self.plan, self.shard))
        self.tallies = Tally(10), Tally(10)
        self.owner = new_ledger(output_dir, self.plan, "owner", tally=self.tallies[0])
        self.helper = new_ledger(output_dir, self.plan, "helper", tally=self.tallies[1])
        self.claims = Claims(output_dir / "work", "helper")
        self.owner.open(self.shard)
        expect(self.owner, self.shard, self.keys)

    def begin_to_help(self) -> frozenset[RecordKey]:
        assert self.claims.take(self.shard.name + HELP)
        missing = self.helper.open(self.shard, has_company=True)
        expect(self.helper, self.shard, [key for key in self.keys if key in missing])
        return missing

    def close(self) -> None:
        self.owner.close()
        self.helper.close()
        self.claims.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def test_two_workers_meet_in_the_middle_of_a_shard(pair: Pair) -> None:
    for key in pair.keys[:3]:
        pair.owner.record(answer(key))
    pair.owner.sync()
    assert pair.begin_to_help() == frozenset(pair.keys[3:]), "what the owner has on disk is not asked for again"
    for key in pair.keys[:6:-1]:
        pair.helper.record(answer(key))
    pair.helper.sync()
    pair.owner.record(answer(pair.keys[3]))
    assert pair.owner.lacking(pair.shard, pair.keys) == tuple(pair.keys[4:]), "nothing is known before a sync"
    pair.owner.sync()
    assert pair.owner.lacking(pair.shard, pair.keys) == tuple(pair.keys[4:7])
    for key in pair.keys[4:7]:
        pair.owner.record(answer(key))
    assert not pair.owner.is_open(pair.shard), "the last answer publishes, whoever gave the others"
    assert responses(pair.output_dir, pair.shard) == [answer(key).response for key in pair.keys]
    assert [(tally.num_done, tally.num_answered) for tally in pair.tallies] == [(10, 7), (6, 3)]


def test_who_is_second_drops_the_shard(pair: Pair) -> None:
    pair.owner.record(answer(pair.keys[0], fault=FAULT))
    pair.owner.sync()
    pair.begin_to_help()
    for key in pair.keys[1:]:
        pair.helper.record(answer(key))
    assert not pair.helper.is_open(pair.shard)
    assert pair.owner.taken(pair.keys[1]) is True, "nobody has told the owner yet"
    pair.owner.sync()
    assert not pair.owner.is_open(pair.shard)
    assert pair.owner.lacking(pair.shard, pair.keys) == ()
    assert pair.owner.taken(pair.keys[2]) is False, "what waits for the engine is not asked any more"
    pair.owner.record(answer(pair.keys[1], "an answer that came too late"))
    pair.owner.sync()
    expected = [None, *(answer(key).response for key in pair.keys[1:])]
    assert responses(pair.output_dir, pair.shard) == expected
    for tally in pair.tallies:
        assert tally.num_done == 10 and tally.num_errors == 1
    pair.close()
    assert not list((pair.output_dir / "work").iterdir()), "nothing is left of either of them"


def test_an_answer_that_both_give_counts_once(pair: Pair) -> None:
    pair.begin_to_help()
    for key in pair.keys[5:7]:
        pair.helper.record(answer(key, "of the helper"))
    pair.helper.sync()
    pair.owner.sync()
    assert pair.owner.taken(pair.keys[5]) is False
    pair.owner.record(answer(pair.keys[6], "of the owner, which had it under way"))
    for key in (*pair.keys[:5], *pair.keys[7:]):
        pair.owner.record(answer(key))
    assert responses(pair.output_dir, pair.shard)[5:7] == ["of the helper"] * 2
    assert pair.tallies[0].num_done == 10
    pair.helper.sync()
    assert pair.tallies[1].num_done == 10


def test_the_owner_looks_at_other_journals_only_when_somebody_helps(pair: Pair) -> None:
    missing = pair.helper.open(pair.shard)  # without a claim: as a worker that has slept past its lease
    expect(pair.helper, pair.shard, [key for key in pair.keys if key in missing])
    pair.helper.record(answer(pair.keys[9]))
    pair.helper.sync()
    pair.owner.sync()
    assert pair.keys[9] in pair.owner.lacking(pair.shard, pair.keys)


class _Rows:
    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return 1000

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        self.read.append((start, stop))
        return (row(index) for index in range(start, stop))


def feed_of(output_dir: Path, plan: Plan, name: str) -> tuple[Feed, Ledger, Claims, _Rows]:
    ledger, claims, rows = new_ledger(output_dir, plan, name), Claims(output_dir / "work", name), _Rows()
    return Feed(plan, rows, ledger._goal, ledger, claims), ledger, claims, rows


def test_an_idle_worker_helps_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(feed_module, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(feed_module, "_POLL_SECONDS", 0.0)
    plan = new_plan(tmp_path, 200, shard_rows=200)
    shard = plan.shard(0)
    owner_feed, owner, owner_claims, _ = feed_of(tmp_path, plan, "owner")
    tasks = next(owner_feed.streams([shard]))
    for _ in range(40):
        owner.record(answer(next(tasks).keys[0]))
    owner.sync()
    feed, ledger, claims, rows = feed_of(tmp_path, plan, "idle")
    todo = Agenda(tmp_path, plan, None, 1, 2).shards()
    asked = []
    for stream in feed.streams(todo):
        for task in stream:
            asked.append(task.row.index)
            ledger.record(answer(task.keys[0]))
    assert asked == list(range(199, 39, -1)), "from the end, without what the owner had finished"
    assert max(stop - start for start, stop in rows.read) <= 64, "a shard is not read into memory"
    assert "part-00000: helping the worker that has it" in caplog.text
    owner.sync()
    assert list(tasks) == [], "the owner reads no further"
    assert responses(tmp_path, shard) == [answer(key).response for key in keys_of(plan, shard)]
    for one, held in ((owner, owner_claims), (ledger, claims)):
        one.close()
        held.close()


def test_nobody_helps_at_once_nor_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_POLL_SECONDS", 0.0)
    plan = new_plan(tmp_path, 10, shard_rows=10)
    _, owner, _, _ = (owned := feed_of(tmp_path, plan, "owner"))
    assert next(next(owned[0].streams([plan.shard(0)]))).row.index == 0
    feed, ledger, _, _ = feed_of(tmp_path, plan, "idle")
    streams = feed.streams([plan.shard(0)])
    assert [list(next(streams)) for _ in range(20)] == [[]] * 20, "not within moments"
    monkeypatch.setattr(feed_module, "_PATIENCE_SECONDS", 0.0)
    assert [task.row.index for task in next(streams)] == list(range(9, -1, -1))
    third, third_ledger, _, _ = feed_of(tmp_path, plan, "third")
    thirds = third.streams([plan.shard(0)])
    assert [list(next(thirds)) for _ in range(20)] == [[]] * 20, "one helps"
    for one in (owner, ledger, third_ledger):
        one.close()


def test_nobody_helps_where_a_process_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that ends processes is asked apart by the owner; a helper would ask it among others."""
    monkeypatch.setattr(feed_module, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(feed_module, "_PATIENCE_SECONDS", 0.0)
    plan = new_plan(tmp_path, 10, shard_rows=10)
    (tmp_path / "work" / "part-00000.dead.taken").write_bytes(bytes(8))
    owner_feed, owner, _, _ = feed_of(tmp_path, plan, "owner")
    owner.taken(next(next(owner_feed.streams([plan.shard(0)]))).keys[0])
    feed, ledger, _, _ = feed_of(tmp_path, plan, "idle")
    streams = feed.streams([plan.shard(0)])
    assert [list(next(streams)) for _ in range(20)] == [[]] * 20
    owner.close()
    ledger.close()
