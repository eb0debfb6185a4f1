"""choice: letters are read, never guessed."""

from __future__ import annotations

import numpy as np
import pytest
from values import value

from pipeline.score import METRICS, Cases, UnusableCase
from pipeline.score.choice import letter, reference_letter

OPTIONS = ["First option", "Second option", "Third option", "Fourth option"]


@pytest.mark.parametrize(
    ("response", "chosen"),
    [
        ("After analyzing the problem, I believe the answer is (A) because it represents the correct approach.", "A"),
        ("The answer to this question is (B) because of the following reasons...", "B"),
        ("Based on my calculations, the answer is the First option.", "A"),
        ("The solution requires careful consideration of all factors.", None),
        ("The correct answer is (C).", "C"),
        ("Therefore, after careful consideration, my answer is (A).", "A"),
        ("Answer A could be correct if...\nAnswer C is unlikely because...\nMy final answer is (B).", "B"),
        ("After considering all options, the answer is (C).", "C"),
        ("The correct option is (D).", "D"),
        ("The answer depends on several factors...\nI'm not completely sure which option is correct.", None),
    ],
)
def test_the_published_cases_of_mmmu(response: str, chosen: str | None) -> None:
    """llama-verifications, tests of its MMMU grader (test_mmmu_grader_multiple_choice, ..._answer_substring)."""
    assert letter(response, OPTIONS) == chosen


@pytest.mark.parametrize(
    ("response", "chosen"),
    [
        ("B", "B"),
        ("B. Second option", "B"),
        ("The answer is C.\nBECAUSE: of the third", "C"),
        ("LECTURE: the first is a noun. The answer is B", "B"),
        ("FAILED", None),
    ],
)
def test_the_forms_of_scienceqa(response: str, chosen: str | None) -> None:
    """haotian-liu/LLaVA, llava/eval/eval_science_qa.py: a letter, a letter and a point, "The answer is X."; where it
    used to draw a letter at random, nothing is chosen."""
    assert letter(response, OPTIONS) == chosen


@pytest.mark.parametrize(
    ("response", "chosen"),
    [
        (" (b) ", "B"),
        ("[C]", "C"),
        ("**D**", "D"),
        ("d)", "D"),
        ("A: First option", "A"),
        ("second OPTION.", "B"),
        ("Answer: D", "D"),
        ("**Answer:** (C)", "C"),
        ("The answer is option B.", "B"),
        ("I think it must be (C)", "C"),
        ("(A) or (B)", None),
        ("A dog is there", None),
        ("The answer is A dog", None),
        ("The answer is a.", None),
        ("E", None),
        ("The answer is (Z).", None),
        ("The answer is not (B)", None),
        ("The answer is not (B) but (C)", "C"),
        ("The answer is (A) or (B).", None),
        ("The answer is (A). On second thoughts, the answer is (B).", "B"),
        ("The answer is A and C.", None),
        ("(C), I think", "C"),
        ("", None),
        ("(A)" * 3, "A"),
    ],
)
def test_what_is_read(response: str, chosen: str | None) -> None:
    assert letter(response, OPTIONS) == chosen


def test_without_options_every_letter_is_one() -> None:
    assert letter("E", ()) == "E"
    assert letter("First option", ()) is None


@pytest.mark.parametrize(
    ("reference", "options", "chosen"),
    [
        ("B", OPTIONS, "B"),
        ("(b)", OPTIONS, "B"),
        ("Third option", OPTIONS, "C"),
        ("0", OPTIONS, "A"),
        ("3", OPTIONS, "D"),
        ("4", ["4", "8"], "A"),
        ("C", (), "C"),
    ],
)
def test_what_a_reference_means(reference: str, options: list[str], chosen: str) -> None:
    assert reference_letter(reference, options) == chosen


@pytest.mark.parametrize(
    ("reference", "options", "problem"),
    [
        ("E", OPTIONS, "is not one of the options"),
        ("4", OPTIONS, "is not one of the options"),
        ("Paris", (), "is not a letter"),
        ("1", ["1", "2", "3"], "means two options"),
    ],
)
def test_a_reference_that_means_none_or_two_is_refused(reference: str, options: list[str], problem: str) -> None:
    with pytest.raises(UnusableCase, match=problem):
        reference_letter(reference, options)


def test_unparsed_answers_are_wrong_and_counted() -> None:
    metric = METRICS["choice"]
    cases = Cases(["A", "no letter", None, "B"], [["A"], ["A"], ["A"], ["A", "B"]], [OPTIONS] * 4)
    sums = metric.rows(cases).sum(0)
    assert metric.value(sums[None], np.array([4]))[0] == 0.5
    assert metric.counts(sums) == {"num_unparsed": 1}


def test_a_hostile_text_is_read_in_no_time() -> None:
    for text in ("answer " * 20_000, "the answer is " * 20_000, "(" * 200_000, "answer" + " " * 200_000 + "x"):
        assert letter(text, OPTIONS) is None
    assert value("choice", ["option is " + "\n" * 100_000], [["A"]]) == 0
