"""Requests of a simulated fleet by the second."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from simulated_protocol import PRICES, Asked, Kind

Floats = npt.NDArray[np.float64]


def _spans() -> dict[Kind, tuple[array[float], array[float], array[float]]]:
    return defaultdict(lambda: (array("d"), array("d"), array("d")))


@dataclass(slots=True)
class Requests:
    """A histogram for each kind, with a bin a second. What is asked in between is counted where it belongs."""

    _by_second: dict[Kind, Floats] = field(default_factory=lambda: defaultdict(lambda: np.zeros(1)))
    _spans: dict[Kind, tuple[array[float], array[float], array[float]]] = field(default_factory=_spans)

    def at(self, asked: Asked, moments: Floats, times: Floats | None = None) -> None:
        """What is asked at each of the moments, or so many times at each."""
        found = np.bincount(moments.astype(np.int64), times).astype(np.float64)
        for kind, number in asked.items():
            self._by_second[kind] = _sum(self._by_second[kind], number * found)

    def every(self, asked: Asked, starts: Floats, stops: Floats, interval: float) -> None:
        """What is asked each `interval` seconds after each start, before its stop."""
        number = 0
        while len(starts):
            number += 1
            due = starts + number * interval < stops - 1e-9
            starts, stops = starts[due], stops[due]
            self.at(asked, starts + number * interval)

    def span(self, kind: Kind, start: float, stop: float, number: int) -> None:
        """So many, one after the other; each counts in every second as far as it lies in it."""
        for column, value in zip(self._spans[kind], (start, stop, number), strict=True):
            column.append(value)

    def total(self, kind: Kind) -> int:
        return round(float(self.by_second(kind).sum()))

    @property
    def price(self) -> float:
        return sum(self.total(kind) * price for kind, price in PRICES.items()) / 1000

    def by_second(self, *kinds: Kind) -> Floats:
        """How many of these kinds in each second from 0."""
        found = np.zeros(1)
        for kind in kinds:
            if kind in self._spans:
                start, stop, number = (np.array(column) for column in self._spans.pop(kind))
                self._by_second[kind] = _sum(self._by_second[kind], _spread(start, stop, number))
            found = _sum(found, self._by_second[kind])
        return found


def _spread(start: Floats, stop: Floats, number: Floats) -> Floats:
    """Spans as a histogram."""
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
