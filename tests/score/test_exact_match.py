"""exact_match and exact_match_normalized."""

from __future__ import annotations

import pytest
from values import PIX2STRUCT, PIX2STRUCT_REFERENCES, value


def test_the_published_case_of_pix2struct() -> None:
    assert value("exact_match", PIX2STRUCT, PIX2STRUCT_REFERENCES) == 0.125


def test_the_published_case_of_evaluate() -> None:
    """huggingface/evaluate, metrics/exact_match/README.md: 0.25 of four; without case and punctuation 0.75."""
    references = [["the cat"], ["theater"], ["YELLING"], ["agent007"]]
    responses = ["cat?", "theater", "yelling", "agent"]
    assert value("exact_match", responses, references) == 0.25
    assert value("exact_match_normalized", responses, references) == 0.75


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("  Paris\n", "Paris"),
        ("caf\u00e9", "cafe\u0301"),
        ("", " "),
    ],
)
def test_blanks_around_and_the_way_a_letter_was_typed_do_not_count(response: str, reference: str) -> None:
    assert value("exact_match", [response], [[reference]]) == 1


@pytest.mark.parametrize(
    ("response", "reference"),
    [("paris", "Paris"), ("Paris.", "Paris"), ("\uff21", "A"), ("m\u00b2", "m2"), ("a  b", "a b"), (None, "")],
)
def test_everything_else_does(response: str | None, reference: str) -> None:
    assert value("exact_match", [response], [[reference]]) == 0


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("\uff21\uff22", "ab"),
        ("\u201cYes\u201d", "yes"),
        ("Stra\u00dfe", "STRASSE"),
        ("$5", "5"),
        ("1,234.5.", "1,234.5"),
    ],
)
def test_normalized_the_dress_does_not_count(response: str, reference: str) -> None:
    assert value("exact_match_normalized", [response], [[reference]]) == 1


@pytest.mark.parametrize(("response", "reference"), [("1.5", "15"), ("-5", "5"), (".5", "5"), ("1,5", "15")])
def test_normalized_numbers_stay_what_they_are(response: str, reference: str) -> None:
    assert value("exact_match_normalized", [response], [[reference]]) == 0


def test_one_of_several_references_is_enough() -> None:
    assert value("exact_match", ["b"], [["a", "b"]]) == 1


def test_normalized_what_is_nothing_but_dress_has_to_be_the_same() -> None:
    assert value("exact_match_normalized", ["?", "?", "the"], [["?"], ["!"], ["a"]]) == pytest.approx(1 / 3)
