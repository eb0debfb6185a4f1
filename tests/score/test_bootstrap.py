"""Bootstrap intervals: of a metric, of the difference of two runs, over clusters."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.score import METRICS, Cases, bootstrap, interval, paired_interval

EXACT = METRICS["exact_match"]


def right(num: int, share: float, seed: int = 0) -> NDArray[np.float64]:
    return (np.random.default_rng(seed).random((num, 1)) < share).astype(np.float64)


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    rows = right(2000, 0.7)
    found = interval(EXACT, rows)
    share = rows.mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 2000)
    assert found.value == pytest.approx(share)
    assert found.low == pytest.approx(share - half, abs=0.003)
    assert found.high == pytest.approx(share + half, abs=0.003)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    held = sum(
        found.low <= 0.6 <= found.high  # type: ignore[operator]
        for found in (interval(EXACT, right(150, 0.6, seed), num_resamples=200) for seed in range(400))
    )
    assert 362 <= held <= 392  # 380 expected, less a few as the bootstrap is narrow on 150 rows; the spread is 4.4


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    rows = right(500, 0.5)
    assert interval(EXACT, rows, seed=1) == interval(EXACT, rows, seed=1)
    assert interval(EXACT, rows, seed=1) != interval(EXACT, rows, seed=2)


def test_records_of_one_image_are_no_independent_evidence() -> None:
    """Ten samples of each of 200 rows that are all alike say no more than one sample each."""
    rows = right(200, 0.5)
    alone = interval(EXACT, rows)
    repeated = interval(EXACT, np.repeat(rows, 10, axis=0), np.repeat(np.arange(200), 10))
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))
    narrow = interval(EXACT, np.repeat(rows, 10, axis=0))
    assert narrow.high - narrow.low < (alone.high - alone.low) / 2  # type: ignore[operator]


def test_clusters_of_different_sizes_count_by_their_records() -> None:
    rows = np.array([[1.0], [1.0], [1.0], [0.0]])
    assert interval(EXACT, rows, ["a", "a", "a", "b"]).value == 0.75


def test_one_cluster_says_nothing_about_chance() -> None:
    found = interval(EXACT, np.ones((3, 1)), [7, 7, 7])
    assert (found.value, found.low, found.high) == (1.0, None, None)
    empty = interval(EXACT, np.empty((0, 1)))
    assert (empty.value, empty.low, empty.high) == (None, None, None)


def test_a_paired_interval_is_narrower_than_what_both_runs_say_alone() -> None:
    a = right(1000, 0.6)
    b = a.copy()
    b[np.flatnonzero(b[:, 0] == 0)[:30]] = 1  # right where a is, and 30 times more
    found = paired_interval(EXACT, a, b)
    assert found.value == pytest.approx(0.03)
    assert found.low is not None and found.high is not None
    assert 0.015 < found.low < 0.03 < found.high < 0.045
    single = interval(EXACT, a)
    assert found.high - found.low < (single.high - single.low) / 2  # type: ignore[operator]


def test_a_run_compared_with_itself_differs_by_nothing() -> None:
    rows = right(100, 0.4)
    found = paired_interval(EXACT, rows, rows)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="the same records"):
        paired_interval(EXACT, rows, rows[:50])


def test_more_rows_than_are_drawn_one_by_one_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "MOST_CLUSTERS", 5000)
    num = 25_000
    rows = right(num, 0.5)
    found = interval(EXACT, rows)
    half = 1.96 * np.sqrt(0.25 / num)
    assert found.value == pytest.approx(rows.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)  # type: ignore[operator]


def test_the_interval_of_a_corpus_metric_is_that_of_drawn_texts() -> None:
    """Sums of statistics give what scoring the drawn records again gives."""
    rng = np.random.default_rng(3)
    words = np.array(["a", "red", "bus", "on", "the", "street", "near", "two", "dogs", "and", "an", "old", "house"])
    texts = [" ".join(rng.choice(words, 9)) for _ in range(300)]
    kept = rng.integers(2, 10, 300)
    references = [
        [" ".join([*text.split()[:same], *rng.choice(words, 9 - same)])] for text, same in zip(texts, kept, strict=True)
    ]
    metric = METRICS["bleu"]
    found = interval(metric, metric.rows(Cases(texts, references)))
    again = []
    for _ in range(100):
        drawn = rng.integers(0, 300, 300)
        sums = metric.rows(Cases([texts[at] for at in drawn], [references[at] for at in drawn])).sum(0, keepdims=True)
        again.append(metric.value(sums, np.array([300]))[0])
    assert found.low == pytest.approx(np.quantile(again, 0.025), abs=1)
    assert found.high == pytest.approx(np.quantile(again, 0.975), abs=1)
    assert found.high - found.low > 4  # type: ignore[operator]


def test_a_value_that_is_not_defined_has_no_interval() -> None:
    metric = METRICS["yes_no"]
    statistics = metric.rows(Cases(["no", "no"], [["no"], ["yes"]]))
    resamples = bootstrap.Resamples(statistics)
    precision = resamples.interval(lambda sums, num: metric.parts(sums, num)["precision"])
    assert (precision.value, precision.low, precision.high) == (None, None, None)


def test_where_all_are_right_the_interval_is_the_exact_one() -> None:
    """Clopper and Pearson: of n right out of n the lower end is 0.025 ** (1 / n)."""
    ten = interval(EXACT, np.ones((10, 1)))
    assert (ten.value, ten.low, ten.high) == (1, pytest.approx(0.6915, abs=1e-4), 1)
    none = interval(EXACT, np.zeros((20, 1)), np.repeat(np.arange(10), 2))  # ten rows of two samples
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(0.3085, abs=1e-4))
    halves = interval(METRICS["anls"], np.full((10, 1), 0.5))
    assert (halves.low, halves.high) == (0.5, 0.5)
    bleu = METRICS["bleu"]
    whole = interval(bleu, bleu.rows(Cases(["a b c d e"] * 3, [["a b c d e"]] * 3)))
    assert (whole.low, whole.high) == (pytest.approx(100), pytest.approx(100))
