"""How many requests a benchmark makes, and how long each answer is: no package is needed but numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, slots=True)
class Workload:
    """How many requests, and how long their answers are: log-normal with this mean and coefficient of variation."""

    num_requests: int
    mean_tokens: float
    cap_tokens: int
    variation: float = 0.6
    num_questions: int = 1  # about each picture, one request each
    num_words: tuple[int, int] = (8, 57)  # of a question, at least and at most

    @property
    def num_pictures(self) -> int:
        return self.num_requests // self.num_questions


WORKLOADS = {
    "captions": Workload(128, 36, 120),
    "long": Workload(64, 100, 256, variation=0.5),
    "short": Workload(128, 16, 64),
    "questions": Workload(128, 16, 64, num_questions=8),
}
QUICK = {name: Workload(16, 6, 12, num_questions=load.num_questions) for name, load in WORKLOADS.items()}


def lengths(load: Workload) -> list[int]:
    """Tokens of each picture's answers: drawn at even quantiles in random order, so that few requests suffice for the
    shape of the distribution, then scaled until the mean is what was asked for."""
    sigma = math.sqrt(math.log(1 + load.variation**2))
    number = load.num_pictures
    places = [NormalDist().inv_cdf((place + 0.5) / number) for place in range(number)]
    mean = load.mean_tokens
    for _ in range(20):  # the cap takes some away
        found = [_length(math.log(mean) - sigma**2 / 2 + sigma * place, load.cap_tokens) for place in places]
        mean *= load.mean_tokens / (sum(found) / number)
    order = np.random.default_rng(1).permutation(number)
    return [found[place] for place in order]


def _length(logarithm: float, cap: int) -> int:
    return max(2, min(cap, round(math.exp(logarithm))))
