"""Ways to compute the same thing, timed in turns on the machine that is to compute it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")

_MIN_TURNS, _MAX_TURNS, _MAX_SECONDS = 4, 30, 0.5
_BUSY_SECONDS, _SAME = 2.0, 1.1  # as long as no second call was about as fast as the best


def best_seconds(calls: Mapping[Name, Callable[[], object]]) -> dict[Name, float]:
    """The shortest time that each call took, of some.

    In turns, so that a busy machine slows them alike; and the shortest of many, as there most calls take several times
    as long as the best: four turns were seen to choose a kernel that took 2.5 times as long as another. Where the best
    of a call came but once, it may not have been its best.

    Raises:
        whatever a call raises.
    """
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for turn in itertools.count():
        seconds = time.perf_counter() - started
        if turn >= _MAX_TURNS or (turn >= _MIN_TURNS and seconds > _MAX_SECONDS):
            best = [sorted(times)[:2] for times in taken.values()]
            if seconds > _BUSY_SECONDS or all(second <= _SAME * first for first, second in best):
                break
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    return {name: min(times) for name, times in taken.items()}
