"""Journal rows -> Arrow columns. A value that does not fit its column costs its record, never the others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from pipeline.records import Answer, Fault, RecordKey, Stage
from pipeline.write.schema import OutputSchema, journal_row

# What Arrow raises where a value does not fit its column; UnicodeEncodeError is a ValueError.
_UNFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)


def journal_batch(rows: list[dict[str, Any]], schema: OutputSchema) -> tuple[pa.RecordBatch, Counter[str]]:
    """The rows in the columns of schema.journal; and by "stage/type" the answers that became errors on the way."""
    unfit: Counter[str] = Counter()
    try:
        return pa.RecordBatch.from_pylist(rows, schema.journal), unfit
    except _UNFIT:
        # One value does not fit its column (a lone surrogate, a type the scan never saw): find its row.
        batches = [_single(row, schema, unfit) for row in rows]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0], unfit


def _single(row: dict[str, Any], schema: OutputSchema, unfit: Counter[str]) -> pa.RecordBatch:
    cleaned = {name: _printable(value) for name, value in row.items()}
    if cleaned != row:
        cleaned["warnings"] = [*cleaned["warnings"], "text cleaned: lone surrogates replaced"]
    try:
        return pa.RecordBatch.from_pylist([cleaned], schema.journal)
    except _UNFIT as problem:
        if row["status"] == "error":  # what went wrong first says more
            fault = Fault(Stage(row["error_stage"]), cleaned["error_type"], cleaned["error_message"])
        else:
            fault = Fault(Stage.WRITE, type(problem).__name__, _printable(str(problem)))
            unfit[f"{fault.stage}/{fault.kind}"] += 1
        key = RecordKey(row["row_index"], row["prompt_name"], row["sample_index"])
        bare = journal_row(Answer(key, cleaned["id"], fault=fault), {}, schema, row["attempt"])
        return pa.RecordBatch.from_pylist([bare], schema.journal)


def _printable(value: Any) -> Any:
    """The value with every lone surrogate in its texts replaced, which no encoding of Unicode can hold.

    Two halves of one character find each other again; a lone half becomes U+FFFD, as in prompts.
    """
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {name: _printable(part) for name, part in value.items()}
    return value
