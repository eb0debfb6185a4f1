"""The audit: it passes on a good run and finds whatever a run must never be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import FAULT, answer, finished_run, keys_of, new_ledger, new_plan, row

from pipeline.audit import audit, audit_lines
from pipeline.errors import UsageError
from pipeline.write.schema import ShardSummary
from pipeline.write.shard import shard_summary


def shard(output_dir: Path, number: int = 0) -> Path:
    return output_dir / f"data/part-{number:05d}.parquet"


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **summary: object) -> None:
    """Write a shard anew with other rows, its footer as it was but for `summary`."""
    before = shard_summary(path)
    assert before is not None
    table = change(pq.read_table(path, partitioning=None))
    footer: ShardSummary = replace(before, **summary)  # type: ignore[arg-type]
    pq.write_table(table.replace_schema_metadata(footer.to_metadata()), path, write_page_checksum=True)


def test_a_good_run_passes(tmp_path: Path) -> None:
    finished_run(tmp_path, 7, prompt_names=("b", "a"), num_samples=2)
    found = audit(tmp_path)
    assert found.problems == []
    assert (found.num_expected, found.num_ok, found.num_errors) == (28, 28, 0)
    assert list(audit_lines(tmp_path, found)) == [
        f"passed   {tmp_path}: 28 records planned = 28 ok + 0 errors; none missing, none doubled"
    ]


def test_error_records_are_records(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    ledger = new_ledger(tmp_path, plan)
    ledger.open(plan.shard(0))
    for key in keys_of(plan, plan.shard(0)):
        ledger.expect(row(key.row_index), [key], plan.shard(0))
        ledger.record(answer(key, fault=FAULT if key.row_index else None))
    ledger.close()
    found = audit(tmp_path)
    assert (found.passed, found.num_ok, found.num_errors) == (True, 1, 2)


def test_an_empty_run_passes(tmp_path: Path) -> None:
    new_plan(tmp_path, 0)
    assert audit(tmp_path).passed


def test_no_run_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        audit(tmp_path)


def test_what_a_run_must_never_be_is_found(tmp_path: Path) -> None:
    """Each kind of damage alone, undone afterwards."""
    finished_run(tmp_path, 6, prompt_names=("x", "y"))
    first, second = shard(tmp_path), shard(tmp_path, 1)
    content = first.read_bytes()
    mess: dict[str, Callable[[], object]] = {
        r"1 shards \(3 rows\) are missing: 0": lambda: first.unlink(),
        "does not carry this plan's id": lambda: rewrite(first, lambda t: t, plan_id="another"),
        "1 records are there more than once: \\(0, 'x', 0\\)": lambda: rewrite(
            first, lambda t: pa.concat_tables([t.slice(0, 1), t]), num_rows=7
        ),
        "1 records are missing: \\(1, 'x', 0\\)": lambda: rewrite(
            first, lambda t: pa.concat_tables([t.slice(0, 2), t.slice(3)]), num_rows=5
        ),
        "6 records are not of this shard": lambda: first.write_bytes(second.read_bytes()),
        "not in input order": lambda: rewrite(first, lambda t: t.take(list(reversed(range(6))))),
        "the footer counts 7 records, the file has 6": lambda: rewrite(first, lambda t: t, num_rows=7),
        "errors, the file has": lambda: rewrite(first, lambda t: t, num_errors=1),
        "the footer counts 1 generated tokens, the file has 18": lambda: rewrite(
            first, lambda t: t, num_generated_tokens=1
        ),
        "the footer says that it is shard 9": lambda: rewrite(first, lambda t: t, shard=9),
        "columns are not those of the plan": lambda: rewrite(first, lambda t: t.drop_columns(["year"])),
        r"\['status'\] are missing": lambda: rewrite(first, lambda t: t.drop_columns(["status"])),
        "1 ids stand in more than one row: rows 0 and 3": lambda: rewrite(
            first,
            lambda t: t.set_column(0, t.schema.field("id"), pa.array(["00003.jpg"] * 2 + t["id"].to_pylist()[2:])),
        ),
        "inputs.parquet is missing": lambda: (tmp_path / "plan/inputs.parquet").rename(tmp_path / "plan/away"),
        "is damaged": lambda: first.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:]),
        "does not carry": lambda: first.write_bytes(content[:-20]),
        r"part-00002.parquet: the plan has only 2 shards": lambda: shard(tmp_path, 2).write_bytes(content),
        r"part-000000.parquet is no shard of this run": lambda: (tmp_path / "data/part-000000.parquet").write_bytes(
            content
        ),
        r"more.parquet is no shard of this run": lambda: (tmp_path / "data/more.parquet").write_bytes(content),
    }
    assert audit(tmp_path).passed
    for problem, damage in mess.items():
        damage()
        found = audit(tmp_path)
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError("\n".join(found.problems))
        assert not found.passed
        assert list(audit_lines(tmp_path, found))[-1].startswith("failed")
        for path in (tmp_path / "data").iterdir():
            if path != second:
                path.unlink()
        first.write_bytes(content)
        if (tmp_path / "plan/away").exists():
            (tmp_path / "plan/away").rename(tmp_path / "plan/inputs.parquet")
        assert audit(tmp_path).passed, problem


def test_a_flipped_bit_in_any_region_is_found_or_changes_no_record(tmp_path: Path) -> None:
    finished_run(tmp_path, 3)
    path = shard(tmp_path)
    content, good = path.read_bytes(), pq.read_table(path, partitioning=None).to_pylist()
    num_found, regions = 0, [*range(0, 12), *range(12, len(content) - 12, 37), *range(len(content) - 12, len(content))]
    for place in regions:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        if audit(tmp_path).passed:
            assert pq.read_table(path, partitioning=None).to_pylist() == good, f"byte {place}"
        else:
            num_found += 1
    assert num_found > len(regions) / 2


def test_a_damaged_shard_costs_only_itself(tmp_path: Path) -> None:
    """Delete what the audit names and run again: the other shards stay as they are."""
    plan = finished_run(tmp_path, 6)
    before = shard(tmp_path, 1).read_bytes()
    whole = shard(tmp_path).read_bytes()
    shard(tmp_path).write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    (problem,) = audit(tmp_path).problems
    assert str(shard(tmp_path)) in problem
    assert "Delete it and run again" in problem
    shard(tmp_path).unlink()
    ledger = new_ledger(tmp_path, plan, "again")
    for number in range(plan.num_shards):
        for key in ledger.open(plan.shard(number)):
            ledger.expect(row(key.row_index), [key], plan.shard(number))
            ledger.record(answer(key))
    ledger.close()
    assert audit(tmp_path).passed
    assert (shard(tmp_path).read_bytes(), shard(tmp_path, 1).read_bytes()) == (whole, before)


def test_an_audit_needs_no_model_and_changes_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path)
    script = f"""
import sys
from pathlib import Path
from pipeline.audit import audit
assert audit(Path({str(tmp_path)!r})).passed
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    for path in tmp_path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=os.environ)
