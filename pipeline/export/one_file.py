"""All shards in one file of columns: what format=parquet and format=arrow have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, Any

import pyarrow as pa

from pipeline.export.destination import new_file, refuse_taken, target
from pipeline.export.options import ExportOptions
from pipeline.export.selection import Selection
from pipeline.write.file import Place

# Has write_table().
Writer = Callable[[IO[bytes], pa.Schema], AbstractContextManager[Any]]


def in_one_file(selection: Selection, options: ExportOptions, output_dir: Place, *, name: str, writer: Writer) -> str:
    """Write the file, kept images included; where it is, as a phrase. name: of the file where options.to has none.

    Raises:
        UsageError: it is there already, or a column is not.
        RunFailed: it cannot be written.
    """
    path = target(output_dir, options.to, name)
    refuse_taken(path, options.exists)
    columns = selection.columns(with_bytes=True)
    schema = table_schema(selection, columns)
    # On an exception the writer may put a footer over what it has; new_file() throws that away.
    with new_file(path) as file, writer(file, schema) as opened:
        for table in selection.tables(list(columns.values())):
            opened.write_table(pa.table(table.columns, schema=schema))
            selection.num_written += table.num_rows
    return f"in {path}"


def table_schema(selection: Selection, columns: dict[str, str]) -> pa.Schema:
    """The columns as tables() gives them, under their names in the files."""
    fields = (selection.results.schema.field(name) for name in columns)
    return pa.schema(
        pa.field(field.name, field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
        for field in fields
    )
