"""The proof of the first promise: every record key of the plan ends in exactly one record. Without torch or a model."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.deep_audit import DeepAudit
from pipeline.errors import RunFailed
from pipeline.option import option
from pipeline.plan import Plan, plan_of_run, read_inputs
from pipeline.records import Shard
from pipeline.vlm.constraint import is_constrained
from pipeline.write.file import Place, matching
from pipeline.write.schema import ANSWER_FIELDS, WriteConfig, output_schema
from pipeline.write.shard import read_shard, shard_files, shard_summary

_MAX_EXAMPLES = 5
_KEY = ("row_index", "prompt_name", "sample_index")
_NEEDED = (*_KEY, "id", "status", "error_stage", "error_type", "num_generated_tokens")


@dataclass(kw_only=True, slots=True)
class AuditOptions:
    """The words that only `vlm-batch audit` knows."""

    deep: bool = option(
        False, "read the images again, too: other bytes under an old name, and damage that no page shows"
    )
    root: str | None = option(None, "deep=true: folder or URL that the source lies in now; null = where it was")


@dataclass(slots=True)
class Audit:
    """What was found. `problems` is empty exactly when the promise holds."""

    num_expected: int
    num_images: int | None = None  # compared with the source; None where nobody asked
    num_unlike: int = 0  # shards that another version of pyarrow wrote: their footers were not compared
    num_ok: int = 0
    num_errors: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def audit(output_dir: Place, options: AuditOptions | None = None) -> Audit:
    """Compare the records in data/ with the plan, all pages' checksums verified.

    options: None = what AuditOptions() says.

    Raises:
        UsageError: there is no run in this folder.
    """
    plan = plan_of_run(output_dir)
    found = Audit(plan.num_records)
    prefix = str(plan.settings.get("write.prefix", ""))
    files = dict(shard_files(output_dir / "data"))
    known = set(files.values())
    schema = None
    try:
        schema = _schema(plan, read_inputs(output_dir, plan).columns)
    except RunFailed as problem:
        found.problems.append(str(problem))
    options = options or AuditOptions()
    deep = DeepAudit(output_dir, plan, prefix, options.root) if options.deep and schema is not None else None
    if deep is not None:
        found.problems += deep.source()
    ids = _Ids()
    missing = []
    for number in range(plan.num_shards):
        path = files.pop(number, None)
        if path is None:
            missing.append(number)
            continue
        try:
            table = _audit_shard(found, plan, plan.shard(number), path, prefix, schema, ids)
            if deep is not None and table is not None:
                found.problems += deep.shard(path, plan.shard(number), table)
        except RunFailed as problem:
            found.problems.append(str(problem))
    if deep is not None:
        found.num_images, found.num_unlike = deep.num_images, deep.num_unlike
    if missing:
        rows = sum(plan.shard(number).stop - plan.shard(number).start for number in missing)
        found.problems.append(f"{len(missing)} shards ({rows:,} rows) are missing: {_examples(missing)}")
    for number, path in files.items():
        found.problems.append(f"{path}: the plan has only {plan.num_shards} shards; number {number} belongs to no row")
    for path in matching(output_dir / "data", "*.parquet"):
        if path not in known:
            found.problems.append(f"{path} is no shard of this run, but whoever reads data/*.parquet reads it too")
    if doubled := ids.doubled():
        found.problems.append(f"{len(doubled)} ids stand in more than one row: {_examples(doubled, '; ')}")
    return found


def audit_lines(output_dir: Place, found: Audit) -> Iterator[str]:
    """The audit as people read it."""
    for problem in found.problems:
        yield f"PROBLEM  {problem}"
    counted = f"{found.num_ok:,} ok + {found.num_errors:,} errors"
    if found.passed:
        yield f"passed   {output_dir}: {found.num_expected:,} records planned = {counted}; none missing, none doubled"
        if found.num_images is not None:
            yield f"deep     {found.num_images:,} images are those that were asked about"
        if found.num_unlike:
            yield f"deep     {found.num_unlike:,} shards are of another pyarrow: their footers were not compared"
    else:
        yield f"failed   {output_dir}: {found.num_expected:,} records planned, {counted} found in order"


class _Ids:
    """Ids seen so far, as hashes of eight bytes: sixteen megabytes for a million rows."""

    def __init__(self) -> None:
        self._hashes, self._rows = array("Q"), array("q")

    def add(self, names: Sequence[str], rows: Sequence[int]) -> None:
        """The ids of a shard's records; those of one row count once."""
        for name, row in dict.fromkeys(zip(names, rows, strict=True)):
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self._hashes.append(int.from_bytes(digest, "little"))
            self._rows.append(row)

    def doubled(self) -> list[str]:
        """The rows that share each id of more than one row."""
        types = {"id": (pa.uint64(), self._hashes), "row": (pa.int64(), self._rows)}
        table = pa.table(
            {
                name: pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(values)])
                for name, (type_, values) in types.items()
            }
        )
        counts = table.group_by("id").aggregate([("row", "count")])
        counts = counts.filter(pc.greater(counts["row_count"], 1))
        shared = table.filter(pc.is_in(table["id"], counts["id"])).group_by("id").aggregate([("row", "list")])
        return sorted("rows " + " and ".join(map(str, rows)) for rows in shared["row_list"].to_pylist())


