"""How alike texts are, and which of their words are marked."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diff.marked import Part, marked
from pipeline.diff.similarity import normalized, similarities, spans


def alike(a: str, b: str) -> float:
    return float(similarities([a], [b])[0])


def words(text: str, other: str) -> list[str]:
    """The stretches of a text that are marked."""
    return [span.text for span in spans(text, other)[0] if span.changed]


def test_similarity_is_the_share_of_characters_that_stay() -> None:
    assert alike("abcd", "abcd") == 1
    assert alike("abcd", "wxyz") == 0
    assert alike("abcd", "abxd") == pytest.approx(6 / 8)
    assert alike("", "abc") == 0
    assert alike("lewenstein", "levenshtein") == pytest.approx(
        1 - 3 / 21
    )  # rapidfuzz's documentation: Indel distance 3


def test_each_pair_has_its_own() -> None:
    assert similarities(["a", "b", "c" * 20_000], ["a", "x", "c" * 20_000]) == pytest.approx([1, 0, 1])
    assert similarities([], []).shape == (0,)


def test_long_texts_are_compared_by_words_and_mean_the_same() -> None:
    text = [f"word{number % 977}" for number in range(3000)]
    other = [word if number % 5 else "another" for number, word in enumerate(text)]
    long, short = alike(" ".join(text), " ".join(other)), alike(" ".join(text[:900]), " ".join(other[:900]))
    assert long == pytest.approx(short, abs=0.1)
    assert 0.7 < long < 0.95


def test_a_megabyte_is_compared_in_seconds() -> None:
    began = time.monotonic()
    assert alike("!?" * 500_000, "?!" * 500_000) > 0.9
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("A Cat", "a  cat\n", True),
        ("caf\u00e9", "CAFE\u0301", True),
        ("stra\u00dfe", "STRASSE", True),
        ("x\u00b2", "x2", False),
        ("1.5", "15", False),
        ("a\u00a0cat", "a cat", True),
    ],
)
def test_form_is_white_space_case_and_unicode_composition(a: str, b: str, same: bool) -> None:
    assert (normalized(a) == normalized(b)) is same


def test_words_are_marked_whole() -> None:
    assert words("a man rides a bike", "a woman rides a bike") == ["man"]
    assert words("it costs 3.5 euros", "it costs 3.4 euros") == ["5"]
    assert words("the end", "the end.") == []
    assert [span.text for span in spans("the end", "the end.")[1] if span.changed] == ["."]


def test_what_stands_between_two_changes_is_marked_with_them() -> None:
    assert words("a red, big cat", "a cat") == ["red, big "]
    assert words("one two three", "four five six") == ["one two three"]


def test_scripts_without_blanks_are_marked_by_character() -> None:
    assert words("\u6771\u4eac\u30bf\u30ef\u30fc", "\u6771\u4eac\u30b9\u30ab\u30a4") == ["\u30bf\u30ef\u30fc"]


def test_marks_and_joined_emoji_stay_with_their_letter() -> None:
    assert words("cafe\u0301 noir", "cafe noir") == ["cafe\u0301"]
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert words(f"a {family} here", "a \U0001f468 here") == [family]


texts = st.text(st.sampled_from(list("ab .,\n\u00e9\u0301\u6771\u200d-3")), max_size=40)


@given(texts, texts)
@settings(max_examples=200, deadline=None)
def test_parts_are_the_texts_again_and_unmarked_ones_are_equal(a: str, b: str) -> None:
    left, right = spans(a, b)
    assert "".join(span.text for span in left) == a
    assert "".join(span.text for span in right) == b
    unmarked = ["".join(span.text for span in side if not span.changed) for side in (left, right)]
    assert unmarked[0] == unmarked[1]
    for side in (left, right):
        assert all(one.changed != two.changed for one, two in itertools.pairwise(side))


def shown(parts: list[Part]) -> int:
    return sum(len(part.text) for part in parts)


def left_out(parts: list[Part]) -> int:
    return sum(part.num_left_out for part in parts)


@given(texts, texts, st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_every_character_is_shown_or_counted(a: str, b: str, most: int) -> None:
    for text, parts in zip((a * 60, b * 60), marked(a * 60, b * 60, most * 40), strict=True):
        assert shown(parts) + left_out(parts) == len(text)
        assert shown(parts) <= most * 40


def test_of_long_answers_what_is_equal_is_left_out_and_what_changed_is_shown() -> None:
    same = " ".join(f"word{number}" for number in range(2000))
    a, b = marked(f"{same} cat {same}", f"{same} dog {same}", 6000)
    assert [part.text for part in a if part.changed] == ["cat"]
    assert [part.text for part in b if part.changed] == ["dog"]
    assert shown(a) < 500
    assert left_out(a) == left_out(b) > 30_000


def test_an_answer_of_100_kilobytes_of_marks_is_cut() -> None:
    began = time.monotonic()
    a, _ = marked("!" * 100_000, "?" * 100_000, 2000)
    assert (shown(a), left_out(a)) == (2000, 98_000)
    assert time.monotonic() - began < 30
