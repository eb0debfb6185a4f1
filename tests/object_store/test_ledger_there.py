"""The ledger of a run in an object store: journals of segments, claims, shards, retries, suspects."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from faulty_s3 import FaultyS3
from small_run import FAULT, answer, finished_run, inputs, keys_of, new_ledger, new_plan, row, work

from pipeline.agenda import Agenda
from pipeline.audit import audit
from pipeline.errors import UsageError
from pipeline.plan import Plan, plan_of_run, read_inputs
from pipeline.planning import Resume, open_plan
from pipeline.status import read_status
from pipeline.write.claim import Claim, Claims, claim_of
from pipeline.write.file import matching
from pipeline.write.object_store import ObjectPath
from pipeline.write.shard import published_shards, read_shard
from pipeline.write.suspects import read_suspects


def names(folder: ObjectPath) -> list[str]:
    return [path.name for path in matching(folder, "*")]


def responses(folder: ObjectPath, number: int) -> list[str | None]:
    found: list[str | None] = read_shard(folder / "data" / f"part-{number:05d}.parquet")["response"].to_pylist()
    return found


def right(plan: Plan, number: int) -> list[str | None]:
    return [answer(key).response for key in keys_of(plan, plan.shard(number))]


def test_a_run_from_plan_to_audit(folder: ObjectPath) -> None:
    plan = finished_run(folder)
    assert plan_of_run(folder) == plan and len(read_inputs(folder, plan).files) == 6
    assert names(folder / "data") == ["part-00000.parquet", "part-00001.parquet"] and names(folder / "work") == []
    assert [responses(folder, number) for number in (0, 1)] == [right(plan, 0), right(plan, 1)]
    assert audit(folder).passed and read_status(folder).complete


def test_answers_of_a_killed_worker_are_not_asked_for_again(folder: ObjectPath) -> None:
    plan = new_plan(folder)
    first = new_ledger(folder, plan, "first")
    done = work(first, plan, plan.shard(0), list(keys_of(plan, plan.shard(0)))[:1])
    first.sync()
    first.record(answer(list(keys_of(plan, plan.shard(0)))[1]))
    first.sync()  # and is killed
    assert names(folder / "work") == ["part-00000.first-0-0.journal", "part-00000.first-0-1.journal"]
    assert read_status(folder).num_journalled == 2
    second = new_ledger(folder, plan, "second")
    assert len(done) == 1 and len(work(second, plan, plan.shard(0))) == 1
    assert responses(folder, 0) == right(plan, 0)
    assert names(folder / "work") == [], "segments go with their shard"
    second.close()


def test_a_damaged_segment_costs_its_own_answers(folder: ObjectPath) -> None:
    plan = new_plan(folder)
    ledger = new_ledger(folder, plan, "first")
    keys = list(keys_of(plan, plan.shard(0)))
    work(ledger, plan, plan.shard(0), keys[:1])
    ledger.sync()
    ledger.record(answer(keys[1]))
    ledger.sync()
    path = folder / "work" / "part-00000.first-0-0.journal"
    path.replace(path.read_bytes()[:-3])
    assert new_ledger(folder, plan, "second").open(plan.shard(0)) == {keys[0], keys[2]}


@pytest.mark.parametrize("kind", ["lost", "reply lost", "409", "503"])
@pytest.mark.parametrize("what", ["data/part-00000.parquet", "work/part-00000.", "plan.json", "plan/inputs"])
def test_nothing_is_lost_on_a_bad_line(kind: str, what: str, s3: FaultyS3, folder: ObjectPath) -> None:
    """Fault 21: puts of plan, inputs, journals and shards that are lost, done unheard, in conflict or slowed down."""
    s3.fail("PUT", what, kind, 2)
    plan = new_plan(folder)
    ledger = new_ledger(folder, plan, "first")
    keys = list(keys_of(plan, plan.shard(0)))
    work(ledger, plan, plan.shard(0), keys[:2])
    ledger.sync()
    ledger.record(answer(keys[2]))
    work(ledger, plan, plan.shard(1))
    ledger.close()
    assert s3.num_failed == 2 or (kind == "reply lost" and s3.num_failed == 1)
    assert [responses(folder, number) for number in (0, 1)] == [right(plan, 0), right(plan, 1)]
    assert audit(folder).passed and names(folder / "work") == []
    assert not [path for method, path in s3.requests if method == "DELETE" and "/data/" in path]


def test_a_retry_gets_through(s3: FaultyS3, folder: ObjectPath) -> None:
    """Fault 21: the second generation of a shard, put while replies are lost."""
    plan = new_plan(folder, 3)
    ledger = new_ledger(folder, plan, "first")
    keys = list(keys_of(plan, plan.shard(0)))
    work(ledger, plan, plan.shard(0), keys[:2])
    ledger.record(answer(keys[2], fault=FAULT))
    ledger.close()
    for kind in ("reply lost", "lost"):
        s3.fail("PUT", "data/part-00000.parquet", kind, 1)
        s3.fail("PUT", "work/part-00000.g1.parquet", kind, 1)
    again = new_ledger(folder, plan, "again", only=[])
    assert work(again, plan, plan.shard(0)) == [keys[2]]
    again.close()
    assert s3.num_failed >= 2
    table = read_shard(folder / "data" / "part-00000.parquet")
    assert table["response"].to_pylist() == right(plan, 0) and table["attempt"].to_pylist() == [1, 1, 2]
    assert published_shards(folder / "data", plan.plan_id)[0].generation == 1


def test_a_generation_that_is_not_in_place_is_put_there_by_whoever_comes(folder: ObjectPath) -> None:
    plan = new_plan(folder, 3)
    ledger = new_ledger(folder, plan, "first")
    keys = list(keys_of(plan, plan.shard(0)))
    work(ledger, plan, plan.shard(0), keys[:2])
    ledger.record(answer(keys[2], fault=FAULT))
    ledger.close()
    old = (folder / "data" / "part-00000.parquet").read_bytes()
    again = new_ledger(folder, plan, "again", only=[])
    work(again, plan, plan.shard(0))
    again.close()
    (folder / "data" / "part-00000.parquet").replace(old)  # killed between the two puts
    Agenda(folder, plan, None)
    assert read_shard(folder / "data" / "part-00000.parquet")["attempt"].to_pylist() == [1, 1, 2]


def test_workers_that_finish_a_shard_at_once(folder: ObjectPath) -> None:
    """Fault 11: in an object store, too, one of them publishes, and the others discard theirs."""
    plan = new_plan(folder, 3)
    ledgers = [new_ledger(folder, plan, f"worker{number}") for number in range(4)]
    keys = list(keys_of(plan, plan.shard(0)))
    for ledger in ledgers:
        work(ledger, plan, plan.shard(0), keys[:2])
    barrier = threading.Barrier(len(ledgers))

    def finish(number: int) -> None:
        barrier.wait()
        ledgers[number].record(answer(keys[2]))

    with ThreadPoolExecutor(len(ledgers)) as pool:
        list(pool.map(finish, range(len(ledgers))))
    for ledger in ledgers:
        ledger.close()
    assert responses(folder, 0) == right(plan, 0) and audit(folder).passed


def test_a_file_of_another_plan_is_replaced(folder: ObjectPath) -> None:
    plan = finished_run(folder / "other", 6)
    mine = new_plan(folder / "mine", 6, settings={**plan.settings, "prompt.user": "And this?"})
    for name in names(folder / "other" / "data"):
        (folder / "mine" / "data" / name).replace((folder / "other" / "data" / name).read_bytes())
    (folder / "mine" / "data" / "part-00001.parquet").replace(b"no Parquet")
    assert published_shards(folder / "mine" / "data", mine.plan_id) == {}
    ledger = new_ledger(folder / "mine", mine)
    for number in (0, 1):
        work(ledger, mine, mine.shard(number))
    ledger.close()
    assert audit(folder / "mine").passed


def test_first_starts_at_one_moment_have_one_plan(folder: ObjectPath) -> None:
    """Fault 15: in an object store, too."""
    barrier = threading.Barrier(4)

    def start(_: int) -> str:
        barrier.wait()
        return new_plan(folder).plan_id

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(start, range(4)))) == 1


def test_claims(folder: ObjectPath) -> None:
    """Fault 13: a claim of another host holds for its lease, that of a dead process of this one does not."""
    red, blue = Claims(folder, "red"), Claims(folder, "blue")
    assert red.take("part-00000") is True and red.take("part-00000") is True
    assert blue.take("part-00000") is False
    before = (folder / "part-00000.claim").version()
    red.beat()
    assert (folder / "part-00000.claim").version() != before, "a heartbeat is another version"
    assert claim_of(folder, "part-00000").owner == "red"
    red.release("part-00000")
    assert claim_of(folder, "part-00000") == Claim() and blue.take("part-00000") is True
    blue._own = replace(blue._own, host="elsewhere")
    blue.beat()  # it is not blue's any more: the host is part of who it is
    blue._held.add("part-00001")
    assert blue.take("part-00001") is True
    assert red.take("part-00001") is False, "within its lease"
    late = Claims(folder, "late", lease_seconds=0.0)
    assert late.take("part-00001") is True
    blue.beat()
    assert claim_of(folder, "part-00001").owner == "late", "blue has forgotten it"
    late.close()
    assert claim_of(folder, "part-00001") == Claim()


def test_of_two_that_take_a_claim_over_one_has_it(folder: ObjectPath) -> None:
    for number in range(5):
        name = f"part-{number:05d}"
        (folder / f"{name}.claim").replace(b'{"owner": "dead", "host": "elsewhere", "pid": 1}')
        claims = [Claims(folder, f"worker{one}", lease_seconds=0.0) for one in range(4)]
        barrier = threading.Barrier(4)

        def take(
            one: int, name: str = name, claims: list[Claims] = claims, barrier: threading.Barrier = barrier
        ) -> bool:
            barrier.wait()
            return claims[one]._take(name)

        with ThreadPoolExecutor(4) as pool:
            took = list(pool.map(take, range(4)))
        assert Counter(took)[True] >= 1 and claim_of(folder, name).owner.startswith("worker")


def test_rows_that_were_on_their_way_are_noted_in_few_requests(s3: FaultyS3, folder: ObjectPath) -> None:
    """Fault 50: a row is noted before the engine has it, and those behind it with it."""
    plan = new_plan(folder, 50, shard_rows=50)
    ledger = new_ledger(folder, plan, "first")
    keys = list(keys_of(plan, plan.shard(0)))
    ledger.open(plan.shard(0))
    for key in keys:
        ledger.expect(row(key.row_index), [key], plan.shard(0))
    s3.reset()
    for key in keys:
        assert ledger.taken(key) is True
    assert len([path for method, path in s3.requests if method == "PUT" and path.endswith(".taken")]) == 1
    other = new_ledger(folder, plan, "other")
    other.open(plan.shard(0))
    other.expect(row(7), [keys[7]], plan.shard(0))
    other.taken(keys[7])
    suspects = read_suspects(folder / "work", "part-00000", range(50))
    assert suspects.groups == ((7,),), "both had it under way when they were killed"


def test_a_run_is_extended(folder: ObjectPath) -> None:
    plan = finished_run(folder, 6)
    more = open_plan(
        folder,
        {
            name: value
            for name, value in plan.settings.items()
            if name != "schema_version"
            and "found" not in name
            and name not in ("dataset.files_sha256", "dataset.num_rows")
        },
        scan=lambda: inputs(10),
        max_rows=None,
        shard_rows=3,
        prompt_names=("default",),
        num_samples=1,
        resume=Resume.extend,
    )
    assert (more.plan_id, more.num_rows, more.num_shards) == (plan.plan_id, 10, 4)
    assert plan_of_run(folder) == more


def test_a_run_is_not_moved_aside(folder: ObjectPath) -> None:
    finished_run(folder, 6)
    before = (folder / "plan.json").read_bytes()
    with pytest.raises(UsageError, match="objects cannot be moved aside"):
        open_plan(
            folder,
            {"dataset.path": "/photos", "prompt.user": "Something else"},
            scan=lambda: inputs(6),
            max_rows=None,
            shard_rows=3,
            prompt_names=("default",),
            num_samples=1,
            resume=Resume.overwrite,
        )
    assert (folder / "plan.json").read_bytes() == before
