"""choice: the letter of a multiple-choice answer.

A letter is read where the answer says one, never guessed: the whole answer, its beginning, what follows "the answer
is", the only letter in brackets, or the wording of one of the options. What says none, or several, is unparsed: wrong,
and counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pipeline.score.exact_match import normalized
from pipeline.score.metric import Array, Cases, Metric, UnusableCase

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALONE = re.compile(r"[\s(\[{*_\"'`]*([A-Za-z])[\s)\]}*_\"'`.,:;!]*")
# "(A) or (B)", "A and C" choose nothing; "(A), I think" does.
_NO_OTHER = r"(?!\W{0,3}(?:[,/&]|or\b|and\b)\s*(?:[(\[][A-Za-z][)\]]|(?-i:[A-HJ-Z])(?![A-Za-z])))"
_FIRST = re.compile(r"[\s*_\"'`]*(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[.):](?=[\s*_]))" + _NO_OTHER)
# "The answer to this question is (B)", "Answer: C", "the correct option is D." Not "the answer is A dog".
_SAID = re.compile(
    r"\b(?:answer|option|choice)s?\b[^.:\n]{0,80}?(?:\bis|\bbe|:)[\s*_\"'`]*(?:(?:the\s+)?(?:option|choice|letter)\s+)?"
    r"(?:[(\[]([A-Za-z])[)\]]|[*_\"'`]*([A-Z])(?=[\s*_\"'`]*(?:[.,;:!)\n]|$|because\b|since\b|as\b)))" + _NO_OTHER,
    re.IGNORECASE,
)
_SAID_IN_WORDS = re.compile(
    r"\b(?:answer|option|choice)s?\b[^.:\n]{0,80}?(?:\bis\b|\bbe\b|:)([^\n]{1,400})", re.IGNORECASE
)
_IN_BRACKETS = re.compile(r"(?<!not )\(([A-Z])\)")
_SENTENCE_END = re.compile(r"[.;!](?:\s|$)|\n")


class Choice(Metric):
    name = "choice"
    doc = "share of multiple-choice answers with the right letter; what names no letter, or several, is wrong"

    def rows(self, cases: Cases) -> Array:
        found = np.zeros((len(cases), 2))
        for position, (response, references, options) in enumerate(cases):
            try:
                right = {reference_letter(reference, options) for reference in references}
            except UnusableCase as problem:
                problem.position = position
                raise
            if response is None:
                continue
            said = letter(response, options)
            found[position] = (said in right, said is None)
        return found

    def counts(self, sums_S: Array) -> dict[str, int]:
        return {"num_unparsed": int(sums_S[1])}


def letter(response: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chose; None where it chose none or several."""
    letters = _LETTERS[: len(options)] if options else _LETTERS
    if match := _ALONE.fullmatch(response):
        return _valid(match[1], letters)
    if (match := _FIRST.match(response)) and (found := _valid(match[1] or match[2], letters)):
        return found
    by_wording = [place for place, option in enumerate(options) if normalized(option) == normalized(response[:4000])]
    if len(by_wording) == 1:
        return letters[by_wording[0]]
    if said := [found for match in _SAID.finditer(response) if (found := _said(match, letters))]:
        return said[-1]  # an answer that weighs the options names the one it takes last
    if (in_words := _said_in_words(response, options)) is not None:
        return letters[in_words]
    bracketed = {match for match in _IN_BRACKETS.findall(response) if match in letters}
    return bracketed.pop() if len(bracketed) == 1 else None


def reference_letter(reference: str, options: Sequence[str]) -> str:
    """The letter that a reference means: itself, the wording of an option, or an option's position from 0.

    Raises:
        UnusableCase: it means none, or not one alone.
    """
    text = reference.strip()
    letters = _LETTERS[: len(options)] if options else _LETTERS
    if (match := _ALONE.fullmatch(text)) and match[1].upper() in letters:
        return match[1].upper()
    found = {place for place, option in enumerate(options) if option.strip() == text}
    if text.isdecimal() and int(text) < len(options):
        found.add(int(text))
    if len(found) == 1:
        return letters[found.pop()]
    told = f"one of the options {list(options)}" if options else "a letter (for other references give options_column=)"
    problem = "means two options: one by its wording, one by its position from 0" if found else f"is not {told}"
    raise UnusableCase(f"choice: the reference {reference!r} {problem}.")


def _said(match: re.Match[str], letters: str) -> str | None:
    bare = match[2]
    if bare is not None and not bare.isupper():  # IGNORECASE is for the words; "the answer is a." names nothing
        return None
    return _valid(match[1] or bare, letters)


def _said_in_words(response: str, options: Sequence[str]) -> int | None:
    """Position of the option that follows the last "the answer is"."""
    said = _SAID_IN_WORDS.findall(response)
    if not said or not options:
        return None
    words = normalized(_SENTENCE_END.split(said[-1] + "\n", maxsplit=1)[0])
    found = [place for place, option in enumerate(options) if normalized(option) == words]
    return found[0] if len(found) == 1 else None


def _valid(found: str, letters: str) -> str | None:
    return found.upper() if found.upper() in letters else None
