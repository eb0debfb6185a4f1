"""relaxed_accuracy: numbers may be 5 % off, other text has to be the same but for its case.

Methani et al., "PlotQA" (2020), and Masry et al., "ChartQA" (2022), as pix2struct counts it: 12 % is 0.12. Beyond that
script, blanks around do not count, a number may have commas at its thousands, and 0 is equal to 0.0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pipeline.score.metric import Metric, References

_TOLERANCE = 0.05
_NUMBER = re.compile(r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,300})?(?:\.\d{1,300})?(?:[eE][+-]?\d{1,3})?)\s?(%?)")
_MINUS = str.maketrans({"\u2212": "-"})


class RelaxedAccuracy(Metric):
    name = "relaxed_accuracy"
    doc = "share of right answers, where a number may be 5 % off (ChartQA, PlotQA)"

    def score(self, response: str, references: References, options: Sequence[str]) -> float:
        return float(any(_is_right(response, reference) for reference in references))

    def settings(self) -> dict[str, str]:
        return {"tolerance": str(_TOLERANCE)}


def _is_right(response: str, reference: str) -> bool:
    answer, right = number(response), number(reference)
    if answer is None or right is None:
        return response.strip().lower() == reference.strip().lower()
    return answer == right if right == 0 else abs(answer - right) / abs(right) <= _TOLERANCE


def number(text: str) -> float | None:
    """The number that a text is, as a whole; None where it is none."""
    match = _NUMBER.fullmatch(unicodedata.normalize("NFKC", text.strip()).translate(_MINUS))
    if match is None or not any(letter.isdigit() for letter in match[1]):
        return None
    try:
        value = float(match[1].replace(",", ""))
    except ValueError:  # an exponent without digits before it
        return None
    return value / 100 if match[2] else value
