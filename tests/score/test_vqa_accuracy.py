"""vqa_accuracy: as the VQA challenge counts it."""

from __future__ import annotations

import pytest
from values import value

from pipeline.score import UnusableCase
from pipeline.score.vqa_accuracy import normalized


@pytest.mark.parametrize(("agreeing", "worth"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_the_published_worth_of_agreement(agreeing: int, worth: float) -> None:
    """visualqa.org/evaluation.html: the mean over the ten sets of nine people; not min(n / 3, 1)."""
    answers = ["blue"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert value("vqa_accuracy", ["blue"], [answers]) == pytest.approx(worth)


def test_text_is_normalized_only_where_people_did_not_all_write_the_same() -> None:
    """As in vqaEval.py of GT-Vision-Lab/VQA."""
    assert value("vqa_accuracy", ["Two."], [["two"] * 10]) == 0
    assert value("vqa_accuracy", ["Two."], [["two"] * 9 + ["2"]]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("a  man, and an apple", "man and apple"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("black/white", "black white"),
        ("black / white", "black  white".replace("  ", " ")),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("what? no", "what no"),
        ("a", ""),
        ("caf\u00e9", "caf\u00e9"),
        ("." * 40, "." * 8),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    """Values of processPunctuation and processDigitArticle in vqaEval.py, run on these texts; the script drops at most
    32 points."""
    assert normalized(text) == expected


def test_no_answer_is_worth_nothing() -> None:
    assert value("vqa_accuracy", [None, ""], [[""] * 10, [""] * 10]) == 0.5


def test_fewer_than_four_people_are_refused() -> None:
    with pytest.raises(UnusableCase, match=r"a list of 4 or more, usually 10\), came 3.*exact_match_normalized"):
        value("vqa_accuracy", ["yes"], [["yes"] * 3])
