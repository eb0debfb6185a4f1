"""docs/models.md says what is true."""

from __future__ import annotations

from models_page import PAGE, documented_exponents, page
from ragged import measured, one_thread  # noqa: F401
from tiny_checkpoints import ARCHITECTURES

_WRITE = "docs/models.md is out of date: write it with 'make models'"


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text()
    exponents = documented_exponents(text)
    assert exponents.keys() == ARCHITECTURES.keys(), _WRITE
    assert page(exponents) == text, _WRITE


def test_the_bounds_of_the_page_hold() -> None:
    for name, exponent in documented_exponents(PAGE.read_text()).items():
        worst = max(measured(name).error, measured(name).slots_error)
        assert worst <= 10.0**exponent <= 1e-5, f"{name}: {_WRITE}"
