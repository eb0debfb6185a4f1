"""Which rows are looked at."""

from __future__ import annotations

from pipeline.forecast.sample import sampled_rows


def test_rows_come_from_everywhere_and_none_comes_twice() -> None:
    rows = sampled_rows([(0, 10_000)], 200, seed=42)
    assert len(set(rows)) == 200
    assert {row // 50 for row in rows} == set(range(200)), "one from each of 200 equal parts"
    assert rows != sorted(rows), "who stops early has seen all parts"
    early = rows[:20]
    assert min(early) < 2000 and max(early) > 8000


def test_a_seed_gives_the_same_rows_and_another_gives_others() -> None:
    assert sampled_rows([(0, 1000)], 50, seed=1) == sampled_rows([(0, 1000)], 50, seed=1)
    assert sampled_rows([(0, 1000)], 50, seed=1) != sampled_rows([(0, 1000)], 50, seed=2)


def test_only_rows_that_are_left_are_looked_at() -> None:
    ranges = [(10, 20), (50, 51), (90, 100)]
    left = {row for start, stop in ranges for row in range(start, stop)}
    assert set(sampled_rows(ranges, 1000, seed=0)) == left
    assert len(sampled_rows(ranges, 7, seed=0)) == 7
    assert set(sampled_rows(ranges, 7, seed=0)) <= left


def test_nothing_left_is_nothing_to_look_at() -> None:
    assert sampled_rows([], 10, seed=0) == []
    assert sampled_rows([(5, 5)], 10, seed=0) == []
