"""rouge_l: the longest common subsequence of words, as F-measure of each record, averaged.

Lin, "ROUGE" (2004), with the values of the package rouge-score without stemmer: words are runs of the letters a to z
and digits, of several references the best one counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.score.extra import rapidfuzz_distance
from pipeline.score.metric import Metric, References

_WORD = re.compile(r"[a-z0-9]+")


class RougeL(Metric):
    name = "rouge_l"
    doc = "ROUGE-L, the mean F-measure of rouge-score"

    def score(self, response: str, references: References, options: Sequence[str]) -> float:
        answer = _words(response)
        return max(_f_measure(answer, _words(reference)) for reference in references)

    def settings(self) -> dict[str, str]:
        return {"tokenizer": "[a-z0-9]+ in lower case", "stemmer": "no"}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _f_measure(answer: list[str], reference: list[str]) -> float:
    common = rapidfuzz_distance().LCSseq.similarity(answer, reference) if answer and reference else 0
    return 2 * common / (len(answer) + len(reference)) if common else 0.0
