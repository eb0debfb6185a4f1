"""How fast something was counted lately."""

from __future__ import annotations

import pytest

from pipeline.pace import Pace


def test_a_pace_is_that_of_the_window_and_not_of_the_beginning() -> None:
    pace = Pace(window_seconds=10)
    assert pace.per_second is None and pace.seconds == 0
    pace.note(0, 0)
    assert pace.per_second is None
    for second in range(1, 31):
        pace.note(second, 100 * min(second, 10))
    assert pace.per_second == 0 and pace.seconds == 10
    pace.note(31, 1050)
    assert pace.per_second == pytest.approx(5)


def test_looks_that_are_further_apart_than_the_window_still_have_a_pace() -> None:
    pace = Pace(window_seconds=10)
    for time in (0, 60, 120):
        pace.note(time, time * 3)
    assert pace.per_second == 3 and pace.seconds == 60


def test_the_same_heartbeat_read_twice_changes_nothing() -> None:
    pace = Pace()
    for _ in range(3):
        pace.note(5, 10)
    assert pace.per_second is None
    pace.note(6, 12)
    pace.note(6, 12)
    assert pace.per_second == 2
