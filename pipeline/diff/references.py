"""Where the right answers of pairs come from: a column of their rows, or a file that is joined by id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.dataset.ids import id_text
from pipeline.diff.options import DiffOptions
from pipeline.diff.side import Side
from pipeline.errors import UsageError
from pipeline.score.cells import options_of, texts_of
from pipeline.score.gold import Gold, read_gold
from pipeline.score.metric import References

_GOLD = 2  # beside 0 = a and 1 = b: the file of references


class ReferenceSource:
    """The references of records, and the options of their questions where those are asked for.

    Columns are looked up in the rows of a, then of b; with reference_column in the file that `reference` names.

    Raises:
        UsageError: there is no such column or file, or nothing to join the file by.
    """

    def __init__(self, a: Side, b: Side, options: DiffOptions) -> None:
        assert options.reference is not None
        self._sides = (a, b)
        words = {"reference": options.reference, "reference_column": options.reference_column}
        self._spelled = " ".join(f"{name}={value}" for name, value in words.items() if value)
        self._gold: Gold | None = None
        self._id: tuple[int, str] | None = None
        asked = options.options_column
        if options.reference_column is None:
            self._reference = self._place(options.reference)
        else:
            elsewhere = [asked] if asked is not None and not (a.has(asked) or b.has(asked)) else []
            columns = [options.reference_column, *elsewhere]
            self._gold = read_gold(options.reference, options.reference_id_column, columns)
            self._id = self._place("id")
            self._reference = (_GOLD, options.reference_column)
        self._options = None
        if asked is not None:
            in_gold = self._gold is not None and asked in self._gold.columns
            self._options = (_GOLD, asked) if in_gold else self._place(asked)

    def __str__(self) -> str:
        return self._spelled

    @property
    def columns(self) -> tuple[list[str], list[str]]:
        """What has to be read of a and of b."""
        found: tuple[list[str], list[str]] = ([], [])
        for place in (self._id, self._reference, self._options):
            if place is not None and place[0] != _GOLD:
                found[place[0]].append(place[1])
        return found

    @property
    def has_options(self) -> bool:
        return self._options is not None

    def references(self, a: pa.Table, b: pa.Table) -> list[References]:
        """Of each pair; none where it has none.

        Raises:
            UsageError: a value is none that can be a reference.
        """
        return [self._read(texts_of, "reference", value) for value in self._values(self._reference, (a, b))]

    def options(self, a: pa.Table, b: pa.Table) -> list[Sequence[str]]:
        """Of each pair.

        Raises:
            UsageError: a value is no list.
        """
        assert self._options is not None
        return [self._read(options_of, "options", value) for value in self._values(self._options, (a, b))]

    def of_rows(self, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> References:
        """The references of one record, from its rows in a and b; none where the row that holds them is not there."""
        rows, (where, column) = (a, b), self._reference
        if where == _GOLD:
            assert self._gold is not None and self._id is not None
            row = rows[self._id[0]]
            if row is None:
                return []
            return texts_of(self._of_gold([row[self._id[1]]], column)[0])
        row = rows[where]
        return [] if row is None else texts_of(row[column])

    def _place(self, name: str) -> tuple[int, str]:
        """Which side has a column, and how it is asked for there."""
        a, b = self._sides
        return (1, b.column(name)) if b.has(name) and not a.has(name) else (0, a.column(name))

    def _values(self, place: tuple[int, str], tables: tuple[pa.Table, pa.Table]) -> list[Any]:
        where, column = place
        if where != _GOLD:
            found: list[Any] = tables[where][column].to_pylist()
            return found
        assert self._id is not None
        return self._of_gold(tables[self._id[0]][self._id[1]].to_pylist(), column)

    def _of_gold(self, ids: Sequence[Any], column: str) -> list[Any]:
        assert self._gold is not None
        return self._gold.values([id_text(value) or "" for value in ids])[self._gold.columns.index(column)]

    def _read(self, read: Callable[[Any], Any], what: str, value: Any) -> Any:
        try:
            return read(value)
        except UsageError as problem:
            raise UsageError(f"{what}: {problem}.") from None
