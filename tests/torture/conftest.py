"""The table of what was tried: printed at the end, and kept for docs/faults.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faultbox import Found
from faults_page import TRIED, table_lines, write_page


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Iterator[Found]:
    """What this test counts; it stands in the table under the first line of the test's docstring."""
    counted = Found()
    yield counted
    if counted.num_faults:
        doc = (request.function.__doc__ or request.node.name).strip().splitlines()[0]
        TRIED.setdefault(doc, []).append(counted)
    assert counted.good, counted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-page", action="store_true", help="write docs/faults.md if all tests pass")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """The table."""
    if config.getoption("--faults-page", False) and exitstatus == pytest.ExitCode.OK:
        write_page(table_lines())
    if TRIED:
        terminalreporter.section("faults tried")
        for line in table_lines():
            terminalreporter.write_line(line)
