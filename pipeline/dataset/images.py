"""Image files: a folder, a glob or a single picture. One row a file, no column but `path`."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from pipeline.dataset.base import Dataset, DatasetConfig, Inputs
from pipeline.dataset.files import NOT_A_FILE, files_table, joined
from pipeline.dataset.listing import Accepts, listed
from pipeline.dataset.patterns import brace_words, glob_regex
from pipeline.dataset.table import check_names
from pipeline.option import option
from pipeline.records import Fault, ImageRef, Row, Stage

EXTENSIONS = "jpg jpeg png webp gif bmp tif tiff avif ppm"
COLUMNS = pa.schema([pa.field("path", pa.string())])
_CHUNK_ROWS = 4096  # rows that are Python objects at a time


@dataclass(kw_only=True, slots=True)
class ImagesConfig(DatasetConfig):
    """Every image file of a folder, of a glob, or one file."""

    kind: ClassVar[str] = "images"

    pattern: str = option(EXTENSIONS, "extensions or globs of the files to take, any case; * takes every file")

    def scan(self) -> Inputs:
        check_names(self, ["path"], virtual=[self.image_column] if self.image_column else [])
        listing = listed(self.path, accepted(self.pattern))
        warnings = list(listing.warnings)
        if listing.num_others:
            warnings.append(f"{listing.num_others} files in {listing.root} do not fit dataset.pattern={self.pattern}")
        table = files_table(listing.paths, listing.sizes, [1] * len(listing.paths))
        return Inputs(listing.root, table, COLUMNS, warnings=tuple(warnings))

    def open(self, inputs: Inputs) -> Dataset:
        return ImageFiles(inputs, with_images=self.image_column is not None)


class ImageFiles:
    """Rows of an images dataset."""

    def __init__(self, inputs: Inputs, with_images: bool) -> None:
        self._root = inputs.root
        self._files = inputs.files
        self._with_images = with_images

    def __len__(self) -> int:
        return int(self._files.num_rows)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start} to {stop} of a dataset of {len(self)} rows")
        for chunk in range(start, stop, _CHUNK_ROWS):
            part = self._files.slice(chunk, min(_CHUNK_ROWS, stop - chunk))
            names, sizes = part["path"].to_pylist(), part["size_bytes"].to_pylist()
            for index, (name, size) in enumerate(zip(names, sizes, strict=True), start=chunk):
                path = joined(self._root, name)
                fault = _fault(path) if size == NOT_A_FILE else None
                images = (ImageRef(path=path),) if self._with_images and fault is None else ()
                yield Row(index, name, images, {"path": name}, fault=fault)


def accepted(pattern: str) -> Accepts:
    """What tells whether a relative path fits dataset.pattern: words that are extensions, or globs over the name.

    A glob with a slash is held against the whole relative path.
    """
    words = [name for word in re.split(r"[\s,]+(?![^{]*\})", pattern) for name in brace_words(word) if name]
    if "*" in words:
        return lambda path: True
    extensions = {word.lower().removeprefix("*").removeprefix(".") for word in words if not _is_glob(word)}
    globs = [(glob_regex(word.lower()), "/" in word) for word in words if _is_glob(word)]

    def accepts(path: str) -> bool:
        lower = path.lower()
        name = lower.rpartition("/")[2]
        stem, _, extension = name.rpartition(".")
        if stem and extension in extensions:
            return True
        return any(glob.fullmatch(lower if whole else name) is not None for glob, whole in globs)

    return accepts


def _is_glob(word: str) -> bool:
    return re.fullmatch(r"(\*?\.)?\w+", word) is None


def _fault(path: str) -> Fault | None:
    """Why a path that was listed but no regular file cannot be read; None if it has become one."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reason = "is a link to nothing" if os.path.islink(path) else "is not there, or its name is not UTF-8"
        return Fault(Stage.READ, type(error).__name__, f"{path} {reason}.")
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    kind = kinds.get(stat.S_IFMT(mode), "no regular file")
    return Fault(Stage.READ, "NotARegularFile", f"{path} is {kind}; it was not opened.")
