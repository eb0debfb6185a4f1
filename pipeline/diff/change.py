"""What became of a record from a to b."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.diff.side import answered
from pipeline.diff.similarity import normalized, similarities

Changes = np.ndarray[Any, np.dtype[np.uint8]]
Similarities = np.ndarray[Any, np.dtype[np.float32]]


class Change(IntEnum):
    """In the order in which they are told. The last two are of records that have no partner."""

    SAME = 0
    SAME_NORMALIZED = 1
    CHANGED = 2
    ONLY_A_ANSWERED = 3
    ONLY_B_ANSWERED = 4
    SAME_ERROR = 5
    OTHER_ERROR = 6
    ONLY_IN_A = 7
    ONLY_IN_B = 8

    @property
    def word(self) -> str:
        """As diff.json and the column `change` have it."""
        return self.name.lower()

    @property
    def doc(self) -> str:
        return _DOCS[self]


_DOCS = {
    Change.SAME: "the same answer",
    Change.SAME_NORMALIZED: "but for white space, case and Unicode form",
    Change.CHANGED: "another answer",
    Change.ONLY_A_ANSWERED: "answered in a, not in b",
    Change.ONLY_B_ANSWERED: "answered in b, not in a",
    Change.SAME_ERROR: "no answer in either, for the same reason",
    Change.OTHER_ERROR: "no answer in either, for another reason",
    Change.ONLY_IN_A: "b has no such record",
    Change.ONLY_IN_B: "a has no such record",
}
UNCHANGED = (Change.SAME, Change.SAME_ERROR)
"""The outcomes that min_same counts as the same."""


def changes(
    a: pa.Table, b: pa.Table, responses: tuple[str, str], errors: tuple[Sequence[str | None], Sequence[str | None]]
) -> tuple[Changes, Similarities]:
    """What became of each pair, and how alike its answers are; nan where one of them is none.

    a, b: records beside each other. responses: the columns of the answers. errors: class of each record's error.
    """
    left, right = (table[column].cast(pa.large_string()) for table, column in zip((a, b), responses, strict=True))
    has_a, has_b = (answered(table, column).to_numpy() for table, column in zip((a, b), responses, strict=True))
    equal = pc.fill_null(pc.equal(left, right), False).to_numpy()
    both = has_a & has_b
    same_error = np.fromiter((one == other for one, other in zip(*errors, strict=True)), bool, len(a))
    change = np.full(len(a), Change.CHANGED, np.uint8)
    change[both & equal] = Change.SAME
    change[has_a & ~has_b], change[has_b & ~has_a] = Change.ONLY_A_ANSWERED, Change.ONLY_B_ANSWERED
    change[~has_a & ~has_b] = Change.OTHER_ERROR
    change[~has_a & ~has_b & same_error] = Change.SAME_ERROR
    similarity = np.full(len(a), np.nan, np.float32)
    similarity[both & equal] = 1.0
    unlike = np.flatnonzero(both & ~equal)
    texts = left.take(unlike).to_pylist(), right.take(unlike).to_pylist()
    similarity[unlike] = similarities(*texts)
    form = [normalized(one) == normalized(other) for one, other in zip(*texts, strict=True)]
    change[unlike[np.array(form, bool)]] = Change.SAME_NORMALIZED
    return change, similarity
