"""vqa_accuracy: agreement with several people's answers, as the VQA challenge counts it.

Antol et al., "VQA: Visual Question Answering" (2015), and the script of the challenge (GT-Vision-Lab/VQA): an answer is
worth a third for each person who gave it, at most 1, averaged over the sets that leave one person out. With ten people
1, 2, 3, 4 of them are worth 0.3, 0.6, 0.9, 1. Text is normalized only where the people did not all write the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from pipeline.score.metric import Metric, References, UnusableCase

_SHORT = 64  # letters: such answers come again and again, and their normalized text is kept
_FEWEST = 4  # people: with fewer the best answer is not worth 1
_DROPPED = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The script drops a point unless a digit follows, and hands sub() a flag where the count belongs: 32 points.
_POINT = re.compile(r"\.(?!\d)")
_MOST_POINTS = 32
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


def _misspellings() -> Iterator[tuple[str, str]]:
    """Each contraction with one of its apostrophes left out, as the script mends it."""
    for word in _CONTRACTIONS.split():
        for place, letter in enumerate(word):
            if letter == "'":
                yield word[:place] + word[place + 1 :], word


_MENDED = dict(_misspellings()) | {"somebody'd": "somebodyd"}  # the last one as the script has it


class VqaAccuracy(Metric):
    name = "vqa_accuracy"
    doc = "agreement with the answers of ten people, as in VQA, VizWiz, OK-VQA and TextVQA"

    def score(self, response: str, references: References, options: Sequence[str]) -> float:
        num = len(references)
        if num < _FEWEST:
            raise UnusableCase(
                f"vqa_accuracy: expected the answers of several people (a list of {_FEWEST} or more, usually 10), came "
                f"{num}. For one right answer take metric=exact_match_normalized."
            )
        answers = [_plain(reference) for reference in references]
        answer = _plain(response)
        if len(set(answers)) > 1:
            answers = [normalized(text) for text in answers]
            answer = normalized(answer)
        agreeing = answers.count(answer)
        # Leaving out one of those who agree leaves one fewer; leaving out another leaves all.
        return (agreeing * min(1, (agreeing - 1) / 3) + (num - agreeing) * min(1, agreeing / 3)) / num

    def settings(self) -> dict[str, str]:
        return {"normalization": "VQA challenge, where the answers differ"}


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalized(text: str) -> str:
    """Lower case, digits for small numbers, apostrophes where they belong, no articles, hardly any punctuation."""
    return _normalized_once(text) if len(text) <= _SHORT else _normalized(text)


def _normalized(text: str) -> str:
    found = text
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _DROPPED:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_blank or has_comma_in_number else " ")
    found = _POINT.sub("", found, count=_MOST_POINTS)
    words = (_DIGITS.get(word, word) for word in found.lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


_normalized_once = lru_cache(65536)(_normalized)
