"""What a sample says about the whole."""

from __future__ import annotations

import random

import pytest

from pipeline.forecast.interval import Interval, around, mean, quantile, quantiles, relative_error, share


@pytest.mark.parametrize("truth", [0.005, 0.05, 0.3])
def test_the_interval_of_a_share_holds_the_truth_nine_times_of_ten(truth: float) -> None:
    rng = random.Random(1)
    whole = [place < truth * 5000 for place in range(5000)]
    held = 0
    for _ in range(1000):
        found = share(sum(rng.sample(whole, 200)), 200, 5000)
        held += found.low <= truth <= found.high
    assert 860 <= held <= 985


def test_nothing_found_is_not_nothing_there() -> None:
    found = share(0, 200, 10**6)
    assert found.value == found.low == 0
    assert 0.005 < found.high < 0.02


def test_who_has_seen_all_knows() -> None:
    assert share(3, 60, 60) == Interval(0.05, 0.05, 0.05)
    assert share(0, 60, 60).high == 0
    assert share(2, 190, 200).low >= 2 / 200, "what was seen is there"


def test_who_has_seen_nothing_knows_nothing() -> None:
    assert share(0, 0, 10) == Interval(0.0, 0.0, 1.0)


def test_the_interval_of_a_mean_holds_the_truth_nine_times_of_ten() -> None:
    rng = random.Random(2)
    whole = [rng.lognormvariate(3, 0.6) for _ in range(1000)]
    truth = sum(whole) / len(whole)
    held = sum(low <= truth <= high for low, high in ((m.low, m.high) for m in (
        mean(rng.sample(whole, 200), 1000) for _ in range(1000))))  # fmt: skip
    assert 860 <= held <= 940


def test_the_error_of_a_mean_shrinks_as_the_whole_is_seen() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert relative_error(values, 4) == 0
    assert 0 < relative_error(values, 5) < relative_error(values, 1000)
    assert relative_error([5.0], 1000) == 1.0
    assert relative_error([0.0, 0.0], 1000) == 0


def test_an_error_is_a_factor() -> None:
    found = around(100.0, 0.1)
    assert found.high / 100 == pytest.approx(100 / found.low)
    assert found.scaled(2).low == pytest.approx(2 * found.low)


def test_quantiles_are_values_that_are_there() -> None:
    values = list(range(1, 101))
    assert quantile(values, 0.5) == 50
    assert quantiles(values) == {"min": 1, "median": 50, "p95": 95, "max": 100}
    assert quantiles([7]) == {"min": 7, "median": 7, "p95": 7, "max": 7}
    assert quantiles([]) == {}
