"""audit deep=true: what costs as much as reading everything again, the images of the source included.

The pages of a shard have checksums, its footer has none: what it says of the columns (statistics, by which queries
pass over rows) is compared with a footer that is written anew of the rows. Each image is read and hashed again, so that
other bytes under the same name and size are found, as are lines of a manifest that were edited in place.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.files import open_file
from pipeline.errors import RowFault, RunFailed
from pipeline.plan import Plan
from pipeline.prompt.image import image_bytes
from pipeline.records import ImageRef, Row, Shard
from pipeline.source_images import source_of
from pipeline.write.file import Place, open_read
from pipeline.write.shard import write_content

_NUM_THREADS = 16  # they wait for storage
_MAX_EXAMPLES = 3
_WRITER = re.compile(r"parquet-cpp-arrow version \d+\.\d+\.\d+")


class DeepAudit:
    """Compares shards with the source, one after the other.

    Args:
        root: where the source lies now; None = where the plan found it.

    Raises:
        RunFailed: the plan's inputs are missing.
        UsageError: the reader of the source needs a package that is not installed.
    """

    def __init__(self, output_dir: Place, plan: Plan, prefix: str, root: str | None) -> None:
        self._source = source_of(output_dir, plan, root)
        self._prefix = prefix
        self._pool = ThreadPoolExecutor(_NUM_THREADS)
        self.num_images = 0  # compared
        self.num_unlike = 0  # shards of another pyarrow, whose footers cannot be compared

    def source(self) -> Iterator[str]:
        """Problems of the source's files that were hashed when they were planned."""
        files = self._source.inputs.files
        hashed = files.filter(files["sha256"].is_valid()).select(["path", "size_bytes", "sha256"])
        for name, size_bytes, sha256 in dict.fromkeys(zip(*(column.to_pylist() for column in hashed), strict=True)):
            try:
                with open_file(self._source.inputs.root, name, size_bytes) as handle:
                    now = _digest(handle)
            except (RunFailed, OSError) as problem:
                yield str(problem)
                continue
            if now != sha256:
                yield f"{name} was edited since it was planned; restore it, or choose another output_dir"

    def shard(self, path: Place, shard: Shard, table: pa.Table) -> Iterator[str]:
        """Problems of a shard whose rows were read, page checksums verified."""
        try:
            is_whole = _footer_is_whole(path, table)
        except (ValueError, KeyError, OSError, pa.ArrowException):  # what names and numbers in a damaged one lead to
            is_whole = False
        if is_whole is None:
            self.num_unlike += 1
        elif not is_whole:
            yield f"{path} is damaged (its footer). Delete it and run again: only its rows are asked for anew."
        records: dict[int, list[str]] = {}
        columns = (table[self._prefix + name].to_pylist() for name in ("row_index", "image_sha256"))
        for index, hashes in zip(*columns, strict=True):
            if hashes:
                records[index] = hashes
        changed = []
        rows = (row for row in self._source.dataset.rows(shard.start, shard.stop) if row.index in records)
        try:
            while some := list(islice(rows, 4 * _NUM_THREADS)):
                for row, hashes in zip(some, self._pool.map(self._hashes, some), strict=True):
                    self.num_images += len(hashes)
                    if not set(hashes) <= set(records[row.index]):
                        changed.append(row.id)
        except RunFailed as problem:
            yield str(problem)
        if changed:
            shown = ", ".join(changed[:_MAX_EXAMPLES]) + (" ..." if len(changed) > _MAX_EXAMPLES else "")
            yield (
                f"{path}: {len(changed)} rows were asked about other images than are there now, or theirs are gone: "
                f"{shown}. Restore the images, or delete the shard and run again: only its rows are asked for anew."
            )

    def _hashes(self, row: Row) -> list[str | None]:
        return [self._hash(ref) for ref in row.images]

    def _hash(self, ref: ImageRef) -> str | None:
        try:
            return hashlib.sha256(image_bytes(ref, allow_urls=self._source.allow_urls)).hexdigest()
        except RowFault:
            return None


def _digest(handle: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _footer_is_whole(path: Place, table: pa.Table) -> bool | None:
    """Whether a file ends as one that is written anew of its rows; None where another pyarrow wrote it.

    The statistics in a damaged footer are not looked at one by one: pyarrow ends the process at some of them.
    """
    with open_read(path) as file:
        found = pq.read_metadata(file)
    sink = BytesIO()
    codec = found.row_group(0).column(0).compression if found.num_row_groups else "NONE"
    write_content(table, sink, codec.replace("UNCOMPRESSED", "NONE"))
    again = pq.read_metadata(sink)
    if again.created_by != found.created_by:
        return None if _WRITER.fullmatch(found.created_by) else False
    with open_read(path) as file:
        return _footer(file, found) == _footer(sink, again)


def _footer(file: IO[bytes], footer: pq.FileMetaData) -> bytes:
    """Its bytes, but for the types of the columns: those were compared, and have several forms that mean the same."""
    size_bytes = file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(size_bytes - length)
    return file.read(length).replace(footer.metadata[b"ARROW:schema"], b"")
