"""resume=extend: the files of a plan, and behind them the files and lines that were added to the source since.

A manifest that grew is told from one that was edited by the hash of its old part, and by its old rows: the last of
them must read the same with the new lines behind it (a line without its end, or an open quote, would swallow them).
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import replace
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.base import MARK_EVERY, Inputs
from pipeline.dataset.files import joined, open_file
from pipeline.dataset.lines import records
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

_MAX_EXAMPLES = 3


def extended_inputs(planned: Inputs, found: Inputs, has_ids: bool) -> Inputs:
    """What is planned, in its order, then the rows that a new scan found besides. Ids were checked by the scan.

    A planned file that is gone stays in the plan: its rows are answered, or will be error rows.

    has_ids: rows have their ids from a column, which only a file that is there can be asked for.

    Raises:
        UsageError: a planned file has changed otherwise than by lines at its end, or is gone with its ids, or the
            columns are others.
    """
    if not found.columns.equals(planned.columns):
        raise UsageError(
            f"resume=extend: the input has the columns {_types(found.columns)}, and was planned with "
            f"{_types(planned.columns)}. Choose another output_dir."
        )
    is_old = pc.is_in(found.files["path"], planned.files["path"])
    again, new = found.files.filter(is_old), found.files.filter(pc.invert(is_old))
    old = _by_path(planned.files)
    if again.num_rows < old.num_rows:
        if has_ids:
            raise UsageError(
                "resume=extend: files of the plan are gone, and new ids (dataset.id_column) cannot be compared with "
                "theirs. Restore them, or choose another output_dir."
            )
        log.warning("resume=extend: files of the plan are gone; answers about them stay")
    facts = again.select(["path", "size_bytes", "num_rows", "sha256"])
    pairs = old.join(facts, keys="path", right_suffix="_now", join_type="inner")
    same = pc.and_(
        pc.equal(pairs["size_bytes"], pairs["size_bytes_now"]), pc.equal(pairs["num_rows"], pairs["num_rows_now"])
    )
    files = planned.files
    changed = []
    for pair in pairs.filter(pc.invert(same)).sort_by("path").to_pylist():
        marks = again.filter(pc.equal(again["path"], pair["path"]))["marks"][0].as_py()
        if _has_grown(found.root, pair, marks):
            files = _with_growth(files, pair, marks)
        else:
            changed.append(pair["path"])
    if changed:
        shown = ", ".join(changed[:_MAX_EXAMPLES]) + (" ..." if len(changed) > _MAX_EXAMPLES else "")
        raise UsageError(
            f"resume=extend takes in new files, and lines behind those of a manifest, but {len(changed)} files of the "
            f"plan have changed otherwise: {shown}. Restore them, put what is new into files of its own, or choose "
            "another output_dir."
        )
    return replace(found, files=pa.concat_tables([files, new]).combine_chunks())


def _by_path(files: pa.Table) -> pa.Table:
    """One line a file: of one that grew before, the last, with the rows of all its parts."""
    totals = files.select(["path", "num_rows"]).group_by("path").aggregate([("num_rows", "sum")])
    whole = files.filter(pc.equal(files["first_row"], 0)).drop_columns(["num_rows", "marks", "first_row"])
    return whole.join(totals.rename_columns(["path", "num_rows"]), keys="path")


def _has_grown(root: str, pair: dict[str, Any], marks: list[int] | None) -> bool:
    """Whether the file holds what it held, row by row, and more behind it."""
    path, size_bytes, num_rows = pair["path"], pair["size_bytes"], pair["num_rows"]
    if not (pair["sha256"] and marks and size_bytes < pair["size_bytes_now"] and num_rows <= pair["num_rows_now"]):
        return False
    try:
        with (
            open_file(root, path, pair["size_bytes_now"], UsageError) as now,
            open_file(root, path, pair["size_bytes_now"], UsageError) as whole,
            io.BufferedReader(_Head(whole, size_bytes)) as before,
        ):
            if hashlib.file_digest(before, "sha256").hexdigest() != pair["sha256"]:
                return False
            block = max(num_rows - 1, 0) // MARK_EVERY
            offset = marks[block] if num_rows else 0
            last_rows = num_rows - block * MARK_EVERY
            rows = [repr(record) for record in records(before, path, offset)]
            return rows == [repr(record) for record in islice(records(now, path, offset), last_rows)]
    except OSError as error:
        raise UsageError(f"{joined(root, path)} cannot be read: {error}") from error


def _with_growth(files: pa.Table, pair: dict[str, Any], marks: list[int] | None) -> pa.Table:
    """Each part of the file with its size and hash of now, and a part with the new rows at the end."""
    is_part = pc.equal(files["path"], pair["path"])
    for name in ("size_bytes", "sha256"):
        values = pc.if_else(is_part, pa.scalar(pair[f"{name}_now"], files.schema.field(name).type), files[name])
        files = files.set_column(files.schema.get_field_index(name), files.schema.field(name), values)
    part = {"path": pair["path"], "size_bytes": pair["size_bytes_now"], "sha256": pair["sha256_now"], "marks": marks}
    part |= {"first_row": pair["num_rows"], "num_rows": pair["num_rows_now"] - pair["num_rows"]}
    return pa.concat_tables([files, pa.Table.from_pylist([part], schema=files.schema)])


class _Head(io.RawIOBase):
    """The first bytes of a file that has more."""

    def __init__(self, handle: IO[bytes], num_bytes: int) -> None:
        self._handle, self._num_bytes = handle, num_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._handle.seek(offset, whence)

    def readinto(self, buffer: WriteableBuffer) -> int:
        num_bytes = min(len(memoryview(buffer)), max(self._num_bytes - self._handle.tell(), 0))
        content = self._handle.read(num_bytes)
        memoryview(buffer)[: len(content)] = content
        return len(content)


def _types(columns: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in columns) or "none"
