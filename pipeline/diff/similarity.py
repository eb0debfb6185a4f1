"""How alike two texts are, and which of their words differ.

Similarity is 1 - distance / (length of both), where the distance counts the characters to delete and to insert: Indel,
as rapidfuzz names it. On answers of 300 characters it took 30 microseconds a pair where difflib's ratio, which means
much the same, took 33 milliseconds.

The time grows with the square of the length: a pair of 100,000 characters takes 0.2 s by characters and 0.06 s by
words. So texts of more than 10,000 characters are compared by words and marks, and of more than 50,000 of these the
first 50,000.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import UsageError

_MAX_CHARACTERS = 10_000
_MAX_PIECES = 50_000
_MAX_MARKED_PIECES = 20_000  # 50 MB for the comparison of two texts
# A character of a script without blanks between words, white space, a word with its marks and joiners, or any other
# single character. Joined, they are the text again.
_ALONE = "\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_PIECES = re.compile(rf"[{_ALONE}]|\s+|[^\s!-/:-@\[-`{{-~\u2010-\u2027\u2030-\u205e{_ALONE}]+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text; changed: the other text has not got it there."""

    text: str
    changed: bool


def require_rapidfuzz() -> None:
    """Refuse to begin without the package that compares texts.

    Raises:
        UsageError: naming the extra.
    """
    try:
        import rapidfuzz  # noqa: F401
    except ImportError:
        raise UsageError("vlm-batch diff needs rapidfuzz: pip install 'vlm-batch[diff]'.") from None


def normalized(text: str) -> str:
    """A text without what is mere form: Unicode composition (NFC), case, white space at its ends and of other lengths.

    NFC and not NFKC, which makes x2 of x squared.
    """
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def similarities(a: Sequence[str], b: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """How alike a[n] and b[n] are: 0 = nothing in common, 1 = equal."""
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    found = np.empty(len(a), np.float32)
    long = [n for n, (one, other) in enumerate(zip(a, b, strict=True)) if max(len(one), len(other)) > _MAX_CHARACTERS]
    short = np.setdiff1d(np.arange(len(a)), long, assume_unique=True)
    if len(short):
        found[short] = process.cpdist(
            [a[n] for n in short], [b[n] for n in short], scorer=Indel.normalized_similarity, dtype=np.float32
        )
    for n in long:
        found[n] = Indel.normalized_similarity(_pieces(a[n])[:_MAX_PIECES], _pieces(b[n])[:_MAX_PIECES])
    return found


def spans(a: str, b: str) -> tuple[list[Span], list[Span]]:
    """Both texts in parts, by words: those of a that b has not got, and the other way round, are marked.

    Of texts that differ in more than 20,000 words and marks the parts behind these are left out.
    """
    found: tuple[list[Span], list[Span]] = ([], [])
    steps = [*_steps(_pieces(a), _pieces(b))]
    for number, (*texts, equal) in enumerate(steps):
        # A blank or comma between two changes is no common ground; marked, the change reads as one.
        between = 0 < number < len(steps) - 1 and not any(map(str.isalnum, texts[0]))
        for side, text in zip(found, texts, strict=True):
            if not text:
                continue
            changed = not equal or between
            if side and side[-1].changed == changed:
                text = side.pop().text + text
            side.append(Span(text, changed))
    return found


def _steps(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """What both have, what a alone has, what b alone has ..., in order; whether it is the same in both."""
    from rapidfuzz.distance import Indel

    start = _num_alike(zip(left, right, strict=False))
    end = _num_alike(zip(reversed(left[start:]), reversed(right[start:]), strict=False))
    middle = left[start : len(left) - end], right[start : len(right) - end]
    is_cut = max(map(len, middle)) > _MAX_MARKED_PIECES
    one, other = (side[:_MAX_MARKED_PIECES] for side in middle)
    if start:
        yield "".join(left[:start]), "".join(right[:start]), True
    for step in Indel.opcodes(one, other):
        texts = "".join(one[step.src_start : step.src_end]), "".join(other[step.dest_start : step.dest_end])
        yield *texts, step.tag == "equal"
    if end and not is_cut:
        yield "".join(left[-end:]), "".join(right[-end:]), True


def _num_alike(pairs: Iterable[tuple[str, str]]) -> int:
    """How many come before the first two that differ."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _pieces(text: str) -> list[str]:
    return _PIECES.findall(text)
