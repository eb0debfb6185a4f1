"""The faults that a release is tried with, by number, and the tests that try them.

Numbers 1 to 52 are faults of the machine, the input and the model, S-1 to S-9 attacks, P-1 to P-4 hostile Parquet
files. A test belongs to a number if the first line of its docstring says so: "Fault 18: ..." or "Fault 12, 17: ...".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
NUMBERS = (*map(str, range(1, 53)), *(f"S-{n}" for n in range(1, 10)), *(f"P-{n}" for n in range(1, 5)))
# What does not apply, or not yet: number -> why.
OPEN: dict[str, str] = {}
_DOC = re.compile(r"Faults? ((?:[SP]-)?\d+(?:, (?:[SP]-)?\d+)*): (.+)")


class Trial(NamedTuple):
    """A test that tries a fault."""

    numbers: tuple[str, ...]
    what: str  # is tried, and what holds
    place: str  # file::function


def trials() -> Iterator[Trial]:
    """Every test whose docstring names a fault, in the order of files."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if doc and (found := _DOC.match(doc.splitlines()[0])):
                yield Trial(tuple(found[1].split(", ")), found[2], f"{path.relative_to(TESTS)}::{node.name}")
