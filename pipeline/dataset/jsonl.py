"""Manifests: a JSON object a line, or CSV, each naming its images by path, URL or data URI.

The scan reads every line once: it notes where each MARK_EVERY-th row starts and finds one Arrow type for each key.
A line that does not parse is a row with a fault; a key that a line lacks is null.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from pipeline.dataset.base import MARK_EVERY, Dataset, DatasetConfig, Inputs
from pipeline.dataset.cells import Origin, holds_data_uri, origin
from pipeline.dataset.files import Files, Span, files_table, joined, open_file
from pipeline.dataset.ids import Ids, stand_in
from pipeline.dataset.lines import EXTENSIONS, line_number, records
from pipeline.dataset.listing import listed, regular
from pipeline.dataset.schema import Seen, conformed
from pipeline.dataset.table import TableRows, kept_columns, table_rows
from pipeline.errors import RunFailed, UsageError
from pipeline.records import Row

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_ID_CHUNK = 65536


@dataclass(kw_only=True, slots=True)
class JsonlConfig(DatasetConfig):
    """JSON lines (.jsonl) or CSV (.csv): a file, a folder or a glob."""

    kind: ClassVar[str] = "jsonl"

    def scan(self) -> Inputs:
        listing = regular(listed(self.path, lambda path: path.lower().endswith(EXTENSIONS)), "JSON lines or CSV")
        for path in listing.paths:
            if not path.lower().endswith(EXTENSIONS):
                raise UsageError(f"{path}: expected a name that ends in {', '.join(EXTENSIONS)}.")
        origin(self.root, listing.root, self.allow_urls)
        scan = _Scan(self)
        for path, size in zip(listing.paths, listing.sizes, strict=True):
            scan.read(listing.root, path, size)
        files = files_table(listing.paths, listing.sizes, scan.num_rows, scan.marks, scan.hashes)
        columns, warnings = scan.columns()
        return Inputs(listing.root, files, columns, warnings=(*listing.warnings, *warnings))

    def open(self, inputs: Inputs) -> Dataset:
        return Lines(table_rows(self, inputs), inputs, confined=self.root is not None)


class _Scan:
    """What one pass over all files gathers."""

    def __init__(self, config: JsonlConfig) -> None:
        self.config = config
        self.seen: dict[str, Seen] = {}
        self.num_rows: list[int] = []
        self.marks: list[list[int]] = []
        self.hashes: list[str] = []
        self.num_broken = 0
        self.num_cleaned = 0
        self.has_data_uris = False
        self.first_broken = ""
        self.ids = Ids(f"dataset.id_column={config.id_column}")

    def read(self, root: str, path: str, size_bytes: int) -> None:
        num_rows, marks, ids = 0, list[int](), list[Any]()
        with (
            open_file(root, path, size_bytes, UsageError) as whole,
            io.BufferedReader(hashed := _Hashed(whole)) as handle,
        ):
            try:
                for record in records(handle, path):
                    if num_rows % MARK_EVERY == 0:
                        marks.append(record.offset)
                    self.num_cleaned += record.num_cleaned
                    row_id = self._note(record.values, path, num_rows)
                    num_rows += 1
                    if self.config.id_column:
                        ids.append(row_id)
                    if len(ids) == _ID_CHUNK:
                        self.ids.add(ids)
                        ids = []
            except (ValueError, csv.Error) as error:  # only the header of a CSV file raises
                raise UsageError(f"{joined(root, path)} has no CSV header: {error}") from error
            except OSError as error:
                raise UsageError(f"{joined(root, path)} cannot be read: {error}") from error
        self.ids.add(ids)
        self.num_rows.append(num_rows)
        self.marks.append(marks)
        self.hashes.append(hashed.digest.hexdigest())

    def _note(self, values: dict[str, Any] | ValueError, path: str, row: int) -> Any:
        """Learns the types of a row's values; returns its id."""
        if isinstance(values, ValueError):
            self.num_broken += 1
            self.first_broken = self.first_broken or f"{path} row {row}: {values}"
            return stand_in(path, row)
        for name, value in values.items():
            seen = self.seen.get(name)
            if seen is None:
                seen = self.seen[name] = Seen()
            seen.add(value)
        if self.config.image_column and not self.has_data_uris:
            self.has_data_uris = holds_data_uri(values.get(self.config.image_column))
        return values.get(self.config.id_column) if self.config.id_column else None

    def columns(self) -> tuple[pa.Schema, list[str]]:
        warnings = []
        if self.num_broken:
            warnings.append(f"{self.num_broken} lines do not parse and become error rows, e.g. {self.first_broken}")
        if self.num_cleaned:
            warnings.append(f"{self.num_cleaned} strings had a lone surrogate, which was replaced")
        schema = pa.schema([pa.field(name, seen.type()) for name, seen in self.seen.items()])
        if not self.seen:  # no row, or none that parses: nothing to hold the configured names against
            none = (
                f"no line of {self.config.path} parses: expected UTF-8, and as many fields as the header has, or JSON"
            )
            return schema, [*warnings, none if self.num_broken else f"no row in {self.config.path}"]
        mixed = [name for name, seen in self.seen.items() if seen.is_mixed() and name != self.config.image_column]
        if mixed:
            warnings.append(f"columns of mixed types, kept as text: {', '.join(mixed)}")
        columns, left_out = kept_columns(self.config, schema, self.has_data_uris)
        if self.config.id_column:
            self.ids.check()
        return columns, [*warnings, *left_out]


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is read from its start to its end; what is read twice counts once."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._position = self._num_hashed = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._handle.seek(offset, whence)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        assert self._position <= self._num_hashed, "a part was passed over"
        content = self._handle.read(len(memoryview(buffer)))
        memoryview(buffer)[: len(content)] = content
        self.digest.update(memoryview(content)[self._num_hashed - self._position :])
        self._position += len(content)
        self._num_hashed = max(self._num_hashed, self._position)
        return len(content)


class Lines:
    """Rows of JSONL and CSV files."""

    def __init__(self, table: TableRows, inputs: Inputs, confined: bool) -> None:
        self._table = table
        self._root = inputs.root
        self._types = {field.name: field.type for field in inputs.columns}
        self._files = Files(inputs.files)
        self._confined = confined

    def __len__(self) -> int:
        return len(self._files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for span in self._files.spans(start, stop):
            yield from self._rows_of(span)

    def _rows_of(self, span: Span) -> Iterator[Row]:
        row, offset = self._files.mark(span, MARK_EVERY)
        folder, known = self._origin(span), (0, 1)
        with open_file(self._root, span.path, span.size_bytes) as handle:
            try:
                for record in records(handle, span.path, offset):
                    if row >= span.stop:
                        return
                    if row < span.start:
                        pass
                    elif isinstance(record.values, ValueError):
                        known = (record.offset, self._line_number(span, record.offset, known))
                        message = f"{joined(self._root, span.path)}:{known[1]} does not parse: {record.values}"
                        yield self._table.lost(span.first + row, span, type(record.values).__name__, message)
                    else:
                        values = record.values
                        # Images, id and conversation are taken as they came, not as the column's common type has them.
                        columns = {name: conformed(values.get(name), type_) for name, type_ in self._types.items()}
                        yield self._table.row(span.first + row, span, values, columns=columns, origin=folder)
                    row += 1
            except OSError as error:
                raise RunFailed(f"{joined(self._root, span.path)} cannot be read: {error}") from error
        if row < span.stop:
            raise RunFailed(f"{joined(self._root, span.path)} has fewer rows than when it was planned; plan anew.")

    def _line_number(self, span: Span, offset: int, known: tuple[int, int]) -> int:
        with open_file(self._root, span.path, span.size_bytes) as handle:
            return line_number(handle, offset, known)

    def _origin(self, span: Span) -> Origin:
        """Paths start from dataset.root, or else from the manifest's own folder."""
        folder = span.path.rpartition("/")[0]
        if self._confined or not folder:
            return self._table.origin
        return replace(self._table.origin, folder=joined(self._root, folder))
