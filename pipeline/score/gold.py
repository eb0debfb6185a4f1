"""A file of right answers, joined to the records by id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.dataset.ids import id_text
from pipeline.errors import UsageError
from pipeline.score.predictions import table_at
from pipeline.write.file import Place


@dataclass(frozen=True, slots=True)
class Gold:
    """The rows of the file: some columns by id."""

    path: Place
    columns: tuple[str, ...]
    rows: dict[str, tuple[Any, ...]]  # id -> a value for each column

    def values(self, ids: Sequence[str]) -> list[list[Any]]:
        """A list for each column, null where the file has no such id."""
        nothing = (None,) * len(self.columns)
        found = [self.rows.get(row_id, nothing) for row_id in ids]
        return [[row[place] for row in found] for place in range(len(self.columns))]


def read_gold(address: str, id_column: str, columns: Sequence[str]) -> Gold:
    """The columns of a file, or of a run, by id; all of it is held in memory.

    Raises:
        UsageError: there is no such file or column, an id is null, or one has several rows that differ.
    """
    table = table_at(address)
    asked = [table.column(name) for name in (id_column, *columns)]
    rows: dict[str, tuple[Any, ...]] = {}
    number = 0
    for ids, *values in table.batches(asked):
        for value, *row in zip(ids, *values, strict=True):
            row_id = id_text(value)
            if row_id is None:
                raise UsageError(f"{table.path}: record {number} (from 0) has no id in {id_column!r}.")
            if rows.setdefault(row_id, tuple(row)) != tuple(row):
                raise UsageError(
                    f"{table.path}: the id {row_id!r} occurs more than once, with different answers. Several right "
                    "answers for an id go into one record, as a list."
                )
            number += 1
    return Gold(table.path, tuple(columns), rows)
