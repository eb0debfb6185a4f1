"""From what an engine took for some rows to what it will take for many."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import pytest

from pipeline.forecast.pace import Decoding, Length, Pace, StepCost, Steps, fitted, unsteadiness

COST = StepCost(per_step=0.010, per_row=0.002)


def slots(lengths: list[int], num_slots: int) -> tuple[int, int]:
    """Steps, and rows over all of them, of slots that are watched step by step."""
    waiting, live = deque(length - 1 for length in lengths if length > 1), list[int]()
    num_steps = num_rows = 0
    while waiting or live:
        while waiting and len(live) < num_slots:
            live.append(waiting.popleft())
        num_steps, num_rows = num_steps + 1, num_rows + len(live)
        live = [left - 1 for left in live if left > 1]
    return num_steps, num_rows


def decoding(lengths: list[int], *, in_slots: bool = True, num_rows: int = 8) -> Decoding:
    return Decoding(COST, num_rows, [Length(length, 256) for length in lengths], in_slots)


def test_costs_are_found_from_steps_that_were_full_and_others_that_were_not() -> None:
    rng = random.Random(1)
    steps = [Steps(n, n * rows, n * 0.010 + n * rows * 0.002) for n, rows in ((5, 64), (3, 40), (7, 12), (2, 1))]
    found = fitted(steps)
    assert found.per_step == pytest.approx(0.010, rel=1e-6)
    assert found.per_row == pytest.approx(0.002, rel=1e-6)
    noisy = [replace(one, seconds=one.seconds * rng.uniform(0.9, 1.1)) for one in steps * 30]
    assert fitted(noisy).seconds(1, 64) == pytest.approx(COST.seconds(1, 64), rel=0.05)


def test_no_cost_is_below_zero() -> None:
    assert fitted([Steps(1, 64, 0.1), Steps(1, 1, 0.2)]).per_row == 0
    assert fitted([Steps(1, 10, 0.1), Steps(1, 20, 0.3)]).per_step == 0


def test_steps_that_were_all_alike_still_say_what_such_a_step_costs() -> None:
    assert fitted([Steps(4, 32, 0.4)]).seconds(10, 80) == pytest.approx(1.0)


@pytest.mark.parametrize("num_records", [1, 5, 8, 40])
def test_the_steps_of_slots_are_those_that_slots_take(num_records: int) -> None:
    """All lengths are known, so the order alone is open: the same caps keep it."""
    rng = random.Random(7)
    lengths = [rng.randrange(1, 60) for _ in range(num_records)]
    found = decoding(lengths)
    drawn = [length.num_tokens for length in found._drawn(num_records, 0)]
    assert sorted(drawn) == sorted(lengths)
    num_steps, num_rows = slots(drawn, 8)
    assert found.seconds(num_records) == pytest.approx(COST.seconds(num_steps, num_rows))


def test_rows_with_long_caps_begin_first() -> None:
    """As in the queue of the slots: the last rows to end are short ones."""
    mixed = Decoding(COST, 2, [Length(4, 4)] * 6 + [Length(100, 100)], in_slots=True)
    for seed in range(5):
        assert mixed.seconds(7, seed) == pytest.approx(COST.seconds(99, 99 + 6 * 3))


def test_a_batch_ends_with_its_longest_answer() -> None:
    found = decoding([5] * 7 + [40], in_slots=False)
    assert found.seconds(8) == pytest.approx(COST.seconds(39, 7 * 4 + 39))
    assert found.seconds(16) == pytest.approx(COST.seconds(78, 2 * (7 * 4 + 39)))


def test_a_long_run_costs_what_full_steps_cost_and_a_short_one_more() -> None:
    """What is wrong with extrapolating the speed of a short run."""
    rng = random.Random(3)
    lengths = [rng.randrange(2, 100) for _ in range(64)]
    found = replace(decoding(lengths, num_rows=64), cost=StepCost(0.05, 0.001))
    long = found.seconds(200_000) / 200_000
    steady = sum(map(found.record_seconds, found.lengths)) / len(lengths)
    assert long == pytest.approx(steady, rel=0.01)
    assert found.seconds(64) / 64 > 1.15 * steady


def test_answers_that_have_no_second_token_take_no_step() -> None:
    assert decoding([1, 1, 1]).seconds(1000) == 0
    assert decoding([]).seconds(1000) == 0


def test_rows_that_are_computed_in_vain_are_paid_for() -> None:
    once, twice = decoding([11]), replace(decoding([11]), waste=2.0)
    assert twice.seconds(8) - once.seconds(8) == pytest.approx(8 * 10 * COST.per_row)


def pace(**changes: float) -> Pace:
    known = {"vision": 0.1, "prefill": 0.2, "other": 0.0, "writing": 0.0, "preparing": 0.0, "input": 0.0}
    return Pace(**(known | changes), records_per_row=2, decoding=None)  # type: ignore[arg-type]


def test_a_worker_takes_the_sum_of_its_phases_and_waits_for_late_input() -> None:
    assert pace().seconds(10) == pytest.approx(3.0)
    late = pace(input=0.5)
    assert late.seconds(10) == pytest.approx(5.0)
    assert late.phases(10)["waiting for input"] == pytest.approx(2.0)
    assert pace(input=0.25).phases(10)["waiting for input"] == 0


def test_every_prompt_and_sample_of_a_row_is_decoded() -> None:
    one = replace(pace(), decoding=decoding([11]))
    assert one.phases(40)["decode"] == pytest.approx(decoding([11]).seconds(80))


def test_a_machine_that_works_evenly_is_told_from_one_that_does_not() -> None:
    even = [Steps(1, 10, 0.03)] * 80
    assert unsteadiness(even, fitted(even)) == pytest.approx(0, abs=1e-9)
    uneven = [Steps(1, 10, 0.03 if place // 20 % 2 else 0.06) for place in range(80)]
    assert unsteadiness(uneven, fitted(uneven)) > 0.2
    assert unsteadiness(even[:2], fitted(even)) == 0
