"""Percentile bootstrap (Efron and Tibshirani 1993) of a metric, and of the difference of two runs.

What is drawn are clusters of records, not records: answers about one image, to several prompts or in several samples,
are no independent evidence. A resample's value is computed from the sum of its clusters' statistics. Two runs are
compared on the same draws (Koehn 2004), which takes out what makes a row hard for both.

Where every record is right, or every one wrong, no draw shows any other value, however few there are: there the exact
interval (Clopper and Pearson 1934) over the clusters is given.

N: records, C: clusters, B: resamples, S: statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.score.metric import Array, Metric

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
# More clusters are put together at random into this many, which are drawn as a whole: the variance of a mean of groups
# is that of the mean, and the time does not grow with the records. 100,000 take two seconds on one core.
MOST_CLUSTERS = 100_000
_DRAWS_AT_ONCE = 1 << 20

Value = Callable[[Array, Array], Array]  # of sums [B, S] and numbers of records [B]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its interval of 95 %."""

    value: float | None  # None where it is not defined, such as the precision of an answer that never came
    low: float | None  # None where there are fewer than two clusters, which say nothing about chance
    high: float | None


class Resamples:
    """Sums of statistics over the records, and over resamples of their clusters."""

    def __init__(
        self,
        statistics_NS: Array,
        clusters_N: ArrayLike | None = None,
        *,
        seed: int = 42,
        num_resamples: int = NUM_RESAMPLES,
    ) -> None:
        """clusters_N: what each record belongs to, such as its row_index; None = each stands for itself."""
        rows = np.concatenate([statistics_NS, np.ones((len(statistics_NS), 1))], 1)
        sums_CS = _clustered(rows, clusters_N)
        self.num_clusters = len(sums_CS)
        sums_CS = _put_together(sums_CS, seed)
        self.sums_S: Array = rows[:, :-1].sum(0)
        self.num_rows = len(rows)
        resampled_BS = _resampled(sums_CS, seed, num_resamples)
        self._sums_BS, self._num_rows_B = resampled_BS[:, :-1], resampled_BS[:, -1]

    def interval(self, value: Value, columns: slice = slice(None)) -> Interval:
        """Of a value of some of the statistics."""
        found = float(value(self.sums_S[None, columns], np.array([float(self.num_rows)]))[0])
        if not np.isfinite(found):
            return Interval(None, None, None)
        values = value(self._sums_BS[:, columns], self._num_rows_B)
        values = values[np.isfinite(values)]
        if not len(values):
            return Interval(found, None, None)
        low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(found, float(low), float(high))

    def interval_of(self, metric: Metric, columns: slice = slice(None)) -> Interval:
        """Of a metric, whose statistics are those columns."""
        found = self.interval(metric.value, columns)
        if not metric.is_mean or found.value is None or found.low is None or found.low != found.high:
            return found
        share = ((1 - CONFIDENCE) / 2) ** (1 / self.num_clusters)
        if found.value == metric.best:
            return Interval(found.value, metric.best * share, found.value)
        if found.value == 0:
            return Interval(found.value, found.value, metric.best * (1 - share))
        return found


def interval(
    metric: Metric,
    statistics_NS: Array,
    clusters_N: ArrayLike | None = None,
    *,
    seed: int = 42,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """A metric of these records.

    statistics_NS: of metric.rows().
    clusters_N: what each record belongs to, such as its row_index; None = each stands for itself.
    """
    return Resamples(statistics_NS, clusters_N, seed=seed, num_resamples=num_resamples).interval_of(metric)


def paired_interval(
    metric: Metric,
    a_NS: Array,
    b_NS: Array,
    clusters_N: ArrayLike | None = None,
    *,
    seed: int = 42,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The metric of b less that of a: two runs' statistics of the same records in the same order."""
    if a_NS.shape != b_NS.shape:
        raise ValueError(f"expected statistics of the same records, came {a_NS.shape} and {b_NS.shape}")
    width = a_NS.shape[1]

    def difference(sums_BS: Array, num_rows_B: Array) -> Array:
        return metric.value(sums_BS[:, width:], num_rows_B) - metric.value(sums_BS[:, :width], num_rows_B)

    both = np.concatenate([a_NS, b_NS], 1)
    return Resamples(both, clusters_N, seed=seed, num_resamples=num_resamples).interval(difference)


def _clustered(rows_NS: Array, clusters_N: ArrayLike | None) -> Array:
    """Sums [C, S] of each cluster."""
    if clusters_N is None:
        return rows_NS
    _, numbers = np.unique(np.asarray(clusters_N), return_inverse=True)
    return _summed(rows_NS, numbers)


def _put_together(sums_CS: Array, seed: int) -> Array:
    """At most MOST_CLUSTERS sums, of clusters that chance put together."""
    if len(sums_CS) <= MOST_CLUSTERS:
        return sums_CS
    return _summed(sums_CS, np.random.default_rng(seed).permutation(len(sums_CS)) % MOST_CLUSTERS)


def _resampled(sums_CS: Array, seed: int, num_resamples: int) -> Array:
    """Sums [B, S] over as many clusters as there are, drawn with replacement; none where there are fewer than two."""
    num = len(sums_CS)
    if num < 2:
        return np.empty((0, sums_CS.shape[1]))
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, _DRAWS_AT_ONCE // num)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        drawn = rng.integers(0, num, (size, num)) + np.arange(size)[:, None] * num
        times = np.bincount(drawn.ravel(), minlength=size * num).reshape(size, num)
        found.append(times.astype(np.float64) @ sums_CS)
    return np.concatenate(found)


def _summed(rows_NS: Array, groups_N: NDArray[np.intp]) -> Array:
    return np.stack([np.bincount(groups_N, column) for column in rows_NS.T], 1).astype(np.float64)
