"""The proof of the first promise: every record key of the plan ends in exactly one record. Without torch or a model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc

from pipeline.errors import RunFailed, UsageError
from pipeline.plan import PLAN_FILE, Plan, read_plan
from pipeline.records import Shard
from pipeline.write.shard import read_shard, shard_files, shard_summary

_MAX_EXAMPLES = 5


@dataclass(slots=True)
class Audit:
    """What was found. `problems` is empty exactly when the promise holds."""

    num_expected: int
    num_ok: int = 0
    num_errors: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def audit(output_dir: Path) -> Audit:
    """Compare the records in data/ with the plan, all pages' checksums verified.

    Raises:
        UsageError: there is no run in this folder.
    """
    plan = read_plan(output_dir)
    if plan is None:
        raise UsageError(f"{output_dir} holds no run (there is no {PLAN_FILE}). Give its folder as output_dir=...")
    found = Audit(plan.num_records)
    prefix = str(plan.settings.get("write.prefix", ""))
    files = dict(shard_files(output_dir / "data"))
    ids = _Ids()
    missing = []
    for number in range(plan.num_shards):
        path = files.pop(number, None)
        if path is None:
            missing.append(number)
            continue
        try:
            _audit_shard(found, plan, plan.shard(number), path, prefix, ids)
        except RunFailed as problem:
            found.problems.append(str(problem))
    if missing:
        rows = sum(plan.shard(number).stop - plan.shard(number).start for number in missing)
        found.problems.append(f"{len(missing)} shards ({rows:,} rows) are missing: {_examples(missing)}")
    for number, path in files.items():
        found.problems.append(f"{path}: the plan has only {plan.num_shards} shards; number {number} belongs to no row")
    if ids.doubled:
        found.problems.append(f"{len(ids.doubled)} ids stand in more than one row: {_examples(ids.doubled)}")
    return found


def audit_lines(output_dir: Path, found: Audit) -> Iterator[str]:
    """The audit as people read it."""
    for problem in found.problems:
        yield f"PROBLEM  {problem}"
    counted = f"{found.num_ok:,} ok + {found.num_errors:,} errors"
    if found.passed:
        yield f"passed   {output_dir}: {found.num_expected:,} records planned = {counted}; none missing, none doubled"
    else:
        yield f"failed   {output_dir}: {found.num_expected:,} records planned, {counted} found in order"


class _Ids:
    """Ids seen so far, as hashes: a million of them in a few ten megabytes."""

    def __init__(self) -> None:
        self._row_of: dict[bytes, int] = {}
        self.doubled: list[str] = []

    def add(self, name: str, row_index: int) -> None:
        key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if self._row_of.setdefault(key, row_index) != row_index:
            self.doubled.append(name)


def _audit_shard(found: Audit, plan: Plan, shard: Shard, path: Path, prefix: str, ids: _Ids) -> None:
    summary = shard_summary(path)
    if summary is None or summary.plan_id != plan.plan_id:
        found.problems.append(f"{path} does not carry this plan's id; running again replaces it")
        return
    table = read_shard(path)
    names = [prefix + name for name in ("row_index", "prompt_name", "sample_index")]
    keys = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    wanted = {
        (row, name, sample)
        for row in range(shard.start, shard.stop)
        for name in plan.prompt_names
        for sample in range(plan.num_samples)
    }
    counts = Counter(keys)
    if lost := sorted(wanted - counts.keys()):
        found.problems.append(f"{path}: {len(lost)} records are missing: {_examples(lost)}")
    if foreign := sorted(counts.keys() - wanted):
        found.problems.append(f"{path}: {len(foreign)} records are not of this shard: {_examples(foreign)}")
    if doubled := sorted(key for key, number in counts.items() if number > 1):
        found.problems.append(f"{path}: {len(doubled)} records are there more than once: {_examples(doubled)}")
    order = {name: number for number, name in enumerate(plan.prompt_names)}
    places = [(row, order.get(name, -1), sample) for row, name, sample in keys]
    if places != sorted(places):
        found.problems.append(f"{path}: the records are not in input order")
    num_errors = pc.sum(pc.equal(table[prefix + "status"], "error")).as_py() or 0
    if (summary.num_rows, summary.num_errors) != (len(keys), num_errors):
        found.problems.append(
            f"{path}: the footer counts {summary.num_rows} records and {summary.num_errors} errors, "
            f"the file has {len(keys)} and {num_errors}"
        )
    found.num_errors += num_errors
    found.num_ok += len(keys) - num_errors
    for name, row_index in zip(table[prefix + "id"].to_pylist(), table[prefix + "row_index"].to_pylist(), strict=True):
        ids.add(name, row_index)


def _examples(values: list[object] | list[int] | list[str] | list[tuple[int, str, int]]) -> str:
    shown = ", ".join(str(value) for value in values[:_MAX_EXAMPLES])
    return shown + (" ..." if len(values) > _MAX_EXAMPLES else "")
