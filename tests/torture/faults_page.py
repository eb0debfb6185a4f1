"""docs/faults.md: which fault is tried by which test, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator

from faultbox import Found

TRIED: dict[str, list[Found]] = {}


def table_lines() -> Iterator[str]:
    """What was tried in this session, as a table of Markdown."""
    yield "| tried | faults | rows lost | rows doubled | wrong answers | generated twice | at most by one start |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, found in TRIED.items():
        sums = [
            sum(getattr(one, field) for one in found)
            for field in ("num_faults", "num_lost", "num_doubled", "num_wrong", "num_redone")
        ]
        most = max(one.most_redone for one in found)
        yield f"| {name} | " + " | ".join(f"{number:,}" for number in (*sums, most)) + " |"
