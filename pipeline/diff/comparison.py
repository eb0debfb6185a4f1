"""All pairs of two sides, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.diff.change import UNCHANGED, Change, Changes, Similarities, changes
from pipeline.diff.groups import Groups, refuse_nested
from pipeline.diff.pairs import Pairs, pair_tables
from pipeline.diff.side import Side, answered, errors

Numbers = np.ndarray[Any, np.dtype[np.float64]]
NUM_TOKENS = "num_generated_tokens"


@dataclass(frozen=True, slots=True)
class PairBlock:
    """Some pairs: what their records hold, row beside row, and what became of them."""

    where: slice  # of all pairs
    a: pa.Table
    b: pa.Table
    a_errors: Sequence[str | None]  # class of each record's error; None where it has an answer
    b_errors: Sequence[str | None]
    change: Changes
    similarity: Similarities


@dataclass(slots=True)
class Comparison:
    """What came of the records of two sides. Arrays have an entry for each pair."""

    pairs: Pairs
    change: Changes
    similarity: Similarities  # nan where a or b has no answer
    tokens: tuple[Numbers, Numbers]  # generated, of a and b; nan where unknown
    groups: dict[str, Groups]  # by the column that was asked for
    finish_reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (of a, of b), both answered
    errors: Counter[tuple[str | None, str | None]] = field(default_factory=Counter)  # classes, None = answered
    num_images: int = 0  # pairs whose pictures are known on both sides
    num_other_images: int = 0
    num_prompts: int = 0  # pairs whose prompt is known on both sides
    num_other_prompts: int = 0

    def num(self, change: Change) -> int:
        """Records with this outcome."""
        if change is Change.ONLY_IN_A:
            return len(self.pairs.only_in_a)
        if change is Change.ONLY_IN_B:
            return len(self.pairs.only_in_b)
        return int(np.count_nonzero(self.change == change))

    @property
    def num_records(self) -> int:
        """Of a and b together: pairs count once."""
        return len(self.pairs) + len(self.pairs.only_in_a) + len(self.pairs.only_in_b)

    @property
    def share_same(self) -> float:
        """Records with the same answer, or without one for the same reason, of all that a or b has; 1 where none is."""
        return sum(map(self.num, UNCHANGED)) / self.num_records if self.num_records else 1.0


def compare(
    a: Side,
    b: Side,
    pairs: Pairs,
    *,
    by: Sequence[str] = (),
    a_columns: Sequence[str] = (),
    b_columns: Sequence[str] = (),
    see: Callable[[PairBlock], None] = lambda block: None,
) -> Comparison:
    """Count what became of every pair.

    by: columns of a, or of b where a has none of that name.
    a_columns, b_columns: further ones that `see` needs. see: is shown all pairs, in order, some at a time.

    Raises:
        UsageError: there is no such column.
        RunFailed: a file cannot be read.
    """
    nan = np.full(len(pairs), np.nan)
    comparison = Comparison(
        pairs,
        np.zeros(len(pairs), np.uint8),
        np.full(len(pairs), np.nan, np.float32),
        (nan, nan.copy()),
        {},
    )
    grouped = {name: (0, a.column(name)) if a.has(name) else (1, b.column(name)) for name in by}
    for name, (number, column) in grouped.items():
        refuse_nested(name, (a, b)[number].type_of(column))
        comparison.groups[name] = Groups(len(pairs))
    columns = [
        dict.fromkeys(
            [
                side.response,
                *side.compared,
                *more,
                *(column for number, column in grouped.values() if (a, b)[number] is side),
            ]
        )
        for side, more in ((a, a_columns), (b, b_columns))
    ]
    for block in _blocks(a, b, pairs, [*columns[0]], [*columns[1]]):
        _count(comparison, block)
        for name, (number, column) in grouped.items():
            comparison.groups[name].add(block.where, (block.a, block.b)[number][column])
        see(block)
    return comparison


def _blocks(a: Side, b: Side, pairs: Pairs, a_columns: Sequence[str], b_columns: Sequence[str]) -> Iterator[PairBlock]:
    for where, left, right in pair_tables(a, b, pairs, a_columns, b_columns):
        a_errors, b_errors = error_classes(left, a), error_classes(right, b)
        change, similarity = changes(left, right, (a.response, b.response), (a_errors, b_errors))
        yield PairBlock(where, left, right, a_errors, b_errors, change, similarity)


def error_classes(table: pa.Table, side: Side) -> list[str | None]:
    """Class of each record's error; None where it has an answer."""
    there = answered(table, side.response).to_pylist()
    if all(there):
        return [None] * len(table)
    return [None if ok else kind for ok, kind in zip(there, errors(table), strict=True)]


def _count(comparison: Comparison, block: PairBlock) -> None:
    where, a, b = block.where, block.a, block.b
    comparison.change[where], comparison.similarity[where] = block.change, block.similarity
    for held, table in zip(comparison.tokens, (a, b), strict=True):
        if NUM_TOKENS in table.column_names:
            held[where] = table[NUM_TOKENS].cast(pa.float64()).to_numpy()
    failed = np.flatnonzero(block.change > Change.CHANGED)
    comparison.errors.update((block.a_errors[n], block.b_errors[n]) for n in failed.tolist())
    if _both(a, b, "finish_reason"):
        answers = pa.array(block.change <= Change.CHANGED)
        ends = (pc.fill_null(table["finish_reason"], "unknown").filter(answers).to_pylist() for table in (a, b))
        comparison.finish_reasons.update(zip(*ends, strict=True))
    if _both(a, b, "image_sha256"):
        known, other = _unlike(*(_joined(table["image_sha256"]) for table in (a, b)))
        comparison.num_images += known
        comparison.num_other_images += other
    if _both(a, b, "prompt"):
        known, other = _unlike(a["prompt"], b["prompt"])
        comparison.num_prompts += known
        comparison.num_other_prompts += other


def _both(a: pa.Table, b: pa.Table, name: str) -> bool:
    return name in a.column_names and name in b.column_names


def _joined(hashes: pa.ChunkedArray) -> pa.ChunkedArray:
    """Those of a record's pictures in one text; null where there are none: a picture that could not be read."""
    joined = hashes if pa.types.is_string(hashes.type) else pc.binary_join(hashes, " ")
    return pc.if_else(pc.equal(joined, ""), None, joined)


def _unlike(a: pa.ChunkedArray, b: pa.ChunkedArray) -> tuple[int, int]:
    """In how many places both are known, and in how many of these they differ."""
    unlike = pc.not_equal(a, b)
    return len(unlike) - unlike.null_count, pc.sum(unlike).as_py() or 0
