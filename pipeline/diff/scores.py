"""Both sides scored against the same references, and the interval of the difference.

Interval and draws are those of vlm-batch score: records about one row are drawn together, and both sides on the same
draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.diff.comparison import PairBlock
from pipeline.diff.options import DiffOptions
from pipeline.diff.pairs import Pairs, pair_tables
from pipeline.diff.references import ReferenceSource
from pipeline.diff.side import Side
from pipeline.errors import UsageError
from pipeline.score import Cases, Metric, metrics_named, paired_interval
from pipeline.score.cells import text_of
from pipeline.score.metric import Array, References, UnusableCase

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Scores:
    """The statistics of every pair that has a reference, by metric. Arrays have an entry for each of these pairs.

    Args:
        options: their `metric`, and what says where the references are.

    Raises:
        UsageError: an unknown metric, no such column or file, or a value that is no reference.
    """

    def __init__(self, a: Side, b: Side, pairs: Pairs, options: DiffOptions) -> None:
        self._sides, self._pairs = (a, b), pairs
        metrics = metrics_named(options.metric)
        self.source = ReferenceSource(a, b, options)
        self._metrics = [metric.learned(self._references()) if metric.learns else metric for metric in metrics]
        self._statistics: list[tuple[list[Array], list[Array]]] = [([], []) for _ in self._metrics]
        self._numbers: list[Numbers] = []  # of pairs
        self._rows: list[Numbers] = []  # row_index of each

    @property
    def columns(self) -> tuple[list[str], list[str]]:
        """What has to be read of a and of b."""
        of_a, of_b = self.source.columns
        return [*of_a, *(name for name in ("row_index", "id") if name in self._sides[0].results.names)], of_b

    def add(self, block: PairBlock) -> None:
        """Score the pairs of a block.

        Raises:
            UsageError: as above, or a package is missing.
        """
        references = self.source.references(block.a, block.b)
        here = np.array([number for number, texts in enumerate(references) if texts], np.int64)
        if not len(here):
            return
        self._numbers.append(here + block.where.start)
        if "row_index" in block.a.column_names:
            self._rows.append(block.a["row_index"].to_numpy()[here])
        options = None
        if self.source.has_options:
            found = self.source.options(block.a, block.b)
            options = [found[number] for number in here]
        texts = [references[number] for number in here]
        for number, (side, table, errors) in enumerate(
            zip(self._sides, (block.a, block.b), (block.a_errors, block.b_errors), strict=True)
        ):
            said = table[side.response].to_pylist()
            answers = [text_of(said[place]) if errors[place] is None else None for place in here]
            for metric, held in zip(self._metrics, self._statistics, strict=True):
                try:
                    held[number].append(metric.rows(Cases(answers, texts, options)))
                except UnusableCase as problem:
                    place = int(here[problem.position])
                    row_id = block.a["id"][place].as_py() if "id" in block.a.column_names else block.where.start + place
                    raise UsageError(f"record {row_id!r}: {problem}") from None

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

    @cached_property
    def _all(self) -> tuple[Numbers, Numbers, list[tuple[Array, Array]]]:
        """Numbers of the pairs with a reference, the row of each, and each metric's statistics of a and of b."""
        if not self._numbers and len(self._pairs):
            raise UsageError(f"no record that a and b have in common has a reference ({self.source}).")
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
        found = np.full(len(self._pairs), -1)
        found[known] = np.arange(len(known))
        return found

    def _references(self) -> Iterator[References]:
        a, b = self._sides
        for _, left, right in pair_tables(a, b, self._pairs, *self.columns):
            yield from filter(None, self.source.references(left, right))


def _value(metric: Metric, rows: Array) -> float | None:
    if not len(rows):
        return None
    value = float(metric.value(rows.sum(0, keepdims=True), np.array([len(rows)], np.float64))[0])
    return value if np.isfinite(value) else None
