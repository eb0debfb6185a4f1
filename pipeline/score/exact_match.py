"""exact_match: the answer is one of the references, letter by letter; exact_match_normalized: but for its dress.

Normalization as in SQuAD's official script (Rajpurkar et al. 2016): lower case, no punctuation, no articles, one blank
between words; after NFKC, which that script lacks. Signs and marks within a number stay: else 1.5 would be 15.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pipeline.score.metric import Metric, References

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_DIGIT = re.compile(r"\d")
_IN_NUMBER = re.compile(r"(?<![\w.,])-(?=[\d.])|(?<=\d)[.,](?=\d)|(?<!\w)\.(?=\d)")
_KEPT = {".": "\ue000", ",": "\ue001", "-": "\ue002"}  # private characters, in place of marks that stay
_BACK = str.maketrans({kept: mark for mark, kept in _KEPT.items()})
_ASCII_SYMBOLS = "$+<=>^`|~"  # of string.punctuation, which SQuAD's script drops; Unicode calls them symbols


class _Punctuation(dict[int, int | None]):
    """What str.translate makes of a character: nothing of punctuation. Filled as characters come."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        drops = unicodedata.category(character).startswith("P") or character in _ASCII_SYMBOLS
        self[code] = None if drops else code
        return self[code]


_PUNCTUATION = _Punctuation()


class ExactMatch(Metric):
    name = "exact_match"
    doc = "share of answers that are one of the references; blanks around do not count, case and punctuation do"

    def score(self, response: str, references: References, options: Sequence[str]) -> float:
        answer = canonical(response)
        return float(any(answer == canonical(reference) for reference in references))


class ExactMatchNormalized(Metric):
    name = "exact_match_normalized"
    doc = "the same without case, punctuation and the articles a, an, the"

    def score(self, response: str, references: References, options: Sequence[str]) -> float:
        answer = normalized(response)
        if not answer:  # nothing is left: "?" is not "!"
            return float(any(canonical(response) == canonical(reference) for reference in references))
        return float(any(answer == normalized(reference) for reference in references))


def canonical(text: str) -> str:
    """NFC, so that an accented letter is equal to itself however it was typed, without blanks around."""
    return unicodedata.normalize("NFC", text).strip()


def normalized(text: str) -> str:
    """Lower case, no punctuation but within numbers, no articles, one blank between words."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if _DIGIT.search(text):
        text = _IN_NUMBER.sub(lambda mark: _KEPT[mark[0]], text).translate(_PUNCTUATION).translate(_BACK)
    else:
        text = text.translate(_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())
