"""Words of captions, after the Penn Treebank's rules as coco-caption applies them, without its Java.

In lower case; contractions in two (do n't, it 's); numbers whole; signs such as % by themselves; punctuation left out.
The Java tokenizer has hundreds of further rules (abbreviations, fractions, addresses): on texts with such things scores
differ in the last digits.
"""

from __future__ import annotations

import re

_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'"})
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)")
_CANNOT = re.compile(r"\b(can)(not)\b")
_WORD = re.compile(
    r"n't(?!\w)|'(?:s|m|d|ll|re|ve)(?!\w)"
    r"|(?>\d+(?:[.,:/]\d+)*)(?![^\W\d])"  # 3.5  1,000  10:30  1/2, not 10th
    r"|(?:\w\.){2,}"  # u.s.
    r"|[^\W_]+(?:[-'./&@_][^\W_]+)*"  # well-known, o'clock
    r"|[^\s\w.,;:!?'\"`()\[\]{}\u2010-\u2015\u201c\u201d\u2026-]"  # % $ & # ...
)


def caption_words(text: str) -> list[str]:
    """The words that captions are compared by."""
    text = _CANNOT.sub(r"\1 \2", text.lower().translate(_QUOTES))
    return _WORD.findall(_CONTRACTION.sub(r" \1 ", text))
