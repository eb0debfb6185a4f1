"""docs/faults.md says what the tests say, and no fault of the catalogue is forgotten."""

from __future__ import annotations

from catalogue import NUMBERS, OPEN, trials
from faults_page import PAGE, catalogue_lines, documented_table


def test_every_fault_is_tried_or_said_why_not() -> None:
    tried = {number for trial in trials() for number in trial.numbers}
    assert tried <= set(NUMBERS)
    assert tried.isdisjoint(OPEN), "these are tried after all"
    assert [number for number in NUMBERS if number not in tried and number not in OPEN] == []


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert "\n".join(catalogue_lines()) in text, "write it with 'python tests/torture/faults_page.py'"


def test_the_table_of_the_page_has_no_lost_row() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in documented_table()[2:]]
    assert len(rows) > 10
    for what, num_faults, *bad, _redone, _most in rows:
        assert int(num_faults.replace(",", "")) > 0, what
        assert bad == ["0", "0", "0"], what
