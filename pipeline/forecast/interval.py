"""What a sample says about the whole: shares and quantiles, with how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.9  # of every interval here
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and bounds between which the truth lies nine times of ten."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    @property
    def parts(self) -> dict[str, float]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def share(num_found: int, num_seen: int, num_all: int) -> Interval:
    """The share of something in a whole, of which a part was seen: Wilson's interval (1927).

    It narrows as the part becomes the whole (finite population), and is never below what was seen for certain.
    """
    if not num_seen:
        return Interval(0.0, 0.0, 1.0)
    found = num_found / num_seen
    if num_seen >= num_all:
        return Interval(found, found, found)
    # Of a finite whole a sample says as much as a larger one of an endless whole.
    n = num_seen * (num_all - 1) / (num_all - num_seen)
    middle = (found + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(found * (1 - found) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Interval(found, max(num_found / num_all, middle - half, 0.0), min(1.0, middle + half))


def mean(values: Sequence[float], num_all: int) -> Interval:
    """The mean of a whole, of which these are a part taken at random."""
    if not values:
        return Interval(0.0, 0.0, 0.0)
    middle = sum(values) / len(values)
    half = _Z * middle * relative_error(values, num_all)
    return Interval(middle, max(0.0, middle - half), middle + half)


def relative_error(values: Sequence[float], num_all: int) -> float:
    """The standard error of a mean, as a share of it; 1 where one value says nothing about others."""
    n = len(values)
    middle = sum(values) / n if n else 0.0
    if n >= num_all or middle <= 0:
        return 0.0
    if n < 2:
        return 1.0
    variance = sum((value - middle) ** 2 for value in values) / (n - 1)
    return math.sqrt(variance / n * (1 - n / num_all)) / middle


def around(value: float, relative: float) -> Interval:
    """A positive value whose error is a factor: log-normal, `relative` its standard deviation."""
    factor = math.exp(_Z * relative)
    return Interval(value, value / factor, value * factor)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of them does not exceed, one of them; values: not empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median, 95 % and largest; nothing of nothing."""
    if not values:
        return {}
    return {
        "min": min(values),
        "median": quantile(values, 0.5),
        "p95": quantile(values, 0.95),
        "max": max(values),
    }
