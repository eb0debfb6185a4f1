"""What a rank finds to do: it reads its own shards, and goes by the names of others'."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import finished_run, keys_of, new_ledger, new_plan, work

from pipeline.agenda import Agenda
from pipeline.errors import RunFailed
from pipeline.manifest import conclude
from pipeline.plan import Plan
from pipeline.tally import Tally


def numbers(output_dir: Path, plan: Plan, rank: int, world: int) -> list[int]:
    return [shard.number for shard in Agenda(output_dir, plan, None, rank, world).shards()]


def test_own_shards_come_first_and_others_from_the_end(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 18)
    assert numbers(tmp_path, plan, 0, 1) == [0, 1, 2, 3, 4, 5]
    assert numbers(tmp_path, plan, 1, 3) == [1, 4, 5, 3, 2, 0]


def test_a_file_that_is_no_shard_is_found_by_the_rank_that_the_shard_belongs_to(tmp_path: Path) -> None:
    plan = finished_run(tmp_path, 18)
    (tmp_path / "data" / "part-00003.parquet").write_bytes(b"no shard")
    assert numbers(tmp_path, plan, 0, 1) == [3]
    assert [numbers(tmp_path, plan, rank, 2) for rank in (0, 1)] == [[], [3]]


def test_a_missing_shard_is_missing_for_all(tmp_path: Path) -> None:
    plan = finished_run(tmp_path, 18)
    (tmp_path / "data" / "part-00003.parquet").unlink()
    assert [numbers(tmp_path, plan, rank, 4) for rank in range(4)] == [[3]] * 4
    assert numbers(tmp_path, plan, 3, 4) == [3]


def test_what_others_have_done_counts(tmp_path: Path) -> None:
    plan = finished_run(tmp_path, 17)
    (tmp_path / "data" / "part-00000.parquet").unlink()
    for rank in (0, 1):
        tally = Tally(plan.num_records)
        Agenda(tmp_path, plan, None, rank, 2).settle(tally)
        assert tally.num_done == 14 and tally.num_answered == 0


def test_journals_of_earlier_starts_are_seen(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    assert not Agenda(tmp_path, plan, None).has_journals
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0), list(keys_of(plan, plan.shard(0)))[:1])
    ledger.close()
    assert Agenda(tmp_path, plan, None).has_journals


def test_who_ends_a_run_finds_what_the_names_hide(tmp_path: Path) -> None:
    finished_run(tmp_path, 18)
    assert conclude(tmp_path, is_retry=False) is True
    assert conclude(tmp_path, is_retry=False) is False, "another rank was the last one"
    assert (tmp_path / "manifest.json").exists() and not (tmp_path / "work").exists()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "data" / "part-00003.parquet").write_bytes(b"no shard")
    with pytest.raises(RunFailed, match=r"1 files in .* \(cluster=local\)"):
        conclude(tmp_path, is_retry=False)
    assert conclude(tmp_path, is_retry=True) is False
    assert not (tmp_path / "manifest.json").exists()
