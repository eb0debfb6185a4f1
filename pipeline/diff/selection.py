"""Which records the page shows, where it cannot show all that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.diff.change import Change
from pipeline.diff.comparison import Comparison

Numbers = np.ndarray[Any, np.dtype[np.int64]]

SHOWN = (
    Change.CHANGED,
    Change.ONLY_A_ANSWERED,
    Change.ONLY_B_ANSWERED,
    Change.OTHER_ERROR,
    Change.SAME_NORMALIZED,
    Change.ONLY_IN_A,
    Change.ONLY_IN_B,
)
"""In the order of the page."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Records of one outcome, the least alike first: numbers of pairs, or places of records of one side alone."""

    change: Change
    numbers: Numbers
    num_least_alike: int  # how many were taken for that; the others are drawn at random
    num_all: int

    @property
    def whole(self) -> bool:
        """Whether these are all records with this outcome."""
        return len(self.numbers) == self.num_all


def selections(comparison: Comparison, most: int, seed: int) -> list[Selection]:
    """Records of every outcome but the same, at most so many in all.

    Of changed answers half are the least alike ones and half are drawn from the others at random, since the worst say
    little about the usual. Of other outcomes all are drawn.
    """
    rng = np.random.default_rng(seed)
    found = []
    for change, quota in quotas({change: comparison.num(change) for change in SHOWN}, most).items():
        numbers = _all(comparison, change)
        num_least = 0
        if change is Change.CHANGED:
            numbers = numbers[np.argsort(comparison.similarity[numbers], kind="stable")]
            num_least = quota if quota == len(numbers) else -(-quota // 2)
        drawn = np.sort(rng.choice(len(numbers) - num_least, quota - num_least, replace=False)) + num_least
        chosen = np.concatenate([numbers[:num_least], numbers[drawn]])
        found.append(Selection(change, chosen, num_least, len(numbers)))
    return found


def quotas(counts: Mapping[Change, int], most: int) -> dict[Change, int]:
    """How many of each kind may be shown: all of the rare ones, and of the others the same number."""
    found: dict[Change, int] = {}
    left = most
    rarest_first: Sequence[Change] = sorted((change for change in counts if counts[change]), key=lambda c: counts[c])
    for number, change in enumerate(rarest_first):
        found[change] = min(counts[change], left // (len(rarest_first) - number))
        left -= found[change]
    return {change: found[change] for change in counts if found.get(change)}


def _all(comparison: Comparison, change: Change) -> Numbers:
    if change is Change.ONLY_IN_A:
        return comparison.pairs.only_in_a
    if change is Change.ONLY_IN_B:
        return comparison.pairs.only_in_b
    return np.flatnonzero(comparison.change == change)
