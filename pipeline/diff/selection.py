"""Which records the page shows, where it cannot show all that changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.diff.change import Change
from pipeline.diff.comparison import Comparison
from pipeline.diff.scores import Scores

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Kind:
    """Records with the same outcome: numbers of pairs, or places of records of one side alone."""

    name: str
    title: str
    change: Change
    numbers: Numbers

    @property
    def is_alone(self) -> bool:
        """Whether they are records of one side alone."""
        return self.change in (Change.ONLY_IN_A, Change.ONLY_IN_B)


@dataclass(frozen=True, slots=True)
class Selection:
    """Those of a kind that are shown, the least alike first."""

    kind: Kind
    numbers: Numbers
    num_least_alike: int  # how many were taken for that; the others are drawn at random


def kinds(comparison: Comparison, scores: Scores | None) -> list[Kind]:
    """What there is to show, in the order of the page: everything but the same. With scores, changed answers are
    parted into better and worse ones by the first metric."""
    changed = np.flatnonzero(comparison.change == Change.CHANGED)
    parts = [("changed", "Changed", changed)]
    if scores is not None:
        known, of_a, of_b = scores.by_record()
        better, worse = np.isin(changed, known[of_b > of_a]), np.isin(changed, known[of_b < of_a])
        parts = [
            ("worse", "Worse in b", changed[worse]),
            ("better", "Better in b", changed[better]),
            ("changed", "Changed, same score", changed[~better & ~worse]),
        ]
    found = [Kind(name, title, Change.CHANGED, numbers) for name, title, numbers in parts]
    for change, title in (
        (Change.ONLY_A_ANSWERED, "Answered in a alone"),
        (Change.ONLY_B_ANSWERED, "Answered in b alone"),
        (Change.OTHER_ERROR, "Other errors"),
        (Change.SAME_NORMALIZED, "White space, case"),
    ):
        found.append(Kind(change.word, title, change, np.flatnonzero(comparison.change == change)))
    found.append(Kind("only_in_a", "Only in a", Change.ONLY_IN_A, comparison.pairs.only_in_a))
    found.append(Kind("only_in_b", "Only in b", Change.ONLY_IN_B, comparison.pairs.only_in_b))
    return [kind for kind in found if len(kind.numbers)]


def selections(comparison: Comparison, scores: Scores | None, most: int, seed: int) -> list[Selection]:
    """Records of every kind, at most so many in all.

    Of changed answers half are the least alike ones and half are drawn from the others at random, since the worst say
    little about the usual. Of other outcomes all are drawn.
    """
    rng = np.random.default_rng(seed)
    found = []
    there = kinds(comparison, scores)
    shares = quotas({kind.name: len(kind.numbers) for kind in there}, most)
    for kind in there:
        numbers, quota, num_least = kind.numbers, shares[kind.name], 0
        if kind.change is Change.CHANGED:
            numbers = numbers[np.argsort(comparison.similarity[numbers], kind="stable")]
            num_least = quota if quota == len(numbers) else -(-quota // 2)
        drawn = np.sort(rng.choice(len(numbers) - num_least, quota - num_least, replace=False)) + num_least
        found.append(Selection(kind, np.concatenate([numbers[:num_least], numbers[drawn]]), num_least))
    return [selection for selection in found if len(selection.numbers)]


def quotas(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """How many of each kind may be shown: all of the rare ones, and of the others the same number."""
    found: dict[str, int] = {}
    left = most
    rarest_first = sorted(counts, key=lambda name: counts[name])
    for number, name in enumerate(rarest_first):
        found[name] = min(counts[name], left // (len(rarest_first) - number))
        left -= found[name]
    return found
