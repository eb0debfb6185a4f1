"""The files of a plan: the table Inputs.files, asked by row number, and how one of them is opened."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa

from pipeline.dataset.base import FILES_SCHEMA
from pipeline.errors import RunFailed, VlmBatchError

NOT_A_FILE = -1  # the size of what is listed but is no regular file: a FIFO, a device, a dangling link


@dataclass(frozen=True, slots=True)
class Span:
    """Rows start <= row < stop of one file; its row r is row `first` + r of the dataset."""

    number: int
    path: str
    size_bytes: int
    first: int
    start: int
    stop: int


class Files:
    """Finds the files that hold a range of rows, without a Python object for each file of the plan."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        self.ends = np.cumsum(self.table["num_rows"].to_numpy(), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The parts of files that rows start <= index < stop lie in."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start} to {stop} of a dataset of {len(self)} rows")
        number = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = int(self.ends[number])
            num_rows = self.table["num_rows"][number].as_py()
            if num_rows:
                path, size = self.table["path"][number].as_py(), self.table["size_bytes"][number].as_py()
                first = end - num_rows - self.table["first_row"][number].as_py()
                yield Span(number, path, size, first, start - first, min(stop, end) - first)
            start, number = min(stop, end), number + 1

    def mark(self, span: Span, mark_every: int) -> tuple[int, int]:
        """The last marked row at or before the span's start: its number in the file and its byte offset."""
        number = span.start // mark_every
        return number * mark_every, int(self.table["marks"][span.number][number].as_py())


def files_table(
    paths: Sequence[str],
    sizes: Sequence[int],
    num_rows: Sequence[int],
    marks: Sequence[list[int]] | None = None,
    hashes: Sequence[str] | None = None,
) -> pa.Table:
    """FILES_SCHEMA, built column by column."""
    types = {field.name: field.type for field in FILES_SCHEMA}
    columns = [
        pa.array(paths, types["path"]),
        pa.array(sizes, types["size_bytes"]),
        pa.array(num_rows, types["num_rows"]),
        pa.nulls(len(paths), types["marks"]) if marks is None else pa.array(marks, types["marks"]),
        pa.nulls(len(paths), types["sha256"]) if hashes is None else pa.array(hashes, types["sha256"]),
        pa.repeat(pa.scalar(0, types["first_row"]), len(paths)),
    ]
    return pa.Table.from_arrays(columns, schema=FILES_SCHEMA)


def is_local(path: str) -> bool:
    """Whether a path is read by the operating system rather than by fsspec."""
    return path.startswith(("/", "file://")) or not ("://" in path or "::" in path)


def local_path(path: str) -> str:
    """The absolute path that a local path or file:// URL means."""
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def joined(root: str, path: str) -> str:
    """A path below a root; in a chained URL (zip://inner::s3://outer) below its first path."""
    if is_local(root):
        return os.path.join(root, path)
    links = root.split("::")
    first = next((number for number, link in enumerate(links) if "://" in link), 0)
    links[first] += path if links[first].endswith("/") else f"/{path}"
    return "::".join(links)


def open_file(root: str, path: str, size_bytes: int, error: type[VlmBatchError] = RunFailed) -> IO[bytes]:
    """Open a planned file for reading; `size_bytes` is what the plan says of it.

    Raises:
        error: the file is gone, unreadable, no regular file, or of another size than planned.
    """
    url = joined(root, path)
    handle: IO[bytes]
    size: int | None
    try:
        if is_local(root):
            if not stat.S_ISREG(os.stat(url).st_mode):  # opening a FIFO would wait for ever
                raise error(f"{url} is not a regular file.")
            handle = open(url, "rb")  # noqa: SIM115 - the caller closes it
            size = os.fstat(handle.fileno()).st_size
        else:
            import fsspec

            handle = fsspec.open(url, "rb").open()
            if isinstance(handle, io.BytesIO):  # fsspec's memory files have one position for all who open them
                handle = io.BytesIO(handle.getvalue())
            size = getattr(handle, "size", None) if size_bytes else None  # not every store tells sizes
    except (OSError, ImportError, ValueError) as cause:
        raise error(f"{url} cannot be opened: {cause}") from cause
    if size is not None and size != size_bytes:
        handle.close()
        raise error(f"{url} has {size} bytes, but {size_bytes} when it was listed. Restore it, or plan anew.")
    return handle
