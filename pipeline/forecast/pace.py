"""From what an engine took for some rows to what it will take for many.

A short run fills its slots, and drains them, for a large part of its time; a long one hardly ever. So the speed of the
one is not the speed of the other, and is not used. What is measured is what the parts cost:

    a decode step    per_step + per_row * rows in it, in seconds: fitted to all steps that were taken, full or not
    a row            vision and prefill, and what the engine does beside its phases

and the steps of the long run are counted as its slots would take them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_MAX_SIMULATED = 20_000  # records; more are in proportion to the second half of these
_NUM_BLOCKS = 8  # of the decode steps, to see how evenly the machine works
_WINDOW_BATCHES = 8  # as many records are put into order at a time, for each slot or row of a batch


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps between two looks at an engine."""

    num_steps: int
    num_rows: int  # over all of them
    seconds: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a decode step, and of each row in it."""

    per_step: float
    per_row: float

    def seconds(self, num_steps: float, num_rows: float) -> float:
        return self.per_step * num_steps + self.per_row * num_rows


@dataclass(frozen=True, slots=True)
class Length:
    """Tokens of an answer, and how many it might have had."""

    num_tokens: int
    max_new_tokens: int


def fitted(steps: Sequence[Steps]) -> StepCost:
    """The costs that come nearest to what was measured, none below zero. steps: one at least."""
    observed = [one for one in steps if one.num_steps]
    counts = np.array([(one.num_steps, one.num_rows) for one in observed], dtype=float)
    seconds = np.array([one.seconds for one in observed])
    (per_step, per_row), *_ = np.linalg.lstsq(counts, seconds, rcond=None)
    if per_step < 0 or per_row < 0:
        as_steps, as_rows = seconds.sum() / counts[:, 0].sum(), seconds.sum() / counts[:, 1].sum()
        per_step, per_row = (0.0, as_rows) if per_step < 0 else (as_steps, 0.0)
    return StepCost(float(per_step), float(per_row))


def unsteadiness(steps: Sequence[Steps], cost: StepCost) -> float:
    """How unevenly the machine worked: the standard deviation, over blocks of steps, of the time taken over the fitted.

    What lasts longer than a block, and comes and goes, is in the time of a long run as well. 0 of too few to tell.
    """
    observed = [one for one in steps if one.num_steps]
    whole = sum(one.seconds for one in observed)
    ratios: list[float] = []
    taken = expected = 0.0
    for one in observed:
        taken += one.seconds
        expected += cost.seconds(one.num_steps, one.num_rows)
        if taken >= whole / _NUM_BLOCKS:
            ratios.append(taken / expected)
            taken = expected = 0.0
    if len(ratios) < _NUM_BLOCKS // 2:
        return 0.0
    middle = sum(ratios) / len(ratios)
    return math.sqrt(sum((ratio / middle - 1) ** 2 for ratio in ratios) / (len(ratios) - 1))


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an engine decodes.

    Args:
        cost: of its steps.
        num_rows: of a full step: slots, or rows of a batch.
        lengths: of answers, as they come.
        in_slots: whether a row that ends makes room for the next; else a batch ends with its longest answer.
        waste: rows computed, over those that gave a token.
    """

    cost: StepCost
    num_rows: int
    lengths: Sequence[Length]
    in_slots: bool
    waste: float = 1.0

    def seconds(self, num_records: int, seed: int = 0) -> float:
        """Of all decode steps of so many records."""
        if num_records <= _MAX_SIMULATED:
            return self._counted(num_records, seed)
        whole, half = self._counted(_MAX_SIMULATED, seed), self._counted(_MAX_SIMULATED // 2, seed)
        return whole + (num_records - _MAX_SIMULATED) * (whole - half) / (_MAX_SIMULATED - _MAX_SIMULATED // 2)

    def record_seconds(self, length: Length) -> float:
        """What a record adds to a long run."""
        return (length.num_tokens - 1) * (self.cost.per_row * self.waste + self.cost.per_step / self.num_rows)

    def _counted(self, num_records: int, seed: int) -> float:
        records = self._drawn(num_records, seed)
        num_rows = sum(max(0, one.num_tokens - 1) for one in records) * self.waste
        windows = self._windows(records)
        num_steps = _slot_steps(windows, self.num_rows) if self.in_slots else _batch_steps(windows, self.num_rows)
        return self.cost.seconds(num_steps, num_rows)

    def _drawn(self, num_records: int, seed: int) -> list[Length]:
        """The lengths that were seen, each as often as the others, in an order of no meaning."""
        rng = random.Random(seed)
        found: list[Length] = []
        while self.lengths and len(found) < num_records:
            found += rng.sample(list(self.lengths), min(len(self.lengths), num_records - len(found)))
        return found

    def _windows(self, records: Sequence[Length]) -> Iterator[list[Length]]:
        """As the queue of the slots orders them: long caps first, within a window."""
        size = self.num_rows * _WINDOW_BATCHES
        for start in range(0, len(records), size):
            window = list(records[start : start + size])
            yield sorted(window, key=lambda one: -round(2 * math.log2(one.max_new_tokens))) if self.in_slots else window


def _slot_steps(windows: Iterator[list[Length]], num_slots: int) -> int:
    """Steps until the last row has left its slot, where a free slot takes the next row at once."""
    free = [0] * num_slots
    for record in itertools.chain.from_iterable(windows):
        heapq.heapreplace(free, free[0] + record.num_tokens - 1)  # the first token comes with the prompt
    return max(free)


def _batch_steps(windows: Iterator[list[Length]], num_rows: int) -> int:
    return sum(
        max(one.num_tokens - 1 for one in window[start : start + num_rows])
        for window in windows
        for start in range(0, len(window), num_rows)
    )


@dataclass(frozen=True, slots=True)
class Pace:
    """What one worker takes, in seconds.

    Args:
        vision, prefill, other: for each row with all that is asked about it. `other` is what is between the phases.
        writing: for each row, answers on their way to the disk.
        preparing: for each row, what the worker's processes take from the model: their share of a CPU's cores that both
            compute on, 0 beside an accelerator.
        input: for each row, as fast as all of the processes together deliver it.
        records_per_row: prompts and samples.
    """

    vision: float
    prefill: float
    other: float
    writing: float
    preparing: float
    input: float
    records_per_row: int
    decoding: Decoding | None  # None where the engine does not count its steps: they are in `other`

    def phases(self, num_rows: int) -> dict[str, float]:
        """Seconds of each phase for so many rows; what input is late by is `waiting for input`."""
        decode = self.decoding.seconds(num_rows * self.records_per_row) if self.decoding else 0.0
        found = {
            "vision": num_rows * self.vision,
            "prefill": num_rows * self.prefill,
            "decode": decode,
            "writing": num_rows * self.writing,
            "sharing the cores with input": num_rows * self.preparing,
            "other": num_rows * self.other,
        }
        busy = sum(found.values())
        return found | {"waiting for input": max(0.0, num_rows * self.input - busy)}

    def seconds(self, num_rows: int) -> float:
        """For so many rows, once the model is loaded."""
        return sum(self.phases(num_rows).values())
