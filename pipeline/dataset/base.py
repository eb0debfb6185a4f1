"""What a reader is: it scans a source once, into the plan, and from then on answers any range of rows.

    config.scan()        lists and counts the source: slow, once per plan     -> Inputs
    config.open(inputs)  opens what the plan recorded: no listing, no count   -> Dataset
    dataset.rows(a, b)   the rows a <= index < b, in plan order, undecoded    -> Row ...

A reader never decodes an image and never holds the whole source in memory. What is wrong with one row becomes
`Row.fault`; what is wrong with the source is a UsageError (before the model loads) or a RunFailed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import pyarrow as pa

from pipeline.option import option
from pipeline.records import Row

# One line per source file or archive, in plan order. `marks` are byte offsets of rows 0, MARK_EVERY, 2 * MARK_EVERY ...
# for formats that offer no random access of their own (lines, tar members); null elsewhere. `sha256` is of the contents
# where a scan reads them whole (lines); null elsewhere. A file that grew between two starts has a line for each part:
# `first_row` is the number of rows of the file that lie in lines before.
FILES_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # relative to Inputs.root, with forward slashes
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("marks", pa.list_(pa.int64())),
        pa.field("sha256", pa.string()),
        pa.field("first_row", pa.int64(), nullable=False),
    ]
)
MARK_EVERY = 128


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a scan found: enough to read any row without listing or counting again."""

    root: str  # the folder, or fsspec URL, that file paths are relative to
    files: pa.Table  # FILES_SCHEMA
    columns: pa.Schema  # the columns a row offers to templates and keeps in the output; image columns left out
    revision: str | None = None  # commit of a hub dataset
    warnings: tuple[str, ...] = field(default=())  # said once at start, e.g. "3 hidden files skipped"


class Dataset(Protocol):
    """Rows by position."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Rows start <= index < stop in order; seeks to `start` without reading what lies before it."""
        ...


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """Options that every reader obeys."""

    kind: ClassVar[str] = ""  # the registered name: what the fingerprint carries

    path: str = option("???", "folder, file, glob or fsspec URL to read; hub: the dataset's name")
    image_column: str | None = option("image", "column with the image or images of a row; null = text only")
    id_column: str | None = option(None, "column that names a row; null = relative path of the file, else row_index")
    columns: list[str] | None = option(None, "input columns to keep in the output; null = all (image bytes never)")
    messages_column: str | None = option(None, "column with a ready-made conversation; null = use the prompt template")
    max_rows: int | None = option(None, "stop after this many rows; null = all", least=0)
    root: str | None = option(None, "folder that image paths found in rows are relative to and must stay inside")
    allow_urls: bool = option(
        False, "fetch images at http(s) URLs, of public addresses alone; otherwise such rows are error rows"
    )

    def scan(self) -> Inputs:
        """List and count the source.

        Raises:
            UsageError: nothing is there, a named column is absent, or ids are null or not unique.
        """
        raise NotImplementedError(type(self).__name__)

    def open(self, inputs: Inputs) -> Dataset:
        """The rows that `inputs` describes."""
        raise NotImplementedError(type(self).__name__)
