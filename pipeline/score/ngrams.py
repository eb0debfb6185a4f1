"""How often each n-gram stands in each text of many records at once, by sorting whole numbers.

A record has an answer (slot 0) and references (slots 1 ...). Each occurrence of an n-gram becomes a number of 64 bits,

    row (10 bits) | hash of the n-gram (48 bits) | slot (6 bits)

whose order brings equal n-grams of a record together: counting is a sort and a comparison with the neighbour, ten to
thirty times as fast as counting in dictionaries. Two n-grams of one record share a hash once in 2**48 pairs.

R: rows, X: texts, T: tokens of all texts, E: entries (a row, an n-gram and a slot), G: groups (a row and an n-gram).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.score.metric import Array, Cases, References, UnusableCase

MOST_ROWS = 1 << 10
MOST_SLOTS = 1 << 6
_HASH_BITS = 48
_SLOT_BITS = 6
_HASH_MASK = np.uint64((1 << _HASH_BITS) - 1)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of no pattern: 2**64 by the golden ratio
_STEP = np.uint64(0xD1B54A32D192ED03)
_LONG = 64  # letters: a longer piece is not kept
_MOST_KNOWN = 1 << 20

Whole = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Counts:
    """The n-grams of one order, sorted by row, n-gram and slot."""

    row_E: Whole
    slot_E: Whole
    ngram_E: NDArray[np.uint64]
    count_E: Array
    group_E: Whole  # the number of the entry's group
    first_G: Whole  # the first entry of each group, which is the answer's where the answer has the n-gram

    @property
    def answer_E(self) -> Array:
        """How often the answer has the n-gram of each entry."""
        first = self.first_G
        return np.where(self.slot_E[first] == 0, self.count_E[first], 0.0)[self.group_E]

    def most_in_references_G(self) -> Array:
        """How often the reference that has it most has the n-gram of each group."""
        if not len(self.first_G):
            return np.empty(0)
        most: Array = np.maximum.reduceat(np.where(self.slot_E > 0, self.count_E, 0.0), self.first_G)
        return most

    def summed_by_text(self, value_E: Array, num_rows: int, num_slots: int) -> Array:
        """Sums [R, slots] of a value of each entry."""
        flat = np.bincount(self.row_E * num_slots + self.slot_E, value_E, num_rows * num_slots)
        return flat.astype(np.float64).reshape(num_rows, num_slots)  # bincount of nothing counts in whole numbers


class Texts:
    """Texts of tokens that are whole numbers, several for each row."""

    def __init__(self, tokens_T: NDArray[np.integer], lengths_X: Whole, num_texts_R: Whole) -> None:
        """All texts one after the other, with their lengths; and how many belong to each row."""
        assert len(num_texts_R) <= MOST_ROWS and num_texts_R.max(initial=0) <= MOST_SLOTS
        self.num_rows = len(num_texts_R)
        self.num_slots = int(num_texts_R.max(initial=1))
        row_X = np.repeat(np.arange(self.num_rows), num_texts_R)
        slot_X = np.arange(len(lengths_X)) - np.repeat(np.cumsum(num_texts_R) - num_texts_R, num_texts_R)
        self.is_there_RK = np.arange(self.num_slots) < num_texts_R[:, None]
        self.lengths_RK = np.zeros((self.num_rows, self.num_slots))
        self.lengths_RK[row_X, slot_X] = lengths_X
        place = (row_X.astype(np.uint64) << np.uint64(_HASH_BITS + _SLOT_BITS)) | slot_X.astype(np.uint64)
        self._place_T = np.repeat(place, lengths_X)
        self._left_T = np.repeat(np.cumsum(lengths_X), lengths_X) - np.arange(len(tokens_T))
        self._words_T = _mixed(tokens_T)

    def counts(self, highest: int) -> Iterator[Counts]:
        """The n-grams of order 1, 2 ... `highest`."""
        rolling = self._words_T
        for order in range(1, highest + 1):
            if order > 1:
                rolling = rolling[:-1] * _STEP + self._words_T[order - 1 :]
            whole = self._left_T[: len(rolling)] >= order  # all of it in one text
            hashes = (rolling[whole] * _FACTOR) >> np.uint64(64 - _HASH_BITS)
            keys = self._place_T[: len(rolling)][whole] | (hashes << np.uint64(_SLOT_BITS))
            keys.sort()
            yield _counted(keys)

    def totals(self, order: int) -> Array:
        """How many n-grams [R, slots] each text has."""
        return np.maximum(self.lengths_RK - (order - 1), 0.0)


def _counted(keys: NDArray[np.uint64]) -> Counts:
    start_E = _starts(keys)
    entries = keys[start_E]
    pairs = entries >> np.uint64(_SLOT_BITS)
    first_G = _starts(pairs)
    return Counts(
        row_E=(entries >> np.uint64(_HASH_BITS + _SLOT_BITS)).astype(np.intp),
        slot_E=(entries & np.uint64(MOST_SLOTS - 1)).astype(np.intp),
        ngram_E=pairs & _HASH_MASK,
        count_E=np.diff(start_E, append=len(keys)).astype(np.float64),
        group_E=np.repeat(np.arange(len(first_G)), np.diff(first_G, append=len(entries))),
        first_G=first_G,
    )


def _starts(ordered: NDArray[np.uint64]) -> Whole:
    """Where a value differs from the one before it."""
    if not len(ordered):
        return np.empty(0, np.intp)
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _mixed(tokens_T: NDArray[np.integer]) -> NDArray[np.uint64]:
    mixed = (tokens_T.astype(np.uint64) + np.uint64(1)) * _FACTOR
    mixed ^= mixed >> np.uint64(31)
    return mixed * _STEP


class Vocabulary:
    """Words as whole numbers: the same word is the same number for as long as this lives.

    tokens: of one piece of text between blanks. What it made of a piece is kept, as most come again and again: with the
    tokenizers of bleu and cider this takes a fifth of the time.
    """

    def __init__(self, tokens: Callable[[str], list[str]]) -> None:
        self._tokens = tokens
        self._numbers: dict[str, int] = {}
        self._known: dict[str, list[int]] = {}

    def texts(self, rows: Sequence[Sequence[str]]) -> Texts:
        """Texts of words, those of a row together."""
        tokens: list[int] = []
        lengths: list[int] = []
        known = self._known
        for texts in rows:
            for text in texts:
                before = len(tokens)
                for piece in text.split():
                    found = known.get(piece)
                    tokens += self._made(piece) if found is None else found
                lengths.append(len(tokens) - before)
        return Texts(np.array(tokens, np.int64), np.array(lengths, np.intp), _sizes(rows))

    def _made(self, piece: str) -> list[int]:
        numbers = self._numbers
        made = [numbers.setdefault(word, len(numbers)) for word in self._tokens(piece)]
        if len(piece) <= _LONG:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[piece] = made
        return made


def texts_of_letters(rows: Sequence[Sequence[str]]) -> Texts:
    """Texts of characters, those of a row together."""
    code_points = "".join(text for texts in rows for text in texts).encode("utf-32-le", "surrogatepass")
    lengths = np.array([len(text) for texts in rows for text in texts], np.intp)
    return Texts(np.frombuffer(code_points, "<u4"), lengths, _sizes(rows))


def parts_of(cases: Cases) -> Iterator[tuple[list[str], list[References]]]:
    """Answers, without one the empty text, and references of as many records as are counted at once.

    Raises:
        UnusableCase: a record has more references than there are slots.
    """
    for position, references in enumerate(cases.references):
        if len(references) >= MOST_SLOTS:
            raise UnusableCase(
                f"expected at most {MOST_SLOTS - 1} references for a record, came {len(references)}.", position
            )
    for start in range(0, len(cases), MOST_ROWS):
        responses = [response or "" for response in cases.responses[start : start + MOST_ROWS]]
        yield responses, list(cases.references[start : start + MOST_ROWS])


def with_text(references: References) -> References:
    """The references that have some text, as sacrebleu takes them; one without where none has."""
    return [text for text in references if text] or [""]


def _sizes(rows: Sequence[Sequence[object]]) -> Whole:
    return np.array([len(texts) for texts in rows], np.intp)
