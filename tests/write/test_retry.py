"""Error records asked once more: what was answered stays, one file for a shard, whoever is killed when."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_run import FAULT, answer, finished_run, keys_of, new_ledger, new_plan, row, tree

from pipeline.agenda import Agenda, refuse_retry
from pipeline.audit import audit
from pipeline.errors import RunFailed, UsageError
from pipeline.manifest import write_manifest
from pipeline.plan import Plan
from pipeline.records import Fault, RecordKey, Stage
from pipeline.status import read_status
from pipeline.tally import Tally
from pipeline.write import retry as retry_module
from pipeline.write.ledger import Ledger
from pipeline.write.shard import shard_summary

OTHER = Fault(Stage.GENERATE, "OutOfMemoryError", "the row does not fit")


def run_with_errors(output_dir: Path, num_rows: int = 6) -> Plan:
    """A finished run: rows 1, 4, 7 ... could not be decoded, rows 2, 5, 8 ... not generated."""
    plan = new_plan(output_dir, num_rows)
    ledger = new_ledger(output_dir, plan)
    for number in range(plan.num_shards):
        for key in sorted(ledger.open(plan.shard(number))):
            ledger.expect(row(key.row_index), [key], plan.shard(number))
            ledger.record(answer(key, fault=(None, FAULT, OTHER)[key.row_index % 3]))
    ledger.close()
    write_manifest(output_dir, read_status(output_dir))
    (output_dir / "work").mkdir()
    return plan


def retry(
    output_dir: Path, plan: Plan, name: str, *, only: Collection[str] = (), fails: Collection[int] = ()
) -> list[int]:
    """A whole retry; the rows that were asked. `fails`: those that fail again."""
    ledger = new_ledger(output_dir, plan, name, only=only)
    asked = [
        key.row_index
        for shard in Agenda(output_dir, plan, only).shards()
        for key in answered_again(ledger, plan, shard.number, fails)
    ]
    ledger.close()
    return asked


def answered_again(
    ledger: Ledger, plan: Plan, number: int, fails: Collection[int] = (), most: int = 99
) -> list[RecordKey]:
    keys = sorted(ledger.open(plan.shard(number)))[:most]
    for key in keys:
        ledger.expect(row(key.row_index), [key], plan.shard(number))
        fault = OTHER if key.row_index in fails else None
        ledger.record(answer(key, f"second answer to {key.row_index}", fault))
    return keys


def records(output_dir: Path) -> list[dict[str, Any]]:
    return pq.read_table(output_dir / "data").to_pylist()  # type: ignore[no-any-return]


def test_error_rows_are_asked_again_and_no_other(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path)
    before = records(tmp_path)
    assert retry(tmp_path, plan, "again", fails=[4]) == [1, 2, 4, 5]
    after = records(tmp_path)
    assert [one for one in after if one["row_index"] in (0, 3)] == [before[0], before[3]]
    assert [one["attempt"] for one in after] == [1, 2, 2, 1, 2, 2]
    assert [one["response"] for one in after if one["attempt"] == 2] == [
        "second answer to 1", "second answer to 2", None, "second answer to 5"
    ]  # fmt: skip
    assert [(one["status"], one["error_type"]) for one in after][4] == ("error", "OutOfMemoryError")
    assert audit(tmp_path).passed
    summaries = [shard_summary(tmp_path / f"data/part-0000{n}.parquet") for n in range(2)]
    assert [(one.generation, dict(one.errors)) for one in summaries if one] == [
        (1, {}), (1, {"generate/OutOfMemoryError": 1})
    ]  # fmt: skip
    assert retry(tmp_path, plan, "third") == [4]
    assert [one["attempt"] for one in records(tmp_path)] == [1, 2, 2, 1, 3, 2]
    assert retry(tmp_path, plan, "fourth") == []


@pytest.mark.parametrize(
    ("only", "rows"),
    [
        (["decode"], [1, 4]),
        (["UnidentifiedImageError"], [1, 4]),
        (["decode/UnidentifiedImageError"], [1, 4]),
        (["generate", "decode"], [1, 2, 4, 5]),
        (["read"], []),
    ],
)
def test_only_some_errors_may_be_meant(tmp_path: Path, only: list[str], rows: list[int]) -> None:
    plan = run_with_errors(tmp_path)
    before = records(tmp_path)
    refuse_retry(tmp_path, only)
    assert retry(tmp_path, plan, "again", only=only) == rows
    after = records(tmp_path)
    assert [one["row_index"] for one, other in zip(after, before, strict=True) if one != other] == rows
    assert audit(tmp_path).passed


def test_an_error_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    run_with_errors(tmp_path)
    with pytest.raises(UsageError, match=r"decode/UnidentifiedImageError \(2\), generate/OutOfMemoryError \(2\)"):
        refuse_retry(tmp_path, ["generate", "decodee"])
    with pytest.raises(UsageError, match="holds no run"):
        refuse_retry(tmp_path / "nowhere", [])


def test_where_no_error_is_left_the_words_of_the_last_retry_are_no_mistake(tmp_path: Path) -> None:
    finished_run(tmp_path)
    refuse_retry(tmp_path, ["UnidentifiedImageError"])


def test_the_count_goes_on_from_what_stays(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path, 9)
    retry(tmp_path, plan, "one", only=["decode"])
    tally = Tally(plan.num_records)
    agenda = Agenda(tmp_path, plan, ())
    agenda.settle(tally)
    assert agenda.num_records(agenda.shards()) == 3
    ledger = new_ledger(tmp_path, plan, "two", tally=tally, only=())
    for number in range(plan.num_shards):
        answered_again(ledger, plan, number, fails=[8])
    ledger.close()
    assert (tally.num_done, dict(tally.errors)) == (9, {"generate/OutOfMemoryError": 1})


def test_errors_that_are_not_meant_are_counted_as_they_are(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path)
    tally = Tally(plan.num_records)
    ledger = new_ledger(tmp_path, plan, "again", tally=tally, only=["decode"])
    for number in range(plan.num_shards):
        answered_again(ledger, plan, number)
    ledger.close()
    assert (tally.num_done, dict(tally.errors)) == (6, {"generate/OutOfMemoryError": 2})


def test_a_retry_that_was_stopped_goes_on(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path)
    before = tree(tmp_path / "data")
    first = new_ledger(tmp_path, plan, "first", only=())
    assert len(answered_again(first, plan, 0, most=1)) == 1
    first.close()
    assert tree(tmp_path / "data") == before
    write_manifest(tmp_path, read_status(tmp_path))  # what `run` does at the end: the retry's journals stay
    assert retry(tmp_path, plan, "second") == [2, 4, 5]
    assert [one["response"] for one in records(tmp_path)][1] == "second answer to 1"
    assert audit(tmp_path).passed


def test_of_two_retries_one_wins_and_the_other_discards_its_copy(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path)
    slow, quick = (new_ledger(tmp_path, plan, name, only=()) for name in ("slow", "quick"))
    keys = sorted(slow.open(plan.shard(0)))
    for key in keys:
        slow.expect(row(key.row_index), [key], plan.shard(0))
    answered_again(quick, plan, 0)
    won = tree(tmp_path / "data")
    for key in keys:
        slow.record(answer(key, "too late"))
    slow.close()
    quick.close()
    assert tree(tmp_path / "data") == won
    assert audit(tmp_path).passed


def test_who_comes_after_all_was_cleared_away_leaves_nothing(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path)
    slow, quick = (new_ledger(tmp_path, plan, name, only=()) for name in ("slow", "quick"))
    keys = sorted(slow.open(plan.shard(0)))
    for key in keys:
        slow.expect(row(key.row_index), [key], plan.shard(0))
    answered_again(quick, plan, 0)
    quick.close()
    write_manifest(tmp_path, read_status(tmp_path))
    (tmp_path / "work").mkdir(exist_ok=True)
    won = tree(tmp_path / "data")
    for key in keys:
        slow.record(answer(key, "too late"))
    slow.close()
    assert tree(tmp_path / "data") == won
    assert [path.name for path in (tmp_path / "work").iterdir()] == []


def killed_before_the_swap(output_dir: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers of shard 0 are in work/part-00000.g1.parquet, and data/ is as it was."""
    with monkeypatch.context() as patch:
        patch.setattr(retry_module, "put_in_place", lambda *_: None)
        ledger = new_ledger(output_dir, plan, "killed", only=())
        answered_again(ledger, plan, 0)
        ledger.close()
    assert (output_dir / "work/part-00000.g1.parquet").exists()
    summary = shard_summary(output_dir / "data/part-00000.parquet")
    assert summary is not None and summary.generation == 0


