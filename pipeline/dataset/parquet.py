"""Parquet: read by row group, streamed, only the columns that are needed.

A page that cannot be read (damaged, or a claim of absurd size) costs the rest of its row group, not the run: those
rows carry a fault that names file and row group.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.base import Dataset, DatasetConfig, Inputs
from pipeline.dataset.cells import holds_data_uri, origin
from pipeline.dataset.files import Files, Span, files_table, is_local, joined, open_file
from pipeline.dataset.ids import Ids, id_text, stand_in
from pipeline.dataset.listing import Listing, listed, regular
from pipeline.dataset.parquet_limits import FirstBytes, batch_rows
from pipeline.dataset.table import TableRows, holds_bytes, kept_columns, plain_batch, plain_schema, rows_in, table_rows
from pipeline.errors import RunFailed, UsageError, VlmBatchError
from pipeline.records import Row

_BATCH_ROWS = 32  # encoded pictures in memory at a time; part of no result
_BUFFER_BYTES = 1 << 20  # column chunks are streamed through this, not loaded whole
_NUM_THREADS = 8  # footers are small and, on an object store, far away


@dataclass(kw_only=True, slots=True)
class ParquetConfig(DatasetConfig):
    """Parquet files: a folder, a glob or one file."""

    kind: ClassVar[str] = "parquet"

    def scan(self) -> Inputs:
        return scanned(self, regular(listed(self.path, _is_parquet), "Parquet files"))

    def open(self, inputs: Inputs) -> Dataset:
        return ParquetRows(table_rows(self, inputs), inputs)


def scanned(config: DatasetConfig, listing: Listing, revision: str | None = None) -> Inputs:
    """Count Parquet files by their footers and check that they agree.

    Raises:
        UsageError: a file is no Parquet, columns differ between files, or ids are unsound.
    """
    warnings = list(listing.warnings)
    origin(config.root, listing.root, config.allow_urls)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        sources = zip(listing.paths, listing.sizes, strict=True)
        footers = list(pool.map(lambda source: _footer(listing.root, *source), sources))
    if not footers:
        warnings.append(f"no Parquet file in {listing.root}")
    schema, differences = _common_schema(config, listing.paths, [schema for _, schema in footers])
    files = files_table(listing.paths, listing.sizes, [num_rows for num_rows, _ in footers])
    inputs = Inputs(listing.root, files, schema, revision)
    uris = bool(footers) and _has_data_uris(config, inputs)
    columns, left_out = kept_columns(config, schema, uris) if footers else (schema, [])
    inputs = Inputs(listing.root, files, columns, revision, (*warnings, *differences, *left_out))
    if config.id_column and footers:
        dataset = ParquetRows(table_rows(config, inputs), inputs)
        ids = Ids(f"dataset.id_column={config.id_column}")
        for values in dataset.ids():
            ids.add(values)
        ids.check()
    return inputs


class ParquetRows:
    """Rows of Parquet files; the file last read stays open."""

    def __init__(self, table: TableRows, inputs: Inputs) -> None:
        self._table = table
        self._root = inputs.root
        self._files = Files(inputs.files)
        self._path: str | None = None
        self._file: pq.ParquetFile | None = None

    def __len__(self) -> int:
        return len(self._files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for span in self._files.spans(start, stop):
            file = self._opened(span)
            for group, first, last in _groups(file.metadata, span):
                yield from self._group_rows(file, span, group, first, last)

    def ids(self) -> Iterator[pa.Array | list[str]]:
        """The id column in row order, stand-ins for rows whose group cannot be read."""
        column = self._table.id_column
        for span in self._files.spans(0, len(self)):
            file = self._opened(span)
            for group, first, last in _groups(file.metadata, span):
                yield from self._group_ids(file, span, group, first, last, column or "")

    def _group_rows(self, file: pq.ParquetFile, span: Span, group: int, first: int, last: int) -> Iterator[Row]:
        """Rows of one row group; it holds rows first <= row < last of the file."""
        row = first  # the file's row that comes next
        try:
            for batch in _batches(file, self._first_bytes(span), group, self._table.needed):
                skipped = max(span.start - row, 0)
                part = batch.slice(skipped, max(min(span.stop - row, len(batch)) - skipped, 0))
                if len(part):
                    yield from rows_in(self._table, part, span.first + row + skipped, span)
                row += len(batch)
                if row >= span.stop:
                    return
            reason = None if row >= last else ("ShortRowGroup", f"it has {row - first} rows, not {last - first}")
        except (OSError, pa.ArrowException, MemoryError) as error:
            reason = (type(error).__name__, str(error))
        if reason is None:
            return
        ids = self._lost_ids(file, span, group, first, last)
        for number in range(max(row, span.start), min(last, span.stop)):
            message = f"{joined(self._root, span.path)} row group {group} cannot be read: {reason[1]}"
            yield self._table.lost(span.first + number, span, reason[0], message, ids[number - first] if ids else None)

    def _lost_ids(self, file: pq.ParquetFile, span: Span, group: int, first: int, last: int) -> list[str] | None:
        """The ids of a damaged row group, whose id column may well be sound."""
        if self._table.id_column is None:
            return None
        chunks = self._group_ids(file, span, group, first, last, self._table.id_column)
        values = (value for chunk in chunks for value in (chunk if isinstance(chunk, list) else chunk.to_pylist()))
        return [id_text(value) or stand_in(span.path, number) for number, value in enumerate(values, start=first)]

    def _group_ids(
        self, file: pq.ParquetFile, span: Span, group: int, first: int, last: int, column: str
    ) -> Iterator[pa.Array | list[str]]:
        chunks, row = list[Any](), first
        try:
            for batch in _batches(file, self._first_bytes(span), group, [column], 65536):
                chunks.append(plain_batch(batch).column(0))
                row += len(batch)
        except (OSError, pa.ArrowException, MemoryError):  # rows() says what is wrong
            pass
        yield from chunks
        yield [stand_in(span.path, number) for number in range(row, last)]

    def _first_bytes(self, span: Span) -> FirstBytes:
        def read(offset: int) -> bytes:
            with open_file(self._root, span.path, span.size_bytes) as handle:
                handle.seek(offset)
                return handle.read(32)

        return read

    def _opened(self, span: Span) -> pq.ParquetFile:
        if self._file is None or self._path != span.path:
            self._file, self._path = _parquet_file(self._root, span.path, span.size_bytes, RunFailed), span.path
        return self._file


def _is_parquet(path: str) -> bool:
    # Names that begin with "_" are the bookkeeping of Spark and Delta, not data.
    return path.lower().endswith((".parquet", ".parq", ".pq")) and "/_" not in f"/{path}"


def _parquet_file(root: str, path: str, size_bytes: int, error: type[VlmBatchError]) -> pq.ParquetFile:
    source: Any = open_file(root, path, size_bytes, error)
    if is_local(root):  # pyarrow reads it itself, without Python's lock
        source.close()
        source = joined(root, path)
    try:
        # Flipped bits are read as other values unless checksums are verified.
        return pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
    except (OSError, ValueError, TypeError, pa.ArrowException, MemoryError) as cause:  # of an extension type, too
        raise error(f"{joined(root, path)} is no readable Parquet file: {cause}") from cause


def _footer(root: str, path: str, size_bytes: int) -> tuple[int, pa.Schema]:
    file = _parquet_file(root, path, size_bytes, UsageError)
    try:
        return file.metadata.num_rows, plain_schema(file.schema_arrow)
    finally:
        file.close(force=True)


def _groups(metadata: Any, span: Span) -> Iterator[tuple[int, int, int]]:
    """Row groups that a span touches: number, first row, row after the last."""
    first = 0
    for group in range(metadata.num_row_groups):
        last = first + metadata.row_group(group).num_rows
        if last > span.start and first < span.stop:
            yield group, first, last
        first = last


def _batches(
    file: pq.ParquetFile, first_bytes: FirstBytes, group: int, columns: list[str], num_rows: int = _BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    num_rows = batch_rows(file, first_bytes, group, columns, num_rows)
    yield from file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False)


def _common_schema(config: DatasetConfig, paths: list[str], schemas: list[pa.Schema]) -> tuple[pa.Schema, list[str]]:
    """The columns of the first file, each with the type that all files give it, and warnings about other columns."""
    if not schemas:
        return pa.schema([]), []
    found: dict[str, tuple[pa.DataType, str]] = {field.name: (field.type, paths[0]) for field in schemas[0]}
    extra: dict[str, str] = {}
    for path, schema in zip(paths, schemas, strict=True):
        extra.update({name: path for name in schema.names if name not in found and name not in extra})
        for name, (type_, first) in found.items():
            number = schema.get_field_index(name)
            if number < 0 and name in schema.names:
                continue  # twice: kept_columns refuses it
            if number < 0:
                raise UsageError(f"{path} has no column {name!r}, which {first} has. Columns of all files must agree.")
            other = schema.field(number).type
            if pa.types.is_null(type_):
                found[name] = (other, path)
            elif other != type_ and not pa.types.is_null(other):
                raise UsageError(f"column {name!r} is {type_} in {first} but {other} in {path}; make them agree.")
    schema = pa.schema([pa.field(field.name, found[field.name][0]) for field in schemas[0]])
    return schema, [f"column {name!r} of {path} is not in {paths[0]} and left out" for name, path in extra.items()]


def _has_data_uris(config: DatasetConfig, inputs: Inputs) -> bool:
    """Whether the first image that is not null is a data URI: the first rows are read."""
    name = config.image_column
    number = inputs.columns.get_field_index(name) if name else -1
    if name is None or number < 0 or holds_bytes(inputs.columns.field(number).type):
        return False
    table = TableRows((name,), None, None, None, origin(None, inputs.root, False))
    dataset = ParquetRows(table, inputs)
    for row in dataset.rows(0, min(64, len(dataset))):
        cell = row.columns[name]
        if cell:
            return holds_data_uri(cell)
    return False
