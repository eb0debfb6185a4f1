"""webdataset: tar files of samples. Images are images, .json and text members are columns.

The scan reads the headers and the JSON of every tar once and notes where each MARK_EVERY-th sample starts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.dataset.base import MARK_EVERY, Dataset, DatasetConfig, Inputs
from pipeline.dataset.files import Files, Span, files_table, joined, open_file
from pipeline.dataset.ids import Ids, id_text
from pipeline.dataset.listing import listed, regular
from pipeline.dataset.schema import Seen, conformed
from pipeline.dataset.table import TableRows, check_names, table_rows
from pipeline.dataset.tar import IMAGES, NUMBERS, TEXTS, Sample, is_tar, samples, suffix
from pipeline.errors import RowFault, RunFailed, UsageError
from pipeline.option import option
from pipeline.records import ImageRef, Row, Stage

ALL_IMAGES = "image"  # as image_column: every image of the sample


@dataclass(kw_only=True, slots=True)
class WebdatasetConfig(DatasetConfig):
    """Tar files (.tar, .tar.gz, .tgz): a folder, a glob, a brace pattern or one file."""

    kind: ClassVar[str] = "webdataset"

    image_column: str | None = option(ALL_IMAGES, "image: all images of a sample; or one extension, e.g. left.png")
    id_column: str | None = option(None, "column that names a row; null = tar/key")

    def scan(self) -> Inputs:
        listing = regular(listed(self.path, is_tar), "tar files")
        scan = _Scan(self)
        for path, size in zip(listing.paths, listing.sizes, strict=True):
            scan.read(listing.root, path, size)
        files = files_table(listing.paths, listing.sizes, scan.num_rows, scan.marks)
        return Inputs(listing.root, files, scan.columns(), warnings=(*listing.warnings, *scan.warnings()))

    def open(self, inputs: Inputs) -> Dataset:
        return Samples(table_rows(self, inputs), inputs)


class _Scan:
    """What one pass over all tars gathers."""

    def __init__(self, config: WebdatasetConfig) -> None:
        self.config = config
        self.seen: dict[str, Seen] = {}
        self.image_extensions: set[str] = set()
        self.num_rows: list[int] = []
        self.marks: list[list[int]] = []
        self.notes: Counter[str] = Counter()
        self.broken: list[str] = []
        name = config.id_column
        self.ids = Ids(
            f"dataset.id_column={name}" if name else f"{config.path} (members of a sample must be neighbours)"
        )

    def read(self, root: str, path: str, size_bytes: int) -> None:
        num_rows, marks, ids = 0, list[int](), list[Any]()
        with open_file(root, path, size_bytes, UsageError) as handle:
            try:
                for sample in samples(handle, path, 0, lambda _, extension: _is_value(extension), self.notes):
                    if num_rows % MARK_EVERY == 0:
                        marks.append(sample.offset)
                    ids.append(self._note(sample, path))
                    num_rows += 1
            except OSError as error:
                raise UsageError(f"{joined(root, path)} cannot be read: {error}") from error
        self.ids.add(ids)
        self.num_rows.append(num_rows)
        self.marks.append(marks)

    def _note(self, sample: Sample, path: str) -> Any:
        """Learns the sample's columns; returns its id."""
        key = f"{path}/{sample.key}"
        try:
            _, values = _contents(sample, self.config.image_column)
        except RowFault as fault:
            self.broken.append(f"{key}: {fault.message}")
            return key
        self.image_extensions.update(extension for extension, _ in sample.members if suffix(extension) in IMAGES)
        for name, value in values.items():
            self.seen.setdefault(name, Seen()).add(value)
        return id_text(values.get(self.config.id_column)) if self.config.id_column else key

    def columns(self) -> pa.Schema:
        if sum(self.num_rows) > len(self.broken):
            check_names(self.config, list(self.seen), virtual=[ALL_IMAGES, *sorted(self.image_extensions)])
        self.ids.check()
        return pa.schema([pa.field(name, seen.type()) for name, seen in self.seen.items()])

    def warnings(self) -> list[str]:
        lines = [f"{number} x {note}" for note, number in sorted(self.notes.items())]
        if self.broken:
            lines.append(f"{len(self.broken)} samples cannot be read and become error rows, e.g. {self.broken[0]}")
        mixed = [name for name, seen in self.seen.items() if seen.is_mixed()]
        if mixed:
            lines.append(f"columns of mixed types, kept as text: {', '.join(mixed)}")
        if not sum(self.num_rows):
            lines.append(f"no sample in {self.config.path}")
        return lines


