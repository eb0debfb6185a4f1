"""Counting n-grams by sorting: what counting in dictionaries gives."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.score.ngrams import Vocabulary, texts_of_letters

TEXTS = st.lists(st.lists(st.text("ab \u4e2d", max_size=9), min_size=1, max_size=5), max_size=6)


def dictionary(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_counts_are_those_of_dictionaries(rows: list[list[str]]) -> None:
    texts = texts_of_letters(rows)
    for order, counts in enumerate(texts.counts(4), start=1):
        found = [[0.0] * texts.num_slots for _ in rows]
        for row, slot, count in zip(counts.row_E, counts.slot_E, counts.count_E, strict=True):
            found[row][slot] += count
        shared = counts.summed_by_text(
            (counts.answer_E > 0) * (counts.slot_E > 0) * counts.count_E, texts.num_rows, texts.num_slots
        )
        most = dict.fromkeys(range(len(rows)), 0.0)
        for group, number in zip(counts.first_G, counts.most_in_references_G(), strict=True):
            most[int(counts.row_E[group])] += number
        for row, (answer, *references) in enumerate(rows):
            mine = dictionary(answer, order)
            for slot, text in enumerate(rows[row]):
                theirs = dictionary(text, order)
                assert found[row][slot] == theirs.total() == texts.totals(order)[row, slot]
                if slot:
                    assert shared[row, slot] == sum(count for ngram, count in theirs.items() if ngram in mine)
            either: Counter[str] = Counter()
            for text in references:
                either |= dictionary(text, order)
            assert most[row] == either.total()


def test_the_same_word_is_the_same_number_in_later_texts() -> None:
    vocabulary = Vocabulary(lambda piece: piece.lower().split("-"))
    first, second = (next(iter(vocabulary.texts([[text]]).counts(1))) for text in ("bus-red", "Red  bus"))
    assert set(first.ngram_E) == set(second.ngram_E)
    assert len(set(first.ngram_E)) == 2
