"""Ways to compute the same thing, timed in turns on the machine that is to compute it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")

_MIN_TURNS, _MAX_TURNS, _MAX_SECONDS = 4, 30, 0.5


def best_seconds(calls: Mapping[Name, Callable[[], object]]) -> dict[Name, float]:
    """The shortest time that each call took, of some.

    In turns, so that a busy machine slows them alike; and the shortest of many, as there most calls take several times
    as long as the best: four turns were seen to choose a kernel that took 2.5 times as long as another.

    Raises:
        whatever a call raises.
    """
    seconds = dict.fromkeys(calls, float("inf"))
    started = time.perf_counter()
    for turn in range(_MAX_TURNS):
        if turn >= _MIN_TURNS and time.perf_counter() - started > _MAX_SECONDS:
            break
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds
