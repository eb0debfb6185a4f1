"""One value of a column: the text, or the texts, that it stands for."""

from __future__ import annotations

import ast
import datetime
import decimal
import json
from typing import Any

from pipeline.errors import UsageError

_TEXT_KEY = "answer"  # of a struct, as in the annotations of VQA: [{"answer": "yes", "answer_id": 1, ...}, ...]


def text_of(value: Any) -> str | None:
    """A value as text; None where it is null or NaN. Whole numbers go without a point: 5.0, as pandas writes a column
    of whole numbers that has nulls, is 5.

    Raises:
        UsageError: it is a list, a struct or bytes.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, int | decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise UsageError(f"expected text or a number, came a {type(value).__name__}")


def texts_of(value: Any) -> list[str]:
    """The texts of a text, a number, or a list of such; nulls are left out.

    Raises:
        UsageError: there is something else in it.
    """
    if isinstance(value, dict):
        if _TEXT_KEY not in value:
            raise UsageError(
                f"expected text, or a struct with {_TEXT_KEY!r}, came one with {', '.join(map(str, value))}"
            )
        return texts_of(value[_TEXT_KEY])
    if isinstance(value, list | tuple):
        return [text for entry in value for text in texts_of(entry)]
    text = text_of(value)
    return [] if text is None else [text]


def options_of(value: Any) -> list[str]:
    """The options of a multiple-choice question, also where a column of text holds the list: "['a', 'b']".

    Raises:
        UsageError: it is no list.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())  # constants and brackets alone: nothing in it is run
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UsageError("expected a list of options, came a text") from None
    if value is not None and not isinstance(value, list | tuple):
        raise UsageError(f"expected a list of options, came a {type(value).__name__}")
    return texts_of(value)


def group_of(value: Any) -> str | None:
    """The group that a value of the column `by` names; None for null."""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return text_of(value)
