"""The answers that are scored: of a run, or of a file of anybody, some thousand records at a time."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.dataset.ids import id_text
from pipeline.dataset.lines import EXTENSIONS, delimiter_of, line_number, records
from pipeline.errors import UsageError
from pipeline.results import Results, results_at
from pipeline.write.file import Place, open_read, place

_LINES = (*EXTENSIONS, ".json")
_BATCH = 8192  # records


class Table(Protocol):
    """Records with columns, read as often as asked, in the same order."""

    @property
    def path(self) -> Place: ...

    def column(self, name: str) -> str:
        """How a column that the user named is asked for.

        Raises:
            UsageError: there is no such column.
        """
        ...

    def has(self, name: str) -> bool: ...

    def batches(self, columns: Sequence[str]) -> Iterator[list[list[Any]]]:
        """Values of these columns (of column()), a list for each column."""
        ...


@dataclass(frozen=True, slots=True)
class ResultsTable:
    """Records of a run, or of Parquet files."""

    results: Results

    @property
    def path(self) -> Place:
        return self.results.path

    @property
    def run(self) -> Results | None:
        """The records, where they are a run's."""
        return None if self.results.plan is None else self.results

    def column(self, name: str) -> str:
        if name not in self.results.schema.names and name in self.results.names:  # a run that calls it otherwise
            return name
        if name not in self.results.schema.names:
            raise _no_column(self.path, name, self.results.schema.names)
        return self.results.column(name)

    def has(self, name: str) -> bool:
        return name in self.results.schema.names or name in self.results.names

    def batches(self, columns: Sequence[str]) -> Iterator[list[list[Any]]]:
        for table in self.results.tables(list(dict.fromkeys(columns))):
            for start in range(0, table.num_rows, _BATCH):
                part = table.slice(start, _BATCH)
                yield [_values(part[name]) for name in columns]


@dataclass(frozen=True, slots=True)
class LinesTable:
    """Records of a JSON lines, JSON or CSV file."""

    path: Place
    names: frozenset[str]  # of the first records

    @property
    def run(self) -> None:
        """They are no run's."""
        return None

    def column(self, name: str) -> str:
        if name not in self.names:
            raise _no_column(self.path, name, sorted(self.names))
        return name

    def has(self, name: str) -> bool:
        return name in self.names

    def batches(self, columns: Sequence[str]) -> Iterator[list[list[Any]]]:
        rows = rows_of(self.path)
        while part := list(itertools.islice(rows, _BATCH)):
            yield [[row.get(name) for row in part] for name in columns]


def table_at(address: str) -> ResultsTable | LinesTable:
    """The records of a run, of Parquet files, or of a file of lines.

    Raises:
        UsageError: there is nothing of that kind, or it has no record.
        RunFailed: it cannot be read.
    """
    path = place(address)
    if not path.name.lower().endswith(_LINES) or path.is_dir():
        results = results_at(address)
        if not results.num_records:
            raise UsageError(f"{path} has no records.")
        return ResultsTable(results)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file.")
    names = {name for row in itertools.islice(rows_of(path), _BATCH) for name in row}
    if not names:
        raise UsageError(f"{path} has no records.")
    return LinesTable(path, frozenset(names))


def rows_of(path: Place) -> Iterator[Mapping[str, Any]]:
    """The records of a JSON lines, JSON or CSV file. An empty cell of a CSV file is null, which it cannot say.

    Raises:
        UsageError: a line does not parse.
    """
    if path.name.lower().endswith(".json"):
        yield from _json_rows(path)
        return
    is_csv = delimiter_of(path.name) is not None
    with open_read(path) as handle:
        try:
            for record in records(handle, path.name):
                if isinstance(record.values, ValueError):
                    number = line_number(handle, record.offset)
                    raise UsageError(f"{path}:{number} does not parse: {record.values}.")
                yield {name: value or None for name, value in record.values.items()} if is_csv else record.values
        except ValueError as problem:  # of the header
            raise UsageError(f"{path} has no CSV header: {problem}.") from problem
        except OSError as problem:
            raise UsageError(f"{path} cannot be read: {problem}.") from problem


def _json_rows(path: Place) -> Iterator[Mapping[str, Any]]:
    try:
        with open_read(path) as handle:
            found = json.load(handle)
    except (OSError, ValueError, RecursionError) as problem:
        raise UsageError(f"{path} cannot be read as JSON: {problem}.") from problem
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UsageError(f"{path}: expected a list of objects; for an object a line call it .jsonl.")
    yield from found


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells the records of a batch apart."""

    ids: list[str]
    row_indices: list[int]
    prompt_names: list[str | None]
    sample_indices: list[int | None]


def identity_columns(table: ResultsTable | LinesTable, id_column: str) -> dict[str, str | None]:
    """The columns that identify a record, as they are asked for; None where the table has none of the kind."""
    names = {"id": id_column if table.run is None else "id", "row_index": "row_index"}
    names |= {"prompt_name": "prompt_name", "sample_index": "sample_index"}
    return {kind: table.column(name) if table.has(name) else None for kind, name in names.items()}


def identity(values: Mapping[str, list[Any] | None], num: int, start: int) -> Identity:
    """Of a batch of `num` records that begins with record `start`: without ids, records go by their position."""
    places = range(start, start + num)
    rows = [row if _is_index(row, 2**63) else at for row, at in zip(values["row_index"] or places, places, strict=True)]
    ids = [id_text(value) for value in values["id"] or rows]
    names, samples = values["prompt_name"] or [None] * num, values["sample_index"] or [None] * num
    return Identity(
        [str(row) if row_id is None else row_id for row_id, row in zip(ids, rows, strict=True)],
        rows,
        [None if name is None else str(name) for name in names],
        [sample if _is_index(sample, 2**31) else None for sample in samples],
    )


def _is_index(value: Any, limit: int) -> bool:
    return isinstance(value, int) and 0 <= value < limit


def _values(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if pa.types.is_floating(column.type) and column.type != pa.float64():
        shorter: Callable[[float], Any] = np.float32 if column.type == pa.float32() else np.float16
        return [None if value is None else float(str(shorter(value))) for value in values]  # 0.1, not 0.1000000015
    return values


def _no_column(path: Place, name: str, names: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    told = ", ".join([*names[:50], "..."] if len(names) > 50 else names)
    return UsageError(f"{path} has no column {name!r}.{hint} Its columns are {told}.")


def default_output(table: ResultsTable | LinesTable) -> Place | None:
    """Where scores go unless told: beside what is scored; None where that is a glob."""
    if table.run is not None:
        return table.path / "score.json"
    if not (table.path.is_file() or table.path.is_dir()) or not isinstance(table.path, Path):
        return None
    return table.path.parent / f"{table.path.name.removesuffix(table.path.suffix)}.score.json"
