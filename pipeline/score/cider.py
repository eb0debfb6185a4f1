"""cider: n-grams of words in common with several people's captions, rare ones counting more.

CIDEr-D, Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (2015), as coco-caption computes it:
the mean over the orders 1 to 4 of the cosine of tf-idf vectors, the answer's weights clipped at the reference's, times
exp(-(difference in length)**2 / 72), averaged over the references, times 10. How rare an n-gram is comes from the
references of the rows that are scored: a few dozen rows give no figure that could be compared with another's.

R: rows, K: slots, E: entries, as in ngrams.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.score.caption_words import caption_words
from pipeline.score.metric import Array, Cases, Metric, References
from pipeline.score.ngrams import MOST_ROWS, MOST_SLOTS, Counts, Texts, Vocabulary, parts_of

_ORDERS = 4
_VARIANCE = 6.0**2
_MOST_UNMERGED = 1 << 22  # n-grams, 8 bytes each


class Cider(Metric):
    name = "cider"
    doc = "CIDEr-D of captions, 0 to 10"
    best = 10.0
    learns = True

    def learned(self, references: Iterable[References]) -> Metric:
        return _LearnedCider(references)

    def rows(self, cases: Cases) -> Array:
        raise ValueError("cider learns from the references first: METRICS['cider'].learned(references)")

    def settings(self) -> dict[str, str]:
        return {"variant": "CIDEr-D", "tokenizer": "Penn Treebank's rules, without Java", "idf": "of these references"}


class _LearnedCider(Cider):
    """With the number of rows whose references have each n-gram."""

    def __init__(self, references: Iterable[References]) -> None:
        self._vocabulary = Vocabulary(caption_words)
        self._frequencies = [_Frequencies() for _ in range(_ORDERS)]
        self._num_rows = 0
        pending = iter(references)
        while rows := list(itertools.islice(pending, MOST_ROWS)):
            self._num_rows += len(rows)
            texts = self._vocabulary.texts([row[: MOST_SLOTS - 1] for row in rows])
            for frequencies, counts in zip(self._frequencies, texts.counts(_ORDERS), strict=True):
                frequencies.add(counts.ngram_E[counts.first_G])

    def rows(self, cases: Cases) -> Array:
        parts = [np.empty(0)]
        for responses, references in parts_of(cases):
            rows = zip(responses, references, strict=True)
            parts.append(self._scores(self._vocabulary.texts([[answer, *right] for answer, right in rows])))
        return np.concatenate(parts)[:, None]

    def _scores(self, texts: Texts) -> Array:
        num_words = texts.lengths_RK
        shape = (texts.num_rows, texts.num_slots)
        similarity_RK = np.zeros(shape)
        for counts, frequencies in zip(texts.counts(_ORDERS), self._frequencies, strict=True):
            similarity_RK += self._cosine(counts, frequencies.of(counts.ngram_E), shape)
        similarity_RK *= np.exp(-((num_words[:, :1] - num_words) ** 2) / (2 * _VARIANCE))
        is_reference = texts.is_there_RK[:, 1:]
        means: Array = (similarity_RK[:, 1:] * is_reference).sum(1) / is_reference.sum(1)
        return means * (self.best / _ORDERS)

    def _cosine(self, counts: Counts, frequency_E: Array, shape: tuple[int, int]) -> Array:
        """Of the answer's vector with each reference's [R, K]."""
        rarity_E = np.log(max(self._num_rows, 1)) - np.log(np.maximum(frequency_E, 1.0))
        weight_E, answer_E = counts.count_E * rarity_E, counts.answer_E * rarity_E
        common = counts.summed_by_text(np.minimum(weight_E, answer_E) * weight_E, *shape)
        norms = np.sqrt(counts.summed_by_text(weight_E**2, *shape))
        below = norms[:, :1] * norms
        cosine: Array = np.divide(common, below, out=np.zeros(shape), where=below > 0)
        return cosine


class _Frequencies:
    """In how many rows each n-gram occurs."""

    def __init__(self) -> None:
        self._ngrams = np.empty(0, np.uint64)
        self._numbers: Array = np.empty(0)
        self._unmerged: list[NDArray[np.uint64]] = []
        self._num_unmerged = 0

    def add(self, ngrams: NDArray[np.uint64]) -> None:
        """The n-grams of some rows, once for each row that has them."""
        self._unmerged.append(ngrams)
        self._num_unmerged += len(ngrams)
        if self._num_unmerged > _MOST_UNMERGED:
            self._merge()

    def of(self, ngrams: NDArray[np.uint64]) -> Array:
        """How many rows have each of these."""
        self._merge()
        if not len(self._ngrams):
            return np.zeros(len(ngrams))
        places = np.minimum(np.searchsorted(self._ngrams, ngrams), len(self._ngrams) - 1)
        return np.where(self._ngrams[places] == ngrams, self._numbers[places], 0.0)

    def _merge(self) -> None:
        if not self._unmerged:
            return
        new, counts = np.unique(np.concatenate(self._unmerged), return_counts=True)
        self._unmerged, self._num_unmerged = [], 0
        together, places = np.unique(np.concatenate([self._ngrams, new]), return_inverse=True)
        numbers = np.bincount(places, np.concatenate([self._numbers, counts]), len(together))
        self._numbers = numbers.astype(np.float64)
        self._ngrams = together
