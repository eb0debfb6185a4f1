"""audit deep=true: what costs as much as reading everything again, the images of the source included.

The pages of a shard have checksums, its footer has none: what it says of the columns (statistics, by which queries pass
over rows) is compared with what the rows give. Each image is read and hashed again, so that other bytes under the same
name and size are found, as are lines of a manifest that were edited in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.files import open_file
from pipeline.dataset.registry import planned_reader
from pipeline.errors import RowFault, RunFailed
from pipeline.plan import Plan, read_inputs
from pipeline.prompt.image import image_bytes
from pipeline.records import ImageRef, Row, Shard
from pipeline.write.shard import write_content

_NUM_THREADS = 16  # they wait for storage
_MAX_EXAMPLES = 3


class DeepAudit:
    """Compares shards with the source, one after the other.

    Args:
        root: where the source lies now; None = where the plan found it.

    Raises:
        RunFailed: the plan's inputs are missing.
        UsageError: the reader of the source needs a package that is not installed.
    """

    def __init__(self, output_dir: Path, plan: Plan, prefix: str, root: str | None) -> None:
        self._inputs = read_inputs(output_dir, plan)
        if root is not None:
            self._inputs = replace(self._inputs, root=root)
        reader = planned_reader(plan.settings)
        self._dataset = reader.open(self._inputs)
        self._allow_urls = reader.allow_urls
        self._prefix = prefix
        self._pool = ThreadPoolExecutor(_NUM_THREADS)
        self.num_images = 0  # compared

    def source(self) -> Iterator[str]:
        """Problems of the source's files that were hashed when they were planned."""
        files = self._inputs.files
        hashed = files.filter(files["sha256"].is_valid()).select(["path", "size_bytes", "sha256"])
        for name, size_bytes, sha256 in dict.fromkeys(zip(*(column.to_pylist() for column in hashed), strict=True)):
            try:
                with open_file(self._inputs.root, name, size_bytes) as handle:
                    now = _digest(handle)
            except (RunFailed, OSError) as problem:
                yield str(problem)
                continue
            if now != sha256:
                yield f"{name} was edited since it was planned; restore it, or choose another output_dir"

    def shard(self, path: Path, shard: Shard, table: pa.Table) -> Iterator[str]:
        """Problems of a shard whose rows were read, page checksums verified."""
        if _statistics(pq.read_metadata(path)) != _statistics(_written_again(table)):
            yield f"{path} is damaged (statistics in its footer). Delete it and run again: only its rows are redone."
        records: dict[int, list[str]] = {}
        columns = (table[self._prefix + name].to_pylist() for name in ("row_index", "image_sha256"))
        for index, hashes in zip(*columns, strict=True):
            if hashes:
                records[index] = hashes
        changed = []
        rows = (row for row in self._dataset.rows(shard.start, shard.stop) if row.index in records)
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
            return hashlib.sha256(image_bytes(ref, allow_urls=self._allow_urls)).hexdigest()
        except RowFault:
            return None


def _digest(handle: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _written_again(table: pa.Table) -> pq.FileMetaData:
    sink = BytesIO()
    write_content(table, sink, "none")
    return pq.read_metadata(sink)


def _statistics(footer: pq.FileMetaData) -> list[Any]:
    """What a footer says of the values in each part of each column."""
    chunks = (
        footer.row_group(group).column(column)
        for group in range(footer.num_row_groups)
        for column in range(footer.num_columns)
    )
    return [
        (chunk.path_in_schema, chunk.num_values, chunk.statistics and chunk.statistics.to_dict()) for chunk in chunks
    ]