def _schema(plan: Plan, columns: pa.Schema) -> pa.Schema:
    """The columns that every shard of the plan has."""
    settings = plan.settings
    options = WriteConfig(
        prefix=settings["write.prefix"],
        response_column=settings["write.response_column"],
        keep_images=settings["write.keep_images"],
    )
    return output_schema(
        options,
        columns,
        keep=settings["dataset.columns"],
        id_column=settings["dataset.id_column"],
        image_column=settings["dataset.image_column"],
        is_constrained=is_constrained(settings),
    ).published


def _audit_shard(
    found: Audit, plan: Plan, shard: Shard, path: Place, prefix: str, schema: pa.Schema | None, ids: _Ids
) -> pa.Table | None:
    """Notes what is wrong with a shard; its rows, where they can be looked at further."""
    summary = shard_summary(path)
    if summary is None or summary.plan_id != plan.plan_id:
        found.problems.append(f"{path} does not carry this plan's id; running again replaces it")
        return None
    table = read_shard(path)
    types = {prefix + field.name: field.type for field in ANSWER_FIELDS if field.name in _NEEDED}
    has = {field.name: field.type for field in table.schema}
    if absent := [name for name, type_ in types.items() if has.get(name) != type_]:
        found.problems.append(f"{path}: the columns {absent} are missing, or of another type")
        return None
    if schema is not None and not table.schema.equals(schema):
        found.problems.append(f"{path}: its columns are not those of the plan")
    keys = list(zip(*(table[prefix + name].to_pylist() for name in _KEY), strict=True))
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
    kinds = zip(*(table[prefix + name].to_pylist() for name in ("status", "error_stage", "error_type")), strict=True)
    errors = Counter(f"{stage}/{kind}" for status, stage, kind in kinds if status == "error")
    num_errors = errors.total()
    num_tokens = pc.sum(table[prefix + "num_generated_tokens"]).as_py() or 0
    if summary.shard != shard.number:
        found.problems.append(f"{path}: the footer says that it is shard {summary.shard}")
    for what, counted, there in (
        ("records", summary.num_rows, len(keys)),
        ("errors", (summary.num_errors, dict(summary.errors)), (num_errors, dict(errors))),
        ("generated tokens", summary.num_generated_tokens, num_tokens),
    ):
        if counted != there:
            found.problems.append(f"{path}: the footer counts {counted} {what}, the file has {there}")
    found.num_errors += num_errors
    found.num_ok += len(keys) - num_errors
    ids.add(table[prefix + "id"].to_pylist(), table[prefix + "row_index"].to_pylist())
    return table if schema is not None and table.schema.equals(schema) else None


def _examples(values: Sequence[object], separator: str = ", ") -> str:
    shown = separator.join(str(value) for value in values[:_MAX_EXAMPLES])
    return shown + (" ..." if len(values) > _MAX_EXAMPLES else "")
