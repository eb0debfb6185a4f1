"""resume=extend: the files of a plan, and behind them those that were added to the source since."""

from __future__ import annotations

import logging
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.base import Inputs
from pipeline.errors import UsageError

log = logging.getLogger(__name__)

_MAX_EXAMPLES = 3


def extended_inputs(planned: Inputs, found: Inputs) -> Inputs:
    """What is planned, in its order, then the files that a new scan found besides. Ids were checked by the scan.

    A planned file that is gone stays in the plan: its rows are answered, or will be error rows.

    Raises:
        UsageError: a planned file has another size or number of rows, or the columns are others.
    """
    if not found.columns.equals(planned.columns):
        raise UsageError(
            f"resume=extend: the input has the columns {_types(found.columns)}, and was planned with "
            f"{_types(planned.columns)}. Choose another output_dir."
        )
    old, new = planned.files, found.files
    is_old = pc.is_in(new["path"], old["path"])
    again = new.filter(is_old)
    if len(pc.unique(again["path"])) < len(pc.unique(old["path"])):
        log.warning("resume=extend: files of the plan are gone; answers about them stay")
    sizes = dict(zip(old["path"].to_pylist(), _facts(old), strict=True))
    pairs = zip(again["path"].to_pylist(), _facts(again), strict=True)
    if changed := [path for path, facts in pairs if sizes[path] != facts]:
        shown = ", ".join(changed[:_MAX_EXAMPLES]) + (" ..." if len(changed) > _MAX_EXAMPLES else "")
        raise UsageError(
            f"resume=extend takes in new files, but {len(changed)} of the plan have changed: {shown}. Restore them, "
            "put what is new into files of its own, or choose another output_dir."
        )
    files = pa.concat_tables([old, new.filter(pc.invert(is_old))]).combine_chunks()
    return replace(found, root=found.root, files=files, revision=found.revision)


def _facts(files: pa.Table) -> list[tuple[int, int]]:
    return list(zip(files["size_bytes"].to_pylist(), files["num_rows"].to_pylist(), strict=True))


def _types(columns: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in columns) or "none"
