"""Percentile bootstrap (Efron and Tibshirani 1993) of a metric, and of the difference of two runs.

What is drawn are clusters of records, not records: answers about one image, to several prompts or in several samples,
are no independent evidence. A resample's value is computed from the sum of its clusters' statistics. Two runs are
compared on the same draws (Koehn 2004), which takes out what makes a row hard for both.

N: records, C: clusters, B: resamples, S: statistics and the number of records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.score.metric import Array, Metric

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
# More clusters are put together at random into this many, which are drawn as a whole: the variance of a mean of groups
# is that of the mean, and the time does not grow with the records. 100,000 take a second or two.
MOST_CLUSTERS = 100_000
_BLOCK = 1 << 20  # draws at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its interval of 95 %."""

    value: float | None  # None where it is not defined, such as the precision of an answer that never came
    low: float | None  # None where there are fewer than two clusters, which say nothing about chance
    high: float | None


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
    sums_CS = clustered(statistics_NS, clusters_N, seed)
    return interval_of(lambda sums_BS: metric.value(sums_BS[:, :-1], sums_BS[:, -1]), sums_CS, seed, num_resamples)


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
    sums_CS = clustered(np.concatenate([a_NS, b_NS], 1), clusters_N, seed)

    def difference(sums_BS: Array) -> Array:
        num_rows_B = sums_BS[:, -1]
        return metric.value(sums_BS[:, width:-1], num_rows_B) - metric.value(sums_BS[:, :width], num_rows_B)

    return interval_of(difference, sums_CS, seed, num_resamples)


def interval_of(value: Callable[[Array], Array], sums_CS: Array, seed: int, num_resamples: int) -> Interval:
    """A value of sums [B, S] over clusters that clustered() gave."""
    return interval_from(value(sums_CS.sum(0, keepdims=True))[0], value(resampled(sums_CS, seed, num_resamples)))


def interval_from(value: Any, values_B: Array) -> Interval:
    """The interval that the values of resamples give."""
    there = values_B[np.isfinite(values_B)]
    if not np.isfinite(value) or not len(there):
        return Interval(float(value) if np.isfinite(value) else None, None, None)
    low, high = np.quantile(there, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(value), float(low), float(high))


def clustered(statistics_NS: Array, clusters_N: ArrayLike | None, seed: int) -> Array:
    """Sums [C, S] of each cluster, its number of records behind them."""
    rows = np.concatenate([statistics_NS, np.ones((len(statistics_NS), 1))], 1)
    if clusters_N is not None:
        _, numbers = np.unique(np.asarray(clusters_N), return_inverse=True)
        rows = _summed(rows, numbers)
    if len(rows) > MOST_CLUSTERS:
        rows = _summed(rows, np.random.default_rng(seed).permutation(len(rows)) % MOST_CLUSTERS)
    return rows


def resampled(sums_CS: Array, seed: int, num_resamples: int) -> Array:
    """Sums [B, S] over as many clusters as there are, drawn with replacement; none where there are fewer than two."""
    num = len(sums_CS)
    if num < 2:
        return np.empty((0, sums_CS.shape[1]))
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, _BLOCK // num)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        drawn = rng.integers(0, num, (size, num)) + np.arange(size)[:, None] * num
        times = np.bincount(drawn.ravel(), minlength=size * num).reshape(size, num)
        found.append(times.astype(np.float64) @ sums_CS)
    return np.concatenate(found)


def _summed(rows_NS: Array, groups_N: NDArray[np.intp]) -> Array:
    columns = [np.bincount(groups_N, weights=column) for column in rows_NS.T]
    return np.stack(columns, 1)
