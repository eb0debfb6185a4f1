"""A table's row -> Row: which columns are kept, which hold images, the id, the conversation."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from pipeline.dataset.base import DatasetConfig, Inputs
from pipeline.dataset.cells import Origin, images_in, messages_in, origin
from pipeline.dataset.files import Span
from pipeline.dataset.ids import id_text, stand_in
from pipeline.errors import RowFault, UsageError
from pipeline.records import Fault, ImageRef, Row, Stage


@dataclass(frozen=True, slots=True)
class TableRows:
    """Makes the rows of one table-like source."""

    columns: tuple[str, ...]
    image_column: str | None
    id_column: str | None
    messages_column: str | None
    origin: Origin

    @property
    def needed(self) -> list[str]:
        """The columns that must be read."""
        extra = [name for name in (self.image_column, self.id_column, self.messages_column) if name]
        return list(dict.fromkeys([*self.columns, *extra]))

    def row(
        self,
        index: int,
        span: Span,
        values: Mapping[str, Any],
        *,
        columns: Mapping[str, Any] | None = None,
        images: tuple[ImageRef, ...] | None = None,
        origin: Origin | None = None,
        default_id: str | None = None,
    ) -> Row:
        """A row from its raw values; a cell that is no image or conversation becomes the row's fault.

        columns: what the row offers, where that is not simply the values. images: given where they do not come from
        a column. origin: in place of the table's own. default_id: where no column names the row; else its index.
        """
        fault, messages = None, None
        columns = {name: values.get(name) for name in self.columns} if columns is None else columns
        try:
            if images is None:
                column = self.image_column
                images = images_in(values.get(column), origin or self.origin) if column else ()
            if self.messages_column:
                messages = messages_in(values.get(self.messages_column))
        except RowFault as error:
            fault = Fault(error.stage, error.kind, f"{span.path} row {index - span.first}: {error.message}")
        row_id = id_text(values.get(self.id_column)) if self.id_column else default_id or str(index)
        row_id = stand_in(span.path, index - span.first) if row_id is None else row_id
        return Row(index, row_id, images or (), columns, messages, fault)

    def lost(self, index: int, span: Span, kind: str, message: str, row_id: str | None = None) -> Row:
        """A row that could not be read at all."""
        if row_id is None:
            row_id = stand_in(span.path, index - span.first) if self.id_column else str(index)
        columns = dict.fromkeys(self.columns)
        return Row(index, row_id, (), columns, fault=Fault(Stage.READ, kind, message))


def table_rows(config: DatasetConfig, inputs: Inputs) -> TableRows:
    """What config and plan say about a table."""
    return TableRows(
        tuple(inputs.columns.names),
        config.image_column,
        config.id_column,
        config.messages_column,
        origin(config.root, inputs.root, config.allow_urls),
    )


def check_names(config: DatasetConfig, names: Sequence[str], virtual: Sequence[str] = ()) -> None:
    """Raises UsageError for a configured column that the source does not have.

    names: the source's columns. virtual: names that stand for images although no column has them.
    """
    check = [("image_column", config.image_column), ("id_column", config.id_column)]
    check += [("messages_column", config.messages_column), *(("columns", name) for name in config.columns or [])]
    for option, name in check:
        if name is None or name in names or (option == "image_column" and name in virtual):
            continue
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        if option == "image_column":
            hint += " dataset.image_column=null makes a text-only dataset."
        shown = [*names[:50], "..."] if len(names) > 50 else list(names)
        raise UsageError(f"dataset.{option}={name}: {config.path} has no such column; its columns are {shown}.{hint}")


def kept_columns(config: DatasetConfig, schema: pa.Schema, data_uris: bool = False) -> tuple[pa.Schema, list[str]]:
    """The columns that rows offer, and warnings about those left out because they hold bytes.

    data_uris: the text in the image column is pictures, not paths.

    Raises:
        UsageError: a configured name is absent, or of a type that cannot be an image or an id.
    """
    check_names(config, schema.names)
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise UsageError(f"{config.path} has two columns called {twice[0]!r}; rename one.")
    image = config.image_column
    if image and not _may_hold_images(schema.field(image).type):
        raise UsageError(
            f"dataset.image_column={image} is of type {schema.field(image).type}; expected bytes, {{bytes, path}}, "
            "paths or URLs as text, or a list of these."
        )
    left_out = [field.name for field in schema if holds_bytes(field.type)]
    if image and data_uris:
        left_out.append(image)
    for option, name in [("id_column", config.id_column), *(("columns", name) for name in config.columns or [])]:
        if name in left_out:
            raise UsageError(f"dataset.{option}={name}: this column holds bytes, which are not kept as values.")
    fields = [pa.field(field.name, field.type) for field in schema if field.name not in left_out]
    others = [name for name in left_out if name != image]
    return pa.schema(fields), [f"columns left out because they hold bytes: {', '.join(others)}"] if others else []


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema without what a file writer adds: metadata, not-null, dictionaries, large types, extension types."""
    return pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])


