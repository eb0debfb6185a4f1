"""What a metric is: statistics of each record, and a value of their sum.

N: records, S: statistics, B: sums of statistics side by side, such as those of resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError

Array = NDArray[np.float64]
References = Sequence[str]  # of one record: one or several texts, each of them right


@dataclass(frozen=True, slots=True)
class Cases:
    """Records side by side, as metrics look at them."""

    responses: Sequence[str | None]  # None: the record has no answer, which is wrong by every metric
    references: Sequence[References]  # at least one each
    options: Sequence[Sequence[str]] | None = None  # of a multiple-choice question, in the order of their letters

    def __len__(self) -> int:
        return len(self.responses)

    def __iter__(self) -> Iterator[tuple[str | None, References, Sequence[str]]]:
        options = self.options if self.options is not None else [()] * len(self.responses)
        return zip(self.responses, self.references, options, strict=True)


class UnusableCase(UsageError):
    """A record that a metric cannot be computed on, whatever its answer. `position` is its place in the cases."""

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.position = position


class Metric:
    """The mean of a score that each record has by itself. What is no such mean says so by its own methods."""

    name: ClassVar[str]
    doc: ClassVar[str]  # one sentence for people
    is_mean: ClassVar[bool] = True  # of a score of each record
    learns: ClassVar[bool] = False  # whether learned() has to be called
    best: ClassVar[float] = 1.0  # the highest value: 1, 100 as in sacrebleu, 10 of cider

    def score(self, response: str, references: References, options: Sequence[str]) -> float:
        """Of one answer, 0 (wrong) to the best.

        Raises:
            UnusableCase: the references, or the options, are none that this metric can use.
        """
        raise NotImplementedError

    def learned(self, references: Iterable[References]) -> Metric:
        """The metric as it is for these references, given once for each row of the input that is scored with it."""
        return self

    def rows(self, cases: Cases) -> Array:
        """The statistics [N, S] of each record.

        Raises:
            UnusableCase: as score(); it says where.
            UsageError: a package is missing.
        """
        return self.scored(cases)[:, None]

    def scored(self, cases: Cases) -> Array:
        """The score [N] of each record, 0 where there is no answer."""
        scores = np.zeros(len(cases))
        for position, (response, references, options) in enumerate(cases):
            if response is None:
                continue
            try:
                scores[position] = self.score(response, references, options)
            except UnusableCase as problem:
                problem.position = position
                raise
        return scores

    def value(self, sums_BS: Array, num_rows_B: Array) -> Array:
        """The metric [B] of records whose statistics sum up to this; NaN where it is not defined."""
        return ratio(sums_BS[..., 0], num_rows_B)

    def row_scores(self, statistics_NS: Array) -> Array:
        """What each record [N] by itself would be given: what the worst rows are found by."""
        return self.value(statistics_NS, np.ones(len(statistics_NS)))

    def parts(self, sums_BS: Array, num_rows_B: Array) -> Mapping[str, Array]:
        """Further values [B] by name, such as precision and recall."""
        return {}

    def counts(self, sums_S: Array) -> Mapping[str, int]:
        """Numbers of records by name, such as those whose answer could not be read."""
        return {}

    def settings(self) -> Mapping[str, str]:
        """What somebody needs to know to get the same number elsewhere, such as the tokenizer."""
        return {}


def ratio(above: Array, below: Array) -> Array:
    """Quotients, NaN where the divisor is 0."""
    above, divisor = np.broadcast_arrays(above, below)
    quotient: Array = np.divide(above, divisor, out=np.full(above.shape, np.nan), where=divisor != 0)
    return quotient
