"""format=arrow: all shards in one Arrow file (IPC, "Feather version 2"), which readers map into memory as it is."""

from __future__ import annotations

import pyarrow as pa

from pipeline.export.destination import new_file, refuse_taken, target
from pipeline.export.options import COMMON, Errors, ExportOptions
from pipeline.export.parquet import table_schema
from pipeline.export.selection import Selection
from pipeline.write.file import Place

OBEYED = COMMON | {"to", "errors", "columns"}
ERRORS = Errors.include


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write the file; where it is, as a phrase.

    Raises:
        UsageError: it is there already, or a column is not.
        RunFailed: it cannot be written.
    """
    path = target(output_dir, options.to, "answers.arrow")
    refuse_taken(path, options.exists)
    columns = selection.columns(with_bytes=True)
    schema = table_schema(selection, columns)
    with new_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for table in selection.tables(list(columns.values())):
            writer.write_table(pa.table(table.columns, schema=schema))
            selection.num_written += table.num_rows
    return f"in {path}"
