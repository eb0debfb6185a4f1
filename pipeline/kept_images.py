"""The images that a run keeps in its output (write.keep_images): the bytes that the model was shown."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import Plan
from pipeline.write.file import Place, open_read

_BATCH_ROWS = 16  # of images in memory
_BUFFER_BYTES = 1 << 20

Encoded = list[bytes | None]  # the images of a row


def keeps_images(plan: Plan) -> bool:
    """Whether the output of a run holds its images."""
    return bool(plan.settings.get("write.keep_images")) and plan.settings.get("dataset.image_column") is not None


class KeptImages:
    """Images by position of their row.

    A shard is read from its beginning up to the row, a few rows at a time: rows in ascending order cost one pass.
    """

    def __init__(self, output_dir: Place, plan: Plan) -> None:
        self._data_dir, self._plan = output_dir / "data", plan
        self._row_index = str(plan.settings.get("write.prefix", "")) + "row_index"
        self._column = str(plan.settings["dataset.image_column"])
        self._shard = -1
        self._rows: Iterator[tuple[int, Encoded]] = iter(())
        self._row: tuple[int, Encoded] = (-1, [])  # the latest

    def of_row(self, index: int) -> Encoded | None:
        """The images of a row; None where its shard is not there or has no images of it."""
        starts = range(self._plan.num_shards)
        shard = bisect_right(starts, index, key=lambda number: self._plan.shard(number).start) - 1
        if shard != self._shard or self._row[0] > index:
            self._shard, self._rows, self._row = shard, self._read(shard), (-1, [])
        try:
            while self._row[0] < index:
                self._row = next(self._rows)
        except (StopIteration, OSError, ValueError, pa.ArrowException):  # not published yet, or damaged
            self._shard = -1
            return None
        return self._row[1] if self._row[0] == index and self._row[1] else None

    def _read(self, shard: int) -> Iterator[tuple[int, Encoded]]:
        columns = [self._row_index, self._column]
        path = self._data_dir / f"{self._plan.shard(shard).name}.parquet"
        with (
            open_read(path) as source,
            pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as file,
        ):
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for index, images in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    yield index, [image and image["bytes"] for image in images or ()]
