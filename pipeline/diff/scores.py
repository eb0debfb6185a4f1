"""Both sides scored against the same references, and the interval of the difference.

Interval and draws are those of vlm-batch score: records about one row are drawn together, and both sides on the same
draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.diff.comparison import PairBlock
from pipeline.diff.pairs import Pairs, pair_tables
from pipeline.diff.side import Side
from pipeline.score import Cases, Metric, metrics_named, paired_interval
from pipeline.score.metric import Array, References

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Scores:
    """The statistics of every pair that has a reference, by metric. Arrays have an entry for each of these pairs.

    Args:
        metric: names of metrics. reference: column of a, or of b where a has none of that name.

    Raises:
        UsageError: an unknown metric, or no such column.
    """

    def __init__(self, a: Side, b: Side, pairs: Pairs, metric: Sequence[str], reference: str) -> None:
        self._num_pairs = len(pairs)
        self._sides, self._holder = (a, b), 0 if a.has(reference) else 1
        self._column = self._sides[self._holder].column(reference)
        self._metrics = [one.learned(self._references(pairs)) for one in metrics_named(metric)]
        self._statistics: list[tuple[list[Array], list[Array]]] = [([], []) for _ in self._metrics]
        self._numbers: list[Numbers] = []  # of pairs
        self._rows: list[Numbers] = []  # row_index of each

    @property
    def columns(self) -> tuple[list[str], list[str]]:
        """What has to be read of a and of b."""
        found: tuple[list[str], list[str]] = ([], [])
        found[self._holder].append(self._column)
        if "row_index" in self._sides[0].results.names:
            found[0].append("row_index")
        return found

    def add(self, block: PairBlock) -> None:
        """Score the pairs of a block."""
        tables = (block.a, block.b)
        references = [*map(as_references, tables[self._holder][self._column].to_pylist())]
        here = np.array([number for number, texts in enumerate(references) if texts], np.int64)
        if not len(here):
            return
        self._numbers.append(here + block.where.start)
        if "row_index" in block.a.column_names:
            self._rows.append(block.a["row_index"].to_numpy()[here])
        texts = [references[number] for number in here]
        answers = []
        for side, table, errors in zip(self._sides, tables, (block.a_errors, block.b_errors), strict=True):
            said = table[side.response].to_pylist()
            answers.append([said[number] if errors[number] is None else None for number in here])
        for metric, held in zip(self._metrics, self._statistics, strict=True):
            for rows, responses in zip(held, answers, strict=True):
                rows.append(metric.rows(Cases(responses, texts)))

    def of(self, numbers: Numbers | None = None, *, seed: int) -> dict[str, dict[str, Any]]:
        """Each metric of a, of b, and their difference with its interval of 95 %, once all blocks were added.

        numbers: of the pairs that are looked at; None = all.
        """
        known, rows, statistics = self._all
        chosen: Any = slice(None)
        if numbers is not None:
            at = self._position[numbers]
            chosen = at[at >= 0]
        found = {}
        for metric, (a, b) in zip(self._metrics, statistics, strict=True):
            difference = paired_interval(metric, a[chosen], b[chosen], rows[chosen], seed=seed)
            found[metric.name] = {
                "a": _value(metric, a[chosen]),
                "b": _value(metric, b[chosen]),
                "difference": difference.value,
                "low": difference.low,
                "high": difference.high,
                "num_rows": len(known[chosen]),
            }
        return found

    def by_record(self) -> tuple[Numbers, Array, Array]:
        """Pairs with a reference, and what the first metric gives a and b, each record by itself."""
        known, _, statistics = self._all
        a, b = (self._metrics[0].row_scores(rows) for rows in statistics[0])
        return known, a, b

    def of_records(self, numbers: Numbers) -> dict[int, tuple[list[str], list[str]]]:
        """What the first metric gives a and b in these pairs, as people read it; pairs without a reference are left
        out."""
        known, a, b = self.by_record()
        name, at = self._metrics[0].name, self._position[numbers]
        return {int(known[n]): ([f"{name} {a[n]:.3g}"], [f"{name} {b[n]:.3g}"]) for n in at[at >= 0]}

    def references_in(self, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> References:
        """The references of a record, from the rows of both sides that hold the columns."""
        row = (a, b)[self._holder]
        return as_references(row[self._column]) if row else []

    @cached_property
    def _all(self) -> tuple[Numbers, Numbers, list[tuple[Array, Array]]]:
        """Numbers of the pairs with a reference, the row of each, and each metric's statistics of a and of b."""
        known = np.concatenate(self._numbers) if self._numbers else np.zeros(0, np.int64)
        nothing = Cases([], [])
        statistics = [
            (np.concatenate([metric.rows(nothing), *a]), np.concatenate([metric.rows(nothing), *b]))
            for metric, (a, b) in zip(self._metrics, self._statistics, strict=True)
        ]
        self._statistics = []
        return known, np.concatenate(self._rows) if self._rows else known, statistics

    @cached_property
    def _position(self) -> Numbers:
        """Of each pair among those with a reference; -1 = it has none."""
        known, _, _ = self._all
        found = np.full(self._num_pairs, -1)
        found[known] = np.arange(len(known))
        return found

    def _references(self, pairs: Pairs) -> Iterator[References]:
        a, b = self._sides
        for _, *tables in pair_tables(a, b, pairs, *self.columns):
            for value in tables[self._holder][self._column].to_pylist():
                if texts := as_references(value):
                    yield texts


def as_references(value: Any) -> References:
    """The right answers that a cell holds: one text or number, or a list of them; none where it is null."""
    values = value if isinstance(value, list) else [value]
    return [str(entry) for entry in values if entry is not None]


def _value(metric: Metric, rows: Array) -> float | None:
    if not len(rows):
        return None
    value = float(metric.value(rows.sum(0, keepdims=True), len(rows))[0])
    return value if np.isfinite(value) else None
