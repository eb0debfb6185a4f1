"""Pairs by the value of a column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UsageError


def refuse_nested(name: str, found: pa.DataType) -> None:
    """Refuse a column whose values are no single ones.

    Raises:
        UsageError: it holds lists, records or bytes.
    """
    if pa.types.is_nested(found) or pa.types.is_binary(found) or pa.types.is_large_binary(found):
        raise UsageError(f"by={name}: the column has the type {found}; expected text, numbers or the like.")


class Groups:
    """The pairs of each value of a column; nulls are a group of their own.

    Args:
        num_pairs: of all that will be added.
    """

    def __init__(self, num_pairs: int) -> None:
        self._codes = np.zeros(num_pairs, np.int32)
        self._numbers: dict[str | None, int] = {}

    def add(self, where: slice, values: pa.ChunkedArray) -> None:
        """The values of these pairs."""
        encoded = values.cast(pa.large_string()).combine_chunks().dictionary_encode(null_encoding="encode")
        own = [self._numbers.setdefault(value, len(self._numbers)) for value in encoded.dictionary.to_pylist()]
        self._codes[where] = np.array(own, np.int32)[encoded.indices.to_numpy()] if own else 0

    def __len__(self) -> int:
        return len(self._numbers)

    def largest(self, most: int) -> Iterator[tuple[str | None, np.ndarray[Any, np.dtype[np.int64]]]]:
        """The values with the most pairs, and the numbers of these; the largest first."""
        order = np.argsort(self._codes, kind="stable")
        sizes = np.bincount(self._codes, minlength=len(self))
        stops = np.cumsum(sizes)
        names = sorted(self._numbers, key=lambda name: (-sizes[self._numbers[name]], name or ""))
        for name in names[:most]:
            number = self._numbers[name]
            yield name, order[stops[number] - sizes[number] : stops[number]]
