"""A null of the dataset, as a template meets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2.runtime import Undefined


class NullUsed(jinja2.UndefinedError):
    """A template used a null as if it were a value."""


class Null(Undefined):
    """A null of the dataset: a template may ask about it, but using it as a value is an error.

    False in a condition, equal to none, `is none`, not `is defined`, replaced by `default()`, null in `tojson`.
    Printing it, or any other use, raises NullUsed with its name: "None" in a prompt is never what was meant.
    """

    __slots__ = ()

    def _refuse(self) -> NoReturn:
        self._fail_with_undefined_error()

    def __str__(self) -> str:
        self._refuse()

    def __iter__(self) -> Iterator[Any]:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(None)

    def __repr__(self) -> str:
        return "None"


def guard_nulls(value: Any, name: str) -> Any:
    """`value` with every None in it, at any depth, as a Null that knows where it stands."""
    if value is None:
        return Null(hint=f"column {name!r} is null", name=name, exc=NullUsed)
    if isinstance(value, Mapping):
        return {key: guard_nulls(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [guard_nulls(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return value
