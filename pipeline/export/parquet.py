"""format=parquet: all shards in one Parquet file, kept images included."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.export.destination import new_file, refuse_taken, target
from pipeline.export.options import COMMON, Errors, ExportOptions
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
    path = target(output_dir, options.to, "answers.parquet")
    refuse_taken(path, options.exists)
    columns = selection.columns(with_bytes=True)
    schema = table_schema(selection, columns)
    # On an exception the writer puts a footer over what it has; new_file() throws that away.
    with (
        new_file(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in selection.tables(list(columns.values())):
            writer.write_table(pa.table(table.columns, schema=schema))
            selection.num_written += table.num_rows
    return f"in {path}"


def table_schema(selection: Selection, columns: dict[str, str]) -> pa.Schema:
    """The columns as tables() gives them, under their names in the files."""
    fields = (selection.results.schema.field(name) for name in columns)
    return pa.schema(
        pa.field(field.name, field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
        for field in fields
    )
