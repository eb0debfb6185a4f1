"""Records side by side as rows of a table: what the Parquet file of changed records has, and the page shows."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.diff.change import UNCHANGED, Change
from pipeline.diff.comparison import PairBlock, error_classes
from pipeline.diff.pairs import Pairs, records_at
from pipeline.diff.side import Side
from pipeline.errors import RunFailed
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath

_NUM_LONE = 10_000  # records of one side alone that are read at a time

# Of each side, behind what they share; what a side's files have not got is null.
_EACH = {
    "prompt_name": pa.large_string(),
    "response": pa.large_string(),
    "error": pa.large_string(),  # class: stage/type
    "error_message": pa.large_string(),
    "finish_reason": pa.large_string(),
    "num_generated_tokens": pa.int64(),
}
SCHEMA = pa.schema(
    [
        pa.field("key", pa.large_string()),
        pa.field("row_index", pa.int64()),  # of a; of b where a has no such record
        pa.field("sample_index", pa.int32()),
        pa.field("change", pa.string()),
        pa.field("similarity", pa.float32()),
        *(pa.field(f"{side}_{name}", type_) for name, type_ in _EACH.items() for side in "ab"),
    ]
)


def identity_columns(side: Side, key: str) -> list[str]:
    """What has to be read beside the compared columns to say which record it is. key: column of the key."""
    places = [name for name in ("row_index", "prompt_name", "sample_index") if name in side.results.names]
    return list(dict.fromkeys([key, *places]))


def rows_of_pairs(a: Side, b: Side, key: str, block: PairBlock) -> pa.Table:
    """Every pair of a block as a row. key: column of a's key."""
    left, right = _half("a", a, block.a, block.a_errors), _half("b", b, block.b, block.b_errors)
    words = np.array([change.word for change in Change])
    shared = _shared(a, block.a, key)
    return _table(len(block.a), shared | left | right, words[block.change], block.similarity)


def rows_of_one(side: Side, key: str, table: pa.Table) -> pa.Table:
    """Records that only this side has, as rows."""
    change = Change.ONLY_IN_A if side.name == "a" else Change.ONLY_IN_B
    half = _half(side.name, side, table, error_classes(table, side))
    nan = np.full(len(table), np.nan, np.float32)
    return _table(len(table), _shared(side, table, key) | half, np.full(len(table), change.word), nan)


def _shared(side: Side, table: pa.Table, key: str) -> dict[str, Any]:
    return {"key": table[key]} | {
        name: table[name] for name in ("row_index", "sample_index") if name in table.column_names
    }


def _half(name: str, side: Side, table: pa.Table, errors: Sequence[str | None]) -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}_response": table[side.response], f"{name}_error": pa.array(errors, pa.string())}
    there = set(side.compared) | {"prompt_name"}
    return found | {
        f"{name}_{column}": table[column] for column in _EACH if column in there and column in table.column_names
    }


def _table(length: int, columns: dict[str, Any], change: Any, similarity: Any) -> pa.Table:
    columns |= {"change": pa.array(change.tolist(), pa.string())}
    columns |= {"similarity": pc.if_else(np.isnan(similarity), None, pa.array(similarity))}
    return pa.table(
        [
            columns[field.name].cast(field.type) if field.name in columns else pa.nulls(length, field.type)
            for field in SCHEMA
        ],
        schema=SCHEMA,
    )


@contextmanager
def changed_rows_file(path: Place, a: Side, b: Side, pairs: Pairs) -> Iterator[Callable[[PairBlock], None]]:
    """Write the records that are not the same in both; what is given writes those of a block.

    The file appears under its name when all is written: pairs in the order of a, those of one side alone behind them.

    Raises:
        RunFailed: it cannot be written; what was there before is unchanged.
    """
    folder = path.parent if isinstance(path, Path) else Path(tempfile.gettempdir())
    temporary = folder / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # After an exception the writer ends the file as if it were whole; that one is deleted and never gets the name.
        with open(temporary, "xb") as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:

            def write(block: PairBlock) -> None:
                changed = ~np.isin(block.change, UNCHANGED)
                if changed.any():
                    rows = rows_of_pairs(a, b, pairs.key_columns[0], block)
                    writer.write_table(rows.filter(pa.array(changed)))

            yield write
            for side, key, places, starts in (
                (a, pairs.key_columns[0], pairs.only_in_a, pairs.a_starts),
                (b, pairs.key_columns[1], pairs.only_in_b, pairs.b_starts),
            ):
                columns = list(dict.fromkeys([*identity_columns(side, key), side.response, *side.compared]))
                for first in range(0, len(places), _NUM_LONE):
                    table = records_at(side, starts, places[first : first + _NUM_LONE], columns)
                    writer.write_table(rows_of_one(side, key, table))
        if isinstance(path, ObjectPath):
            path.replace(temporary.read_bytes())
        else:
            os.replace(temporary, path)
    except OSError as problem:
        raise RunFailed(f"{path} cannot be written: {problem.strerror or problem}.") from problem
    finally:
        temporary.unlink(missing_ok=True)
