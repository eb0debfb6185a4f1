"""bleu: n-grams of words in common, over all records together.

Papineni et al., "BLEU" (2002), as sacrebleu (Post 2018) computes it by default: tokenizer 13a, case kept, orders 1 to
4, exponential smoothing. The value of a single record leaves out orders that it is too short for (effective order).
"""

from __future__ import annotations

import numpy as np

from pipeline.score.extra import forget_tokenized, tokenizer_13a
from pipeline.score.metric import Array, Cases, Metric
from pipeline.score.ngrams import Texts, Vocabulary, parts_of, with_text

_ORDERS = 4
_ANSWER_LENGTH, _REFERENCE_LENGTH = 0, 1
_CORRECT = slice(2, 2 + _ORDERS)
_TOTAL = slice(2 + _ORDERS, 2 + 2 * _ORDERS)


class Bleu(Metric):
    name = "bleu"
    doc = "corpus BLEU of sacrebleu, 0 to 100"
    best = 100.0
    is_mean = False

    def rows(self, cases: Cases) -> Array:
        tokenizer = tokenizer_13a()
        # It joins words that are divided at a line's end; else it looks at no more than what stands between blanks.
        vocabulary = Vocabulary(lambda piece: tokenizer(piece).split())
        parts = [np.empty((0, 2 + 2 * _ORDERS))]
        for responses, references in parts_of(cases):
            rows = zip(responses, map(with_text, references), strict=True)
            whole = [[text.rstrip().replace("-\n", "") for text in (answer, *right)] for answer, right in rows]
            parts.append(_statistics(vocabulary.texts(whole)))
            forget_tokenized()
        return np.concatenate(parts)

    def value(self, sums_BS: Array, num_rows_B: Array) -> Array:
        return _bleu(sums_BS, effective_order=False)

    def row_scores(self, statistics_NS: Array) -> Array:
        return _bleu(statistics_NS, effective_order=True)

    def settings(self) -> dict[str, str]:
        return {"signature": f"case:mixed|eff:no|tok:{tokenizer_13a().signature()}|smooth:exp"}


def _statistics(texts: Texts) -> Array:
    found = np.zeros((texts.num_rows, 2 + 2 * _ORDERS))
    answer = texts.lengths_RK[:, 0]
    found[:, _ANSWER_LENGTH] = answer
    # The reference whose length is nearest, of two the shorter one.
    lengths = np.where(texts.is_there_RK[:, 1:], texts.lengths_RK[:, 1:], np.inf)
    nearest = np.lexsort((lengths, np.abs(lengths - answer[:, None])), axis=1)[:, :1]
    found[:, _REFERENCE_LENGTH] = np.take_along_axis(lengths, nearest, 1)[:, 0]
    for order, counts in enumerate(texts.counts(_ORDERS), start=1):
        clipped = np.minimum(counts.answer_E[counts.first_G], counts.most_in_references_G())
        found[:, 1 + order] = np.bincount(counts.row_E[counts.first_G], clipped, texts.num_rows)
        found[:, 1 + _ORDERS + order] = texts.totals(order)[:, 0]
    return found


def _bleu(sums_BS: Array, *, effective_order: bool) -> Array:
    answer, reference = sums_BS[..., _ANSWER_LENGTH], sums_BS[..., _REFERENCE_LENGTH]
    correct, total = sums_BS[..., _CORRECT], sums_BS[..., _TOTAL]
    # The k-th order without a match counts as a match of 1/2**k.
    missed = (correct == 0) & (total > 0)
    credit = np.where(missed, 0.5 ** np.cumsum(missed, -1), correct)
    logs = np.log(np.divide(credit, total, out=np.full(total.shape, 1e-300), where=total > 0))
    counted = total > 0 if effective_order else np.ones_like(total, bool)
    mean = np.sum(np.where(counted, logs, 0.0), -1) / np.maximum(counted.sum(-1), 1)
    brevity = np.exp(np.minimum(0.0, 1 - reference / np.maximum(answer, 1e-300)))
    return np.where(correct.any(-1), 100 * brevity * np.exp(mean), 0.0)
