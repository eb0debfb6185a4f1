"""format=arrow: all shards in one Arrow file (IPC, "Feather version 2"), which readers map into memory as it is."""

from __future__ import annotations

import pyarrow as pa

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
    return in_one_file(selection, options, output_dir, name="answers.arrow", writer=pa.ipc.new_file)
