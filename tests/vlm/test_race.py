"""Ways to compute the same thing, timed in turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from pipeline.vlm.slots import race
from pipeline.vlm.slots.race import best_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(race.time, "perf_counter", lambda: found.now)
    return found


def takes(clock: SimpleNamespace, times: Iterator[float]) -> Callable[[], None]:
    def call() -> None:
        clock.now += next(times)

    return call


def test_of_a_busy_machine_the_quiet_moments_count(clock: SimpleNamespace) -> None:
    """One call in twelve is not held up, and then the first is faster; otherwise the second seems so."""
    first = takes(clock, (0.001 if number % 12 == 7 else 0.012 for number in range(100)))
    second = takes(clock, (0.003 if number % 12 == 9 else 0.008 for number in range(100)))
    assert best_seconds({"first": first, "second": second}) == pytest.approx({"first": 0.001, "second": 0.003})


def test_a_best_that_came_once_is_waited_for_again(clock: SimpleNamespace) -> None:
    """The machine is busy for the first 40 turns, but for one moment of the second."""
    busy = [0.012] * 40
    first = takes(clock, itertools.chain(busy, itertools.repeat(0.001)))
    second = takes(clock, itertools.chain([0.004], busy[1:], itertools.repeat(0.003)))
    assert best_seconds({"first": first, "second": second}) == pytest.approx({"first": 0.001, "second": 0.003})


@pytest.mark.parametrize(("seconds", "num_calls"), [(1e-6, 30), (0.05, 6), (20.0, 4)])
def test_a_start_is_not_held_up_for_long(seconds: float, num_calls: int, clock: SimpleNamespace) -> None:
    calls: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: (calls.append(name), takes(clock, iter([seconds]))())[1]

    found = best_seconds({"a": call("a"), "b": call("b")})
    assert found == pytest.approx({"a": seconds, "b": seconds})
    assert calls == ["a", "b"] * num_calls