def plain_type(type_: pa.DataType) -> pa.DataType:
    """The type that a column's values have as plain Python values, microseconds at the finest."""
    if isinstance(type_, pa.BaseExtensionType):
        return plain_type(type_.storage_type)
    if types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if types.is_large_string(type_) or types.is_string_view(type_):
        return pa.string()
    if types.is_timestamp(type_) and type_.unit == "ns":
        return pa.timestamp("us", type_.tz)
    if types.is_duration(type_) and type_.unit == "ns":
        return pa.duration("us")
    return pa.time64("us") if type_ == pa.time64("ns") else type_


def plain_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with the types of plain_schema. Nanoseconds are cut, because Python has none."""
    columns = []
    for column in batch.columns:
        column = column.storage if isinstance(column, pa.ExtensionArray) else column
        target = plain_type(column.type)
        columns.append(column if target == column.type else column.cast(target, safe=False))
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names) if columns else batch


def rows_in(table: TableRows, batch: pa.RecordBatch, index: int, span: Span) -> Iterator[Row]:
    """The rows of a batch whose first row is row `index` of the dataset."""
    try:
        values: list[dict[str, Any] | None] = plain_batch(batch).to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # text that is not UTF-8, a date after 9999: row by row
        values = [None] * len(batch)
    for number, row in enumerate(values):
        if row is None:
            yield _single_row(table, batch.slice(number, 1), index + number, span)
        else:
            yield table.row(index + number, span, row)


def _single_row(table: TableRows, batch: pa.RecordBatch, index: int, span: Span) -> Row:
    try:
        return table.row(index, span, plain_batch(batch).to_pylist()[0])
    except (ValueError, OverflowError, pa.ArrowException) as error:
        message = f"{span.path} row {index - span.first}: a value has no Python form: {error}"
        return table.lost(index, span, type(error).__name__, message)


def holds_bytes(type_: pa.DataType) -> bool:
    """Whether a type is bytes or has bytes inside."""
    if isinstance(type_, pa.BaseExtensionType):
        return holds_bytes(type_.storage_type)
    if types.is_dictionary(type_):
        return holds_bytes(type_.value_type)
    if types.is_nested(type_):
        return any(holds_bytes(type_.field(number).type) for number in range(type_.num_fields))
    return bool(
        types.is_binary(type_)
        or types.is_large_binary(type_)
        or types.is_fixed_size_binary(type_)
        or types.is_binary_view(type_)
    )


def _may_hold_images(type_: pa.DataType) -> bool:
    type_ = plain_type(type_)
    if types.is_struct(type_):
        return bool(type_.get_field_index("bytes") >= 0 or type_.get_field_index("path") >= 0)
    if types.is_nested(type_) and not types.is_map(type_) and not types.is_union(type_):
        return _may_hold_images(type_.field(0).type)
    return bool(holds_bytes(type_) or types.is_string(type_) or types.is_null(type_))
