"""The records of a run as they lie in data/, or those of Parquet files of anybody: what people look at, score, compare
and export.

Our columns go by their own names here, whatever write.prefix and write.response_column call them in the files, and the
input's columns by `input.` and their name, as in a journal: an input column may be called `response`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RunFailed, UsageError
from pipeline.plan import Plan, plan_of_run, read_plan
from pipeline.redaction import without_credentials
from pipeline.write.file import Place, matching, open_read, place
from pipeline.write.schema import ANSWER_FIELDS, FORM_FIELDS, PLAN_FIELDS, ShardSummary
from pipeline.write.shard import read_shard, shard_files, summaries_of_plan

INPUT = "input."  # before the name of a column of the input
OURS = tuple(field.name for field in (*ANSWER_FIELDS, *FORM_FIELDS, *PLAN_FIELDS))


@dataclass(frozen=True, slots=True)
class Results:
    """Records in input order, and what their columns are called in the files."""

    path: Place  # the run's folder; or the file, folder or glob that was given
    files: tuple[Place, ...]  # Parquet, in input order
    schema: pa.Schema  # of every file
    num_records: int
    plan: Plan | None  # None where the files are not of a run
    names: dict[str, str]  # our column -> its name in the files
    summaries: Mapping[int, ShardSummary] = field(default_factory=dict)  # by number of the shard; of a run alone

    @property
    def complete(self) -> bool:
        """Whether every record of the plan is there; true of files without a plan."""
        return self.plan is None or self.num_records == self.plan.num_records

    @property
    def num_errors(self) -> int:
        """Error records of a run."""
        return sum(sum(summary.errors.values()) for summary in self.summaries.values())

    @property
    def input_columns(self) -> list[str]:
        """Names of the columns that came from the input."""
        ours = set(self.names.values())
        return [name for name in self.schema.names if name not in ours]

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The records of one file after the other, with these columns in this order.

        columns: names of ours, and `input.NAME` for columns of the input. Dictionaries are given as plain values.

        Raises:
            UsageError: there is no such column.
            RunFailed: a file cannot be read.
        """
        for path in self.files:
            yield self.table(path, columns)

    def table(self, path: Place, columns: Sequence[str]) -> pa.Table:
        """The records of one of the files, as tables() gives them."""
        names = [self.in_file(column) for column in columns]
        table = read_shard(path, list(dict.fromkeys(names)))
        return pa.table({column: _plain(table[name]) for column, name in zip(columns, names, strict=True)})

    def lengths(self) -> list[int]:
        """How many records each file has, as its footer says.

        Raises:
            RunFailed: a file cannot be read.
        """
        if self.plan is not None:
            return [self.summaries[number].num_rows for number in sorted(self.summaries)]
        return [_num_rows(path) for path in self.files]

    def column(self, name: str) -> str:
        """How a column that the user named as it is called in the files is asked for in tables().

        Raises:
            UsageError: there is no such column.
        """
        if name not in self.schema.names:
            raise UsageError(f"{self.path} has no column {name!r}; its columns are {', '.join(self.schema.names)}.")
        by_file = {in_file: ours for ours, in_file in self.names.items()}
        return by_file.get(name, INPUT + name)

    def in_file(self, column: str) -> str:
        """The name in the files of a column as tables() takes it.

        Raises:
            UsageError: there is no such column.
        """
        if column.startswith(INPUT) and column.removeprefix(INPUT) in self.schema.names:
            return column.removeprefix(INPUT)
        name = self.names.get(column)
        if name is None:
            raise UsageError(
                f"{self.path} has no column {column.removeprefix(INPUT)!r}; its columns are "
                f"{', '.join(self.schema.names)}."
            )
        return name


def results_of_run(output_dir: Place) -> Results:
    """The published records of a run; of one that is not finished those of its finished shards.

    Raises:
        UsageError: there is no run in this folder, or nothing of it is published yet.
    """
    plan = plan_of_run(output_dir)
    found = dict(shard_files(output_dir / "data"))
    summaries = summaries_of_plan(found, plan.plan_id)
    if not plan.num_shards:
        raise UsageError(f"{output_dir}: the run has no rows, as none were found in {without_credentials(plan.root)}.")
    if not summaries:
        raise UsageError(
            f"{output_dir}: none of the {plan.num_shards:,} shards is published yet; see vlm-batch status."
        )
    files = tuple(found[number] for number in sorted(summaries))
    prefix = str(plan.settings.get("write.prefix", ""))
    response = str(plan.settings.get("write.response_column", "response"))
    schema = _schema(files[0])
    names = {name: prefix + (response if name == "response" else name) for name in OURS}
    names = {name: in_file for name, in_file in names.items() if in_file in schema.names}
    num_records = sum(summary.num_rows for summary in summaries.values())
    return Results(output_dir, files, schema, num_records, plan, names, dict(sorted(summaries.items())))


def results_at(address: str) -> Results:
    """The records of a run, given by its folder, or of Parquet files: one, a folder of them, or a glob.

    Raises:
        UsageError: there is nothing of that kind.
        RunFailed: a file cannot be read.
    """
    path = place(address)
    if path.is_dir() and read_plan(path) is not None:
        return results_of_run(path)
    files: Sequence[Place]
    if path.is_dir():
        files = matching(path, "*.parquet") or matching(path / "data", "*.parquet")
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not files:
        raise UsageError(f"{address}: expected the folder of a run, or Parquet files; there is neither.")
    schema = _schema(files[0])
    for other in files[1:]:
        if lacking := sorted(set(schema.names) - set(_schema(other).names)):
            raise UsageError(f"{other} lacks the columns {lacking}, which {files[0]} has.")
    num_records = sum(_num_rows(file) for file in files)
    return Results(path, tuple(files), schema, num_records, None, {name: name for name in OURS if name in schema.names})


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _schema(path: Place) -> pa.Schema:
    return _footer(path).schema.to_arrow_schema()


def _num_rows(path: Place) -> int:
    return int(_footer(path).num_rows)


def _footer(path: Place) -> pq.FileMetaData:
    try:
        with open_read(path) as file:
            return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as problem:
        raise RunFailed(f"{path} cannot be read as Parquet: {str(problem).rstrip('.')}.") from problem
