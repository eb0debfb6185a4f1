"""Which rows are looked at: one from each of so many equal parts of the source, in an order of no meaning.

A source is often sorted, by date or size or origin, and its first rows are like each other. Whoever stops early has
still seen rows from everywhere.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence


def sampled_rows(ranges: Sequence[tuple[int, int]], num_rows: int, seed: int) -> list[int]:
    """Positions of rows, none twice, always the same for a seed.

    Args:
        ranges: rows to choose from: first, and after the last; in order.
        num_rows: how many; all where there are fewer.
    """
    ends = list(itertools.accumulate(stop - start for start, stop in ranges))
    total = ends[-1] if ends else 0
    number = min(num_rows, total)
    rng = random.Random(seed)
    chosen = []
    for part in range(number):
        place = rng.randrange(total * part // number, total * (part + 1) // number)
        which = bisect.bisect_right(ends, place)
        chosen.append(ranges[which][1] - (ends[which] - place))
    rng.shuffle(chosen)
    return chosen
