"""format=parquet: all shards in one Parquet file, kept images included."""

from __future__ import annotations

from functools import partial

import pyarrow.parquet as pq

from pipeline.export.one_file import in_one_file
from pipeline.export.options import COMMON, Errors, ExportOptions
from pipeline.export.selection import Selection
from pipeline.write.file import Place

OBEYED = COMMON | {"to", "errors", "columns"}
ERRORS = Errors.include


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write the file; where it is, as a phrase.

    Raises:
        UsageError, RunFailed: as in_one_file().
    """
    writer = partial(pq.ParquetWriter, compression="zstd", write_page_checksum=True)
    return in_one_file(selection, options, output_dir, name="answers.parquet", writer=writer)
