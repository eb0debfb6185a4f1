"""format=jsonl: one JSON object a line for each record, columns as in the files. UTF-8, lines end with a line feed."""

from __future__ import annotations

import json
import math
import re
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from pipeline.export.destination import new_file, refuse_taken, target
from pipeline.export.options import COMMON, Errors, ExportOptions
from pipeline.export.selection import Selection
from pipeline.write.file import Place

OBEYED = COMMON | {"to", "errors", "columns"}
ERRORS = Errors.include
_SEPARATORS = re.compile("[\x85\u2028\u2029]")


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write the file; where it is, as a phrase.

    Raises:
        UsageError: it is there already, or a column is not.
        RunFailed: it cannot be written.
    """
    path = target(output_dir, options.to, "answers.jsonl")
    refuse_taken(path, options.exists)
    columns = selection.columns(with_bytes=False)
    with new_file(path) as file:
        for table in selection.tables(list(columns.values())):
            for row in table.rename_columns(list(columns)).to_pylist():
                file.write(line(row))
            selection.num_written += table.num_rows
    return f"in {path}"


def line(row: Any) -> bytes:
    """A value of JSON as a line that every reader takes for one: Unicode's own line separators are escaped."""
    return _SEPARATORS.sub(lambda match: f"\\u{ord(match[0]):04x}", text(row)).encode() + b"\n"


def text(value: Any) -> str:
    """A value of a column as JSON: dates as text, numbers that JSON has not as null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:  # a NaN, rarely: look for it only then
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, (Decimal, timedelta)):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