class Samples:
    """Rows of tar files."""

    def __init__(self, table: TableRows, inputs: Inputs) -> None:
        self._table = table
        self._root = inputs.root
        self._types = {field.name: field.type for field in inputs.columns}
        self._files = Files(inputs.files)

    def __len__(self) -> int:
        return len(self._files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for span in self._files.spans(start, stop):
            yield from self._rows_of(span)

    def _rows_of(self, span: Span) -> Iterator[Row]:
        row, offset = self._files.mark(span, MARK_EVERY)
        skip, image = span.start - row, self._table.image_column

        def wanted(number: int, extension: str) -> bool:
            return number >= skip and (_is_value(extension) or _is_image(extension, image))

        with open_file(self._root, span.path, span.size_bytes) as handle:
            try:
                for sample in samples(handle, span.path, offset, wanted):
                    if row >= span.start:
                        yield self._row(span, row, sample)
                    row += 1
                    if row >= span.stop:
                        return
            except OSError as error:
                raise RunFailed(f"{joined(self._root, span.path)} cannot be read: {error}") from error
        raise RunFailed(f"{joined(self._root, span.path)} has fewer samples than when it was planned; plan anew.")

    def _row(self, span: Span, row: int, sample: Sample) -> Row:
        index, key = span.first + row, f"{span.path}/{sample.key}"
        try:
            images, values = _contents(sample, self._table.image_column)
        except RowFault as fault:
            return self._table.lost(index, span, fault.kind, f"{key}: {fault.message}", key)
        columns = {name: conformed(values.get(name), type_) for name, type_ in self._types.items()}
        if images is None:  # a null image; a JSON key of that name is not asked, it may say any path
            values = {**values, str(self._table.image_column): None}
        return self._table.row(index, span, values, columns=columns, images=images, default_id=key)


def _contents(sample: Sample, image_column: str | None) -> tuple[tuple[ImageRef, ...] | None, dict[str, Any]]:
    """The images of a sample (None where it has none) and its other members by extension, JSON by its keys."""
    if sample.fault is not None:
        raise RowFault(Stage.READ, *sample.fault)
    images, values, objects = list[ImageRef](), dict[str, Any](), list[dict[str, Any]]()
    for extension, data in sample.members:
        kind = suffix(extension)
        if _is_image(extension, image_column):
            images.append(ImageRef(data=data))
        if data is None or not _is_value(extension):
            continue
        try:
            text = data.decode()
            value = json.loads(text) if kind == "json" else text
        except (ValueError, RecursionError) as error:
            raise RowFault(Stage.READ, type(error).__name__, f".{extension} cannot be read: {error}") from error
        if kind in NUMBERS and text.strip().lstrip("-").isdecimal():
            value = int(text)
        if kind == "json" and isinstance(value, dict):
            objects.append(value)
        else:
            values[extension] = value
    for entry in objects:  # a key never hides a member, nor an earlier key
        values = {**entry, **values}
    return tuple(images) if images or image_column is None else None, values


def _is_value(extension: str) -> bool:
    kind = suffix(extension)
    return kind == "json" or kind in TEXTS


def _is_image(extension: str, image_column: str | None) -> bool:
    return suffix(extension) in IMAGES and image_column in (ALL_IMAGES, extension)
