"""Requests of a simulated fleet by the second."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from simulated_protocol import PRICES, Asked, Kind

Floats = npt.NDArray[np.float64]


def _columns() -> dict[Kind, tuple[array[float], array[float], array[float]]]:
    return defaultdict(lambda: (array("d"), array("d"), array("d")))


@dataclass(slots=True)
class Requests:
    """Collected as moments and as spans; looked at as a histogram with a bin a second."""

    _moments: dict[Kind, list[tuple[Floats, Floats]]] = field(default_factory=lambda: defaultdict(list))
    _spans: dict[Kind, tuple[array[float], array[float], array[float]]] = field(default_factory=_columns)

    def at(self, asked: Asked, moments: Floats, times: Floats | None = None) -> None:
        """What is asked at each of the moments, or so many times at each."""
        for kind, number in asked.items():
            self._moments[kind].append((moments, number * (np.ones(len(moments)) if times is None else times)))

    def every(self, asked: Asked, starts: Floats, stops: Floats, interval: float) -> None:
        """What is asked each `interval` seconds after each start, before its stop."""
        number = 0
        while len(starts):
            number += 1
            due = starts + number * interval < stops - 1e-9
            starts, stops = starts[due], stops[due]
            self.at(asked, starts + number * interval)

    def span(self, kind: Kind, start: float, stop: float, number: int) -> None:
        """So many, one after the other."""
        for column, value in zip(self._spans[kind], (start, stop, number), strict=True):
            column.append(value)

    def total(self, kind: Kind) -> int:
        return round(sum(float(times.sum()) for _, times in self._moments[kind]) + sum(self._spans[kind][2]))

    @property
    def price(self) -> float:
        return sum(self.total(kind) * price for kind, price in PRICES.items()) / 1000

    def by_second(self, *kinds: Kind) -> Floats:
        """How many of these kinds in each second from 0."""
        found = np.zeros(1)
        for kind in kinds:
            for moments, times in self._moments[kind]:
                found = _sum(found, np.bincount(moments.astype(np.int64), times).astype(np.float64))
            start, stop, number = (np.array(column) for column in self._spans[kind])
            found = _sum(found, _spread(start, stop, number))
        return found


def _spread(start: Floats, stop: Floats, number: Floats) -> Floats:
    """Spans as a histogram: each counts in every second as far as it lies in it."""
    if not len(start):
        return np.zeros(1)
    first, last = start.astype(np.int64), stop.astype(np.int64)
    size = int(last.max()) + 2
    rate = number / np.maximum(stop - start, 1e-12)
    found = np.zeros(size)
    found += np.bincount(first, np.where(first == last, number, rate * (first + 1 - start)), size)
    found += np.bincount(last, np.where(first == last, 0.0, rate * (stop - last)), size)
    whole = np.where(first == last, 0.0, rate)
    found += np.cumsum(np.bincount(first + 1, whole, size) - np.bincount(np.maximum(last, first + 1), whole, size))
    return found


def _sum(one: Floats, other: Floats) -> Floats:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    longer = longer.copy()
    longer[: len(shorter)] += shorter
    return longer


def peak(by_second: Floats, window: int) -> float:
    """The most a second, as the mean over so many seconds."""
    if not len(by_second):
        return 0.0
    window = min(window, len(by_second))
    return float(np.convolve(by_second, np.ones(window), "valid").max()) / window
