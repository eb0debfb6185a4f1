"""chrf: n-grams of characters in common, over all records together; for any language, and robust to inflection.

Popovic, "chrF" (2015), as sacrebleu computes it by default: orders 1 to 6, beta 2, blanks left out, of several
references the best one of each record.
"""

from __future__ import annotations

import numpy as np

from pipeline.score.metric import Array, Cases, Metric
from pipeline.score.ngrams import Texts, parts_of, texts_of_letters, with_text

_ORDERS = 6
_BETA_SQUARED = 4.0
_ANSWER, _REFERENCE, _MATCHES = range(3)


class Chrf(Metric):
    name = "chrf"
    doc = "corpus chrF of sacrebleu, 0 to 100"
    best = 100.0
    is_mean = False

    def rows(self, cases: Cases) -> Array:
        parts = [np.empty((0, 3 * _ORDERS))]
        for responses, references in parts_of(cases):
            rows = zip(responses, map(with_text, references), strict=True)
            texts = [["".join(text.split()) for text in (answer, *right)] for answer, right in rows]
            parts.append(_statistics(texts_of_letters(texts)))
        return np.concatenate(parts)

    def value(self, sums_BS: Array, num_rows_B: Array) -> Array:
        return _chrf(sums_BS)

    def settings(self) -> dict[str, str]:
        return {"signature": "case:mixed|eff:yes|nc:6|nw:0|space:no"}


def _statistics(texts: Texts) -> Array:
    num_references = texts.num_slots - 1
    found = np.zeros((texts.num_rows, num_references, _ORDERS, 3))
    for order, counts in enumerate(texts.counts(_ORDERS)):
        totals = texts.totals(order + 1)
        matches = counts.summed_by_text(np.minimum(counts.count_E, counts.answer_E), texts.num_rows, texts.num_slots)
        found[:, :, order, _REFERENCE] = totals[:, 1:]
        found[:, :, order, _ANSWER] = np.where(totals[:, 1:] > 0, totals[:, :1], 0.0)
        found[:, :, order, _MATCHES] = matches[:, 1:]
    flat = found.reshape(texts.num_rows, num_references, 3 * _ORDERS)
    best = np.where(texts.is_there_RK[:, 1:], _chrf(flat), -1.0).argmax(1)
    of_best: Array = flat[np.arange(texts.num_rows), best]
    return of_best


def _chrf(sums_BS: Array) -> Array:
    sums = sums_BS.reshape(*sums_BS.shape[:-1], _ORDERS, 3)
    answer, reference, matches = sums[..., _ANSWER], sums[..., _REFERENCE], sums[..., _MATCHES]
    counted = (answer > 0) & (reference > 0)
    num = np.maximum(counted.sum(-1), 1)
    precision = np.divide(matches, answer, out=np.zeros(answer.shape), where=counted).sum(-1) / num
    recall = np.divide(matches, reference, out=np.zeros(answer.shape), where=counted).sum(-1) / num
    below = _BETA_SQUARED * precision + recall
    above = 100 * (1 + _BETA_SQUARED) * precision * recall
    score: Array = np.divide(above, below, out=np.zeros(below.shape), where=below > 0)
    return score
