"""resume=overwrite: the old run is moved aside whole, and nothing of it gets into the new one."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_run import SETTINGS, finished_run, inputs, keys_of, new_ledger, new_plan, tree, work

from pipeline.audit import audit
from pipeline.dataset.base import Inputs
from pipeline.errors import RunFailed, SettingsChanged, UsageError
from pipeline.plan import Plan, read_plan
from pipeline.planning import Resume, make_folders, open_plan

OTHER = SETTINGS | {"prompt.user": "Who is it?"}


def opened(output_dir: Path, settings: dict[str, Any], resume: Resume = Resume.overwrite, num_rows: int = 6) -> Plan:
    plan = open_plan(
        output_dir,
        settings,
        scan=lambda: inputs(num_rows),
        max_rows=None,
        shard_rows=3,
        prompt_names=["default"],
        num_samples=1,
        resume=resume,
    )
    make_folders(output_dir)
    return plan


def finish(output_dir: Path, plan: Plan) -> None:
    ledger = new_ledger(output_dir, plan, "new")
    for number in range(plan.num_shards):
        work(ledger, plan, plan.shard(number))
    ledger.close()


def test_an_old_run_is_whole_in_its_own_folder_and_the_new_one_begins_anew(tmp_path: Path) -> None:
    """Fault 26: an explicit overwrite moves the old run aside, whole, and begins anew; no answer is mixed."""
    old = finished_run(tmp_path)
    answers = tree(tmp_path / "data")
    for name in ("tracking", "export"):  # curves and files of the old run
        (tmp_path / name).mkdir()
    with pytest.raises(SettingsChanged, match="resume=overwrite moves"):
        opened(tmp_path, OTHER, Resume.auto)
    assert tree(tmp_path / "data") == answers
    plan = opened(tmp_path, OTHER)
    assert plan.plan_id != old.plan_id
    assert list((tmp_path / "data").iterdir()) == []
    aside = tmp_path / "old" / old.plan_id
    assert tree(aside / "data") == answers
    for name in ("tracking", "export"):
        assert (aside / name).is_dir() and not (tmp_path / name).exists()
    assert read_plan(aside) == old
    assert audit(aside).passed
    finish(tmp_path, plan)
    assert audit(tmp_path).passed
    assert set(pq.read_table(tmp_path / "data")["run_id"].to_pylist()) == {plan.plan_id}


def test_the_same_settings_go_on_where_they_stopped(tmp_path: Path) -> None:
    """A job that says resume=overwrite and is started again after a kill does not begin anew each time."""
    plan = finished_run(tmp_path, settings=OTHER)
    before = tree(tmp_path)
    assert opened(tmp_path, OTHER).plan_id == plan.plan_id
    assert tree(tmp_path) == before


def test_new_settings_that_cannot_work_move_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = tree(tmp_path)

    def refused() -> Inputs:
        raise UsageError("there is nothing")

    with pytest.raises(UsageError, match="there is nothing"):
        open_plan(
            tmp_path, OTHER, scan=refused, max_rows=None, shard_rows=3, prompt_names=["default"], num_samples=1,
            resume=Resume.overwrite,
        )  # fmt: skip
    assert tree(tmp_path) == before


@pytest.mark.parametrize("has_journal", [True, False])
def test_a_worker_of_the_old_plan_publishes_nothing_into_the_new_one(tmp_path: Path, has_journal: bool) -> None:
    """Fault 14: a worker of another run that is still alive publishes nothing into the new run's folder."""
    old = new_plan(tmp_path)
    late = new_ledger(tmp_path, old, "late")
    keys = list(keys_of(old, old.shard(0)))
    work(late, old, old.shard(0), keys[:2])
    if has_journal:
        late.sync()
    plan = opened(tmp_path, OTHER)
    with pytest.raises(RunFailed, match="has another plan by now"):
        work_rest(late, old, keys[2:])
    late.close()
    assert list((tmp_path / "data").iterdir()) == []
    finish(tmp_path, plan)
    assert audit(tmp_path).passed


def work_rest(ledger: Any, plan: Plan, keys: list[Any]) -> None:
    from small_run import answer

    for key in keys:
        ledger.record(answer(key))


@pytest.mark.parametrize("place", range(6))
def test_a_move_that_was_broken_off_is_finished_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    old = finished_run(tmp_path)
    answers = tree(tmp_path / "data")
    real, count = os.rename, 0

    def breaks(source: Any, target: Any) -> None:
        nonlocal count
        if count == place:
            raise OSError(5, "Input/output error")
        count += 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", breaks)
        with pytest.raises(RunFailed, match="cannot be moved"):
            opened(tmp_path, OTHER)
    plan = opened(tmp_path, OTHER)
    finish(tmp_path, plan)
    assert audit(tmp_path).passed
    assert tree(tmp_path / "old" / old.plan_id / "data") == answers
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == [".lock", old.plan_id]
    assert not (tmp_path / "old" / old.plan_id / "moving").exists()


def test_of_two_starts_at_once_one_moves_and_both_obey_one_plan(tmp_path: Path) -> None:
    old = finished_run(tmp_path)
    plans: list[Plan] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait(30)
        plans.append(opened(tmp_path, OTHER))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 4
    assert len({plan.plan_id for plan in plans}) == 1
    assert [path.name for path in (tmp_path / "old").glob("[!.]*")] == [old.plan_id]
    assert audit(tmp_path / "old" / old.plan_id).passed


def test_several_old_runs_lie_beside_each_other(tmp_path: Path) -> None:
    first = finished_run(tmp_path)
    second = opened(tmp_path, OTHER)
    finish(tmp_path, second)
    third = opened(tmp_path, SETTINGS)
    assert len({first.plan_id, second.plan_id, third.plan_id}) == 3
    assert {path.name for path in (tmp_path / "old").glob("[!.]*")} == {first.plan_id, second.plan_id}
