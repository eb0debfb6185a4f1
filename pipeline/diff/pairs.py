"""Which record of a is which of b.

Records are known by the number of their place: 0 for the first of a side's first file, and so on through its files.
Only the columns of the key are held for all records; texts are read a few files at a time (pair_tables).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.diff.side import Side
from pipeline.errors import UsageError

Places = np.ndarray[Any, np.dtype[np.int64]]

_MAX_EXAMPLES = 5
_BLOCK_BYTES = 64 * 1024**2  # of a's columns at a time, and about as much of b's


@dataclass(frozen=True, slots=True)
class Pairs:
    """Records of a and b that belong together: a[n] and b[n]; and those of one side alone. a and the latter ascend."""

    a: Places
    b: Places
    only_in_a: Places
    only_in_b: Places
    key: str  # what they were joined by
    key_columns: tuple[str, str]  # of a and of b, as Results.tables() knows them
    a_starts: Places  # the place of each file's first record, and behind them the number of records
    b_starts: Places

    def __len__(self) -> int:
        return len(self.a)


def paired(a: Side, b: Side, key: str | None) -> Pairs:
    """Join two sides by the column `key` (None = id), prompt and sample.

    The prompt's name belongs to the key unless both sides have one alone: then these two are compared. A side without
    the column sample_index has the sample 0.

    Two runs are joined file by file, by equal names, and what finds no partner there over all files: shards of other
    sizes, and rows in another order, cost memory for the keys and nothing else.

    Raises:
        UsageError: a side lacks the column, it holds nulls or names records twice, or no record of a is in b.
        RunFailed: a file cannot be read.
    """
    key_a, key_b = (_key_column(side, key) for side in (a, b))
    by_prompt = _by_prompt(a, b)
    types = {side.type_of(column) for side, column in ((a, key_a), (b, key_b))}
    as_text = not all(map(pa.types.is_integer, types))
    left, right = (
        _Keys(side, column, by_prompt=by_prompt, as_text=as_text) for side, column in ((a, key_a), (b, key_b))
    )
    if key_a == key_b and key_a in ("id", "row_index") and a.results.plan and b.results.plan:  # unique, as audit proves
        pairs, lone_a, lone_b = _by_name(left, right)
    else:
        pairs, lone_a, lone_b = [], list(left), list(right)
        for keys, tables in ((left, lone_a), (right, lone_b)):
            keys.refuse_doubled(tables)
    rest, only_a, only_b = _joined(pa.concat_tables(lone_a), pa.concat_tables(lone_b))
    both = np.concatenate([*pairs, rest])
    both = both[np.argsort(both[:, 0], kind="stable")]
    if not len(both) and len(only_a) and len(only_b):
        raise UsageError(_nothing_in_common(left, right))
    spelled = ", ".join([key or "id", *(["prompt_name"] if by_prompt else []), "sample_index"])
    return Pairs(both[:, 0], both[:, 1], only_a, only_b, spelled, (key_a, key_b), left.starts, right.starts)


def pair_tables(
    a: Side, b: Side, pairs: Pairs, a_columns: Sequence[str], b_columns: Sequence[str]
) -> Iterator[tuple[slice, pa.Table, pa.Table]]:
    """The records of all pairs, some at a time: which pairs, and the two sides' columns, row beside row."""
    for first, table in _blocks(a, a_columns):
        start, stop = np.searchsorted(pairs.a, (first, first + len(table)))
        if start == stop:
            continue
        wanted = slice(int(start), int(stop))
        yield wanted, table.take(pairs.a[wanted] - first), records_at(b, pairs.b_starts, pairs.b[wanted], b_columns)


def records_at(side: Side, starts: Places, places: Places, columns: Sequence[str]) -> pa.Table:
    """The records at these places, in this order; every file that has some of them is read once."""
    order = np.argsort(places, kind="stable")
    ascending = places[order]
    found = []
    for number, path in enumerate(side.results.files):
        here = ascending[np.searchsorted(ascending, starts[number]) : np.searchsorted(ascending, starts[number + 1])]
        if len(here):
            found.append(side.results.table(path, columns).take(here - starts[number]))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    if not found:
        return next(side.results.tables(columns)).slice(0, 0)
    return pa.concat_tables(found, promote_options="permissive").take(back)


