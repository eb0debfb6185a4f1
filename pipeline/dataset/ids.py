"""The names of rows: str() of the id column's value, never null, never twice.

1 and "1" are the same id; 1.0 is "1.0"; NaN is a null. Lists, structs and bytes name nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UsageError

_NUM_EXAMPLES = 3


def id_text(value: Any) -> str | None:
    """The id that a value is; None where it is none."""
    if value is None or value != value or isinstance(value, list | dict | tuple | bytes):
        return None
    return str(value)


def stand_in(path: str, row: int) -> str:
    """The id of a row whose own id cannot be read: the file and the row's place in it, from 0."""
    return f"{path}:{row}"


class Ids:
    """Collects the ids of all rows as Arrow text and says whether they are sound."""

    def __init__(self, source: str) -> None:
        self.source = source  # what the ids come from, for the error
        self._chunks: list[pa.Array] = []

    def add(self, values: Sequence[Any] | pa.Array) -> None:
        """The next rows' values, in row order."""
        if isinstance(values, pa.Array):
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            if pa.types.is_integer(values.type) or pa.types.is_string(values.type):
                self._chunks.append(values.cast(pa.string()))  # for these types the same text as str()
                return
            try:
                values = values.to_pylist()
            except (ValueError, OverflowError) as error:
                raise UsageError(f"{self.source}: a value has no Python form: {error}") from error
        self._chunks.append(pa.array([id_text(value) for value in values], pa.string()))

    def check(self) -> None:
        """Raises UsageError with examples where an id is null or occurs twice."""
        ids = pa.chunked_array(self._chunks, pa.string())
        if ids.null_count:
            rows = pc.indices_nonzero(pc.is_null(ids)).slice(0, _NUM_EXAMPLES).to_pylist()
            raise UsageError(
                f"{self.source}: {ids.null_count} rows have no id (null, NaN, a list, a struct or bytes), e.g. "
                f"{_rows(rows)}. Name another dataset.id_column, or null to number the rows."
            )
        if len(pc.unique(ids)) == len(ids):
            return
        counts = pc.value_counts(ids)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        examples = []
        for value in repeated.slice(0, _NUM_EXAMPLES):
            rows = pc.indices_nonzero(pc.equal(ids, value)).slice(0, _NUM_EXAMPLES).to_pylist()
            examples.append(f"{value.as_py()!r} in {_rows(rows)}")
        raise UsageError(f"{self.source}: {len(repeated)} ids occur more than once, e.g. {'; '.join(examples)}.")


def _rows(rows: list[int]) -> str:
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))} (counted from 0)"
