"""docs/faults.md: which fault is tried by which test, and what came of the last `make torture`.

`python tests/torture/faults_page.py` writes the list of faults anew and leaves the table as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from catalogue import NUMBERS, OPEN, trials
from faultbox import Found

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
TRIED: dict[str, list[Found]] = {}
_HEAD = """# Faults

What is done to a run on purpose, and what came of it. The page is written by the tests: the table by `make torture`,
the list below it from the first lines of the tests.

## What was tried

A fault is a kill, a crash at a named point or byte, a race, a damaged file. Lost, doubled and wrong are rows of the
output, compared with answers that are known without a run. Rows generated twice are the cost: those that were in flight
or not yet synced when the process was killed.

"""
_MIDDLE = """
## Every fault, and the tests that try it

"""


def table_lines() -> Iterator[str]:
    """What was tried by these tests, as a table of Markdown."""
    yield "| tried | faults | rows lost | rows doubled | wrong answers | generated twice | at most by one start |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, found in TRIED.items():
        sums = [
            sum(getattr(one, field) for one in found)
            for field in ("num_faults", "num_lost", "num_doubled", "num_wrong", "num_redone")
        ]
        most = max(one.most_redone for one in found)
        yield f"| {name} | " + " | ".join(f"{number:,}" for number in (*sums, most)) + " |"


def catalogue_lines() -> Iterator[str]:
    """Each number with its tests, or with the reason why there is none."""
    yield "| fault | what holds | test |"
    yield "| --- | --- | --- |"
    found = list(trials())
    for number in NUMBERS:
        if number in OPEN:
            yield f"| {number} | *not tried*: {OPEN[number]} | |"
        for trial in found:
            if number in trial.numbers:
                yield f"| {number} | {trial.what} | `{trial.place}` |"


def write_page(table: Iterator[str] | None = None) -> None:
    """Write docs/faults.md. table: None = the one that the page has."""
    lines = list(table) if table is not None else documented_table()
    PAGE.write_text(_HEAD + "\n".join(lines) + "\n" + _MIDDLE + "\n".join(catalogue_lines()) + "\n")


def documented_table() -> list[str]:
    """The table of the page as it is."""
    text = PAGE.read_text() if PAGE.exists() else ""
    part = text.partition("## What was tried")[2].partition(_MIDDLE.strip())[0]
    return [line for line in part.splitlines() if line.startswith("|")]


if __name__ == "__main__":
    write_page()
    print(f"{PAGE} written")
