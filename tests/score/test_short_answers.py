"""anls, relaxed_accuracy and yes_no."""

from __future__ import annotations

import numpy as np
import pytest
from values import PIX2STRUCT, PIX2STRUCT_REFERENCES, row_scores, value

from pipeline.score import METRICS, Cases, UnusableCase
from pipeline.score.relaxed_accuracy import number
from pipeline.score.yes_no import says_yes


def test_anls_of_the_published_case() -> None:
    assert value("anls", PIX2STRUCT, PIX2STRUCT_REFERENCES) == pytest.approx(0.475)


def test_anls_of_the_published_example() -> None:
    """The best of the references, 0 under a half: 1 - 1/12 for one wrong letter; infographic at half is kept."""
    assert row_scores("anls", ["infographics"], [["something", "infographic"]]) == [pytest.approx(1 - 1 / 12)]
    assert row_scores("anls", ["ab", "ab"], [["ac"], ["cd"]]) == [0.5, 0]


def test_anls_is_without_case_and_blanks_around_and_between() -> None:
    assert row_scores("anls", [" New \n York ", "", None], [["new york"], [""], [""]]) == [1, 1, 0]


def test_relaxed_accuracy_of_the_published_case() -> None:
    assert value("relaxed_accuracy", PIX2STRUCT, PIX2STRUCT_REFERENCES) == 0.625


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234.5%", 12.345),
        ("1,234", 1234),
        ("12,34", None),
        ("-3", -3),
        ("\u22123", -3),
        ("\uff11\uff12\uff05", 0.12),
        (" 7 ", 7),
        (".5", 0.5),
        ("1e3", 1000),
        ("5 %", 0.05),
        ("", None),
        ("%", None),
        ("e5", None),
        ("nan", None),
        ("inf", None),
        ("1_000", None),
        ("5 apples", None),
        ("$5", None),
        ("9" * 5000, None),
    ],
)
def test_what_is_a_number(text: str, expected: float | None) -> None:
    assert number(text) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-100", "100", False),
        ("1234", "1,234", True),
        ("0.0", "0", True),
        ("0.01", "0", False),
        ("12", "12%", False),
        ("1e308", "1", False),
        ("Red ", "red", True),
        ("nan", "NaN", True),
        ("5 apples", "5", False),
    ],
)
def test_relaxed_accuracy(response: str, reference: str, right: bool) -> None:
    assert value("relaxed_accuracy", [response], [[reference]]) == right


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("Yes, there is a dog.", True),
        ("no", False),
        ("**No**.", False),
        ("There is no dog in the image.", False),
        ("There are not any.", False),
        ("Looking at the picture, the answer is: yes", True),
        ("The answer is no. Wait, the answer is yes.", True),
        ("It looks like a dog.", None),
        ("No idea", None),
        ("nothing", None),
        ("Yesterday", None),
        ("", None),
    ],
)
def test_what_says_yes(response: str, said: bool | None) -> None:
    assert says_yes(response) is said


def test_precision_and_recall_of_yes() -> None:
    """The figures of POPE: precision TP / (TP + FP), recall TP / (TP + FN), F1, share of yes."""
    metric = METRICS["yes_no"]
    responses = ["yes", "yes", "yes", "no", "no", "perhaps", None]
    references = [["yes"], ["Yes"], ["no"], ["no"], ["true"], ["1"], ["no"]]
    sums = metric.rows(Cases(responses, references)).sum(0)
    assert metric.value(sums[None], np.array([7]))[0] == pytest.approx(3 / 7)
    parts = {name: float(part[0]) for name, part in metric.parts(sums[None], np.array([7])).items()}
    assert parts == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 4),
        "f1": pytest.approx(4 / 7),
        "yes_share": pytest.approx(3 / 7),
    }
    assert metric.counts(sums) == {"num_unparsed": 1}


@pytest.mark.parametrize("references", [["maybe"], ["yes", "no"]])
def test_a_reference_that_is_neither_is_refused(references: list[str]) -> None:
    with pytest.raises(UnusableCase, match="expected yes or no"):
        value("yes_no", ["yes"], [references])