def _blocks(side: Side, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """All records in order, as many files at a time as fill a block; the place of a block's first one before it."""
    first, held, num_bytes = 0, [], 0
    for table in side.results.tables(columns):
        held.append(table)
        num_bytes += table.nbytes
        if num_bytes >= _BLOCK_BYTES:
            block = pa.concat_tables(held, promote_options="permissive")
            yield first, block
            first, held, num_bytes = first + len(block), [], 0
    if held:
        yield first, pa.concat_tables(held, promote_options="permissive")


class _Keys:
    """The keys of a side's records, file by file: columns key, prompt, sample and place."""

    def __init__(self, side: Side, column: str, *, by_prompt: bool, as_text: bool) -> None:
        self.side, self._column = side, column
        self._type = pa.large_string() if as_text else pa.int64()
        self._by_prompt = by_prompt
        self.starts: Places = np.array([0, *itertools.accumulate(side.results.lengths())], np.int64)

    def __iter__(self) -> Iterator[pa.Table]:
        for number in range(len(self.side.results.files)):
            yield self.of_file(number)

    def of_file(self, number: int) -> pa.Table:
        """The keys of one file's records that are compared."""
        side, results = self.side, self.side.results
        asked = [self._column, *(name for name in ("prompt_name", "sample_index") if name in results.names)]
        path = results.files[number]
        table = results.table(path, list(dict.fromkeys(asked)))
        length = len(table)
        text = pa.large_string()
        prompts = table["prompt_name"].cast(text) if "prompt_name" in asked else pa.nulls(length)
        samples = table["sample_index"].cast(pa.int32()) if "sample_index" in asked else np.zeros(length, np.int32)
        keys = pa.table(
            {
                "key": table[self._column].cast(self._type),
                "prompt": pc.fill_null(prompts, "")
                if self._by_prompt
                else pa.repeat("", length).cast(pa.large_string()),
                "sample": pc.fill_null(samples, 0) if "sample_index" in asked else pa.array(samples),
                "place": pa.array(np.arange(length, dtype=np.int64) + self.starts[number]),
            }
        )
        if side.prompt is not None:
            keys = keys.filter(pc.equal(prompts, side.prompt))
        if keys["key"].null_count:
            raise UsageError(
                f"{path}: {keys['key'].null_count:,} records have no {self._column!r}, by which a and b are joined. "
                "Name another column with key=COLUMN."
            )
        return keys

    def refuse_doubled(self, tables: Sequence[pa.Table]) -> None:
        """Refuse keys that stand in more than one record; tables: all of them.

        Raises:
            UsageError: naming some.
        """
        counts = pa.concat_tables(tables).group_by(["key", "prompt", "sample"]).aggregate([([], "count_all")])
        doubled = counts.filter(pc.greater(counts["count_all"], 1))
        if not len(doubled):
            return
        examples = ", ".join(map(_spelled, doubled.slice(0, _MAX_EXAMPLES).to_pylist()))
        more = " ..." if len(doubled) > _MAX_EXAMPLES else ""
        several = len(self.side.prompt_names) > 1 and not self._by_prompt
        hint = f" Choose one prompt of it with {self.side.name}_prompt=NAME." if several else ""
        raise UsageError(
            f"{self.side.name}={self.side.results.path}: {len(doubled):,} keys stand in more than one record: "
            f"{examples}{more}. Expected a column that names each row once; say which with key=COLUMN.{hint}"
        )


def _by_name(left: _Keys, right: _Keys) -> tuple[list[Places], list[pa.Table], list[pa.Table]]:
    """Files of the same name, joined; and the keys of both sides that found no partner."""
    partners = {path.name: number for number, path in enumerate(right.side.results.files)}
    pairs, lone_a, lone_b = [], [], []
    for number, path in enumerate(left.side.results.files):
        ours, partner = left.of_file(number), partners.pop(path.name, None)
        if partner is None:
            lone_a.append(ours)
            continue
        theirs = right.of_file(partner)
        both, only_a, only_b = _joined(ours, theirs)
        pairs.append(both)
        lone_a.append(ours.filter(pc.is_in(ours["place"], pa.array(only_a))))
        lone_b.append(theirs.filter(pc.is_in(theirs["place"], pa.array(only_b))))
    lone_b += [right.of_file(number) for number in partners.values()]
    return pairs, lone_a, lone_b or [right.of_file(0).slice(0, 0)]


def _joined(left: pa.Table, right: pa.Table) -> tuple[Places, Places, Places]:
    """Places of records with equal keys, as pairs [N, 2]; and those of one side alone, ascending."""
    joined = left.rename_columns(["key", "prompt", "sample", "a"]).join(
        right.rename_columns(["key", "prompt", "sample", "b"]), ["key", "prompt", "sample"], join_type="full outer"
    )
    a, b = joined["a"], joined["b"]
    both = joined.filter(pc.and_(pc.is_valid(a), pc.is_valid(b)))
    pairs = np.stack([both["a"].to_numpy(), both["b"].to_numpy()], axis=1)
    only_a, only_b = a.filter(pc.is_null(b)).to_numpy(), b.filter(pc.is_null(a)).to_numpy()
    return pairs, np.sort(only_a), np.sort(only_b)


def _by_prompt(a: Side, b: Side) -> bool:
    """Whether prompt_name belongs to the key."""
    if max(len(a.prompt_names), len(b.prompt_names)) <= 1:
        return False
    for side, other in ((a, b), (b, a)):
        if not side.prompt_names:
            raise UsageError(
                f"{other.name} has answers to the prompts {', '.join(other.prompt_names)}, and {side.name} does not "
                f"say (it has no column prompt_name). Choose one: {other.name}_prompt=NAME."
            )
    return True


def _key_column(side: Side, key: str | None) -> str:
    if key is None:
        if "id" not in side.results.names:
            raise UsageError(
                f"{side.name}={side.results.path} has no column 'id' to join by. Name one that both have: key=COLUMN; "
                f"its columns are {', '.join(side.results.schema.names)}."
            )
        return "id"
    column = side.column(key)
    found = side.type_of(column)
    if not (pa.types.is_integer(found) or pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise UsageError(f"key={key}: in {side.name} it has the type {found}; expected text or whole numbers.")
    return column


def _spelled(row: dict[str, Any]) -> str:
    parts = [repr(row["key"]), *([f"prompt {row['prompt']}"] if row["prompt"] else [])]
    return " ".join([*parts, *([f"sample {row['sample']}"] if row["sample"] else [])])


def _nothing_in_common(left: _Keys, right: _Keys) -> str:
    some = [", ".join(map(_spelled, next(iter(keys)).slice(0, 3).to_pylist())) for keys in (left, right)]
    return (
        f"no record of a is in b: a has {some[0]} ..., b has {some[1]} ... Name a column whose values are the same in "
        "both with key=COLUMN (key=row_index: by position), and prompts of other names with a_prompt= and b_prompt=."
    )