@pytest.mark.parametrize("only", [None, ()])
def test_whoever_comes_next_finishes_the_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: Collection[str] | None
) -> None:
    plan = run_with_errors(tmp_path)
    killed_before_the_swap(tmp_path, plan, monkeypatch)
    Agenda(tmp_path, plan, only)
    assert [one["attempt"] for one in records(tmp_path)] == [1, 2, 2, 1, 1, 1]
    assert audit(tmp_path).passed
    write_manifest(tmp_path, read_status(tmp_path))
    assert not (tmp_path / "work").exists()


def test_a_manifest_clears_away_no_answer_that_is_not_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = run_with_errors(tmp_path)
    killed_before_the_swap(tmp_path, plan, monkeypatch)
    write_manifest(tmp_path, read_status(tmp_path))
    assert (tmp_path / "work/part-00000.g1.parquet").exists()
    assert retry(tmp_path, plan, "next") == [4, 5]


def test_a_generation_that_is_in_place_is_never_put_there_again(tmp_path: Path) -> None:
    """The file of a slower worker, or of a run long ago, does not replace a later one."""
    plan = run_with_errors(tmp_path)
    retry(tmp_path, plan, "first", fails=[1])
    old = (tmp_path / "work/part-00000.g1.parquet").read_bytes()
    retry(tmp_path, plan, "second")
    (tmp_path / "work/part-00000.g2.parquet").unlink()
    now = tree(tmp_path / "data")
    (tmp_path / "work/part-00000.g1.parquet").write_bytes(old)
    Agenda(tmp_path, plan, None)
    assert tree(tmp_path / "data") == now
    write_manifest(tmp_path, read_status(tmp_path))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_a_file_in_work_that_is_no_generation_of_this_plan_replaces_nothing(
    tmp_path: Path, content: bytes | None
) -> None:
    plan = run_with_errors(tmp_path / "out")
    if content is None:
        other = run_with_errors(tmp_path / "other")
        retry(tmp_path / "other", other, "x")
        content = (tmp_path / "other/work/part-00000.g1.parquet").read_bytes()
    now = tree(tmp_path / "out/data")
    (tmp_path / "out/work/part-00000.g1.parquet").write_bytes(content)
    Agenda(tmp_path / "out", plan, None)
    assert tree(tmp_path / "out/data") == now


