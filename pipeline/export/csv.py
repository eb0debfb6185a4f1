"""format=csv: a line for each record behind one of names. UTF-8, lines end with a line feed, quotes are doubled.

Text is quoted and a null is not, so that "" and nothing are told apart. Lists and structs are JSON. Text that a
spreadsheet would take for a formula gets a ' in front (OWASP, "CSV Injection"): an answer may be =cmd|'/c calc'!A1.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.export.destination import new_file, refuse_taken, target
from pipeline.export.jsonl import text
from pipeline.export.options import COMMON, Errors, ExportOptions
from pipeline.export.selection import Selection
from pipeline.write.file import Place

OBEYED = COMMON | {"to", "errors", "columns", "escape_formulas", "bom"}
ERRORS = Errors.include
_BOM = "\ufeff".encode()
# The last four are = + - @ as East Asian keyboards write them, which a spreadsheet takes for the same.
_FORMULA = "^[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write the file; where it is, as a phrase.

    Raises:
        UsageError: it is there already, or a column is not.
        RunFailed: it cannot be written.
    """
    path = target(output_dir, options.to, "answers.csv")
    refuse_taken(path, options.exists)
    columns = selection.columns(with_bytes=False)
    schema = selection.results.schema
    names = pa.array(list(columns), pa.string())
    header = _escaped(names).to_pylist() if options.escape_formulas else list(columns)
    fields = [pa.field(shown, _type(schema.field(name).type)) for shown, name in zip(header, columns, strict=True)]
    with new_file(path) as file:
        if options.bom:
            file.write(_BOM)
        with pyarrow.csv.CSVWriter(file, pa.schema(fields)) as writer:
            for table in selection.tables(list(columns.values())):
                arrays = [_cells(column, field.type) for column, field in zip(table.columns, fields, strict=True)]
                if options.escape_formulas:
                    arrays = [_escaped(array) if pa.types.is_string(array.type) else array for array in arrays]
                writer.write_table(pa.table(arrays, schema=pa.schema(fields)))
                selection.num_written += table.num_rows
    return f"in {path}"


def _type(type_: pa.DataType) -> pa.DataType:
    """The type that a column is written as: text, where CSV has no other form for it."""
    is_own = pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)
    return type_ if is_own else pa.string()


def _cells(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    if column.type == type_:
        return column
    if pa.types.is_nested(column.type):
        return _texts([None if value is None else text(value) for value in column.to_pylist()])
    try:
        return column.cast(type_)
    except pa.ArrowNotImplementedError:  # a duration, say
        return _texts([None if value is None else str(value) for value in column.to_pylist()])


def _texts(values: list[str | None]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.string())])


def _escaped(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    is_formula = pc.match_substring_regex(texts, _FORMULA)
    return pc.if_else(is_formula, pc.binary_join_element_wise("'", texts, ""), texts)