def test_a_shard_that_is_damaged_meanwhile_ends_the_retry_with_its_name(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path)
    ledger = new_ledger(tmp_path, plan, "again", only=())
    keys = sorted(ledger.open(plan.shard(0)))
    for key in keys:
        ledger.expect(row(key.row_index), [key], plan.shard(0))
    (tmp_path / "data/part-00000.parquet").write_bytes(b"")
    for key in keys[:-1]:
        ledger.record(answer(key))
    with pytest.raises(RunFailed, match=r"part-00000\.parquet was removed or damaged"):
        ledger.record(answer(keys[-1]))
    ledger.close()


def test_the_footer_says_with_what_it_was_asked_again(tmp_path: Path) -> None:
    plan = run_with_errors(tmp_path)
    ledger = new_ledger(tmp_path, plan, "again", only=())
    ledger._numerics = lambda: {"engine": "slots"}
    answered_again(ledger, plan, 0)
    ledger.close()
    summary = shard_summary(tmp_path / "data/part-00000.parquet")
    assert summary is not None
    assert summary.numerics == {"engine": "none", "retry.engine": "slots"}
    write_manifest(tmp_path, read_status(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["num_errors"] == 2


def test_keys_of_a_row_that_failed_in_one_prompt_alone(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3, prompt_names=["a", "b"], num_samples=2)
    ledger = new_ledger(tmp_path, plan)
    shard = plan.shard(0)
    ledger.open(shard)
    for index in range(3):
        keys = [key for key in keys_of(plan, shard) if key.row_index == index]
        ledger.expect(row(index), keys, shard)
        for key in keys:
            ledger.record(answer(key, fault=FAULT if key == (1, "b", 0) else None))
    ledger.close()
    again = new_ledger(tmp_path, plan, "again", only=())
    assert answered_again(again, plan, 0) == [(1, "b", 0)]
    again.close()
    after = records(tmp_path)
    assert [(one["row_index"], one["prompt_name"], one["sample_index"]) for one in after] == list(keys_of(plan, shard))
    assert [one["attempt"] for one in after].count(2) == 1
