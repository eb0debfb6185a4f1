"""A shard's file: written beside, checked, then published under its name by an exclusive create.

A shard is done exactly when data/part-NNNNN.parquet exists and carries the plan's id. The name appears in one step and
only over a whole file; of two workers that finish the same shard one wins and the other discards its copy.

An object store has no second name to write it under: there the bytes are made and checked in memory, and put at once.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RunFailed
from pipeline.records import Shard
from pipeline.write.crash_point import crash_point, crashing_file
from pipeline.write.file import NO_HARD_LINKS, Place, open_read, sync_directory
from pipeline.write.object_store import ObjectPath
from pipeline.write.schema import ShardSummary

_NAME = re.compile(r"part-(\d{5,})\.parquet")
_NUM_THREADS = 32  # that read footers of an object store: they wait for replies
_FOOTER_BYTES = 64 * 1024  # enough for most; a longer one costs a second request
_MOST_FOOTER_BYTES = 64 * 1024**2


def published_shards(data_dir: Place, plan_id: str, expected: Iterable[int] = ()) -> dict[int, ShardSummary]:
    """The shards of this plan that are done, by number. Foreign, damaged and empty files are not done.

    expected: numbers that are looked for by name where the listing lacks them. A network file system may list a new
        file seconds late and open it at once.
    """
    files = dict(shard_files(data_dir))
    files |= {number: data_dir / f"{Shard(number, 0, 0).name}.parquet" for number in expected if number not in files}
    return summaries_of_plan(dict(sorted(files.items())), plan_id)


def summaries_of_plan(files: Mapping[int, Place], plan_id: str) -> dict[int, ShardSummary]:
    """Those of the files that are published shards of this plan, with what their footers say."""
    if any(isinstance(path, ObjectPath) for path in files.values()):
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            summaries = pool.map(lambda path: summary_of_plan(path, plan_id), files.values())
            return {number: found for number, found in zip(files, summaries, strict=True) if found}
    return {number: found for number, path in files.items() if (found := summary_of_plan(path, plan_id))}


def shard_files(data_dir: Place) -> Iterator[tuple[int, Place]]:
    """Regular files in the output folder that have the name of a shard, by number; no name has two spellings."""
    if isinstance(data_dir, ObjectPath):
        yield from ((number, path) for path in data_dir.glob("part-*.parquet") if (number := _number(path.name)) >= 0)
        return
    try:
        entries = sorted(os.scandir(data_dir), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if (number := _number(entry.name)) >= 0 and _is_file(entry):
            yield number, Path(entry.path)


def _number(name: str) -> int:
    """Of the shard with this file name; -1 where it is the name of none."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and f"{int(match[1]):05d}" == match[1] else -1


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def shard_summary(path: Place) -> ShardSummary | None:
    """The footer's summary; None where there is no file, no whole footer, or none of ours.

    Raises:
        RunFailed: the file is there and cannot be read now, which says nothing about what is in it.
    """
    try:
        if isinstance(path, ObjectPath):
            return ShardSummary.from_metadata(pq.read_metadata(BytesIO(_footer(path))).metadata)
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
            return None
        # The file is opened here: a path given to pyarrow starts its file system layer, which costs 20 ms.
        with open(path, "rb") as file:
            return ShardSummary.from_metadata(pq.read_metadata(file).metadata)
    except (FileNotFoundError, NotADirectoryError, pa.ArrowException, ValueError):  # no UTF-8 in a damaged name
        return None
    except OSError as problem:
        if problem.errno is None:  # pyarrow's word for a damaged footer
            return None
        raise RunFailed(
            f"{path} cannot be read: {problem.strerror or problem}. It may be a finished shard, so nothing is put in "
            "its place; make it readable, or delete it, and run the same command again."
        ) from problem


def _footer(path: ObjectPath) -> bytes:
    """A Parquet file's footer between its two marks, which is all that a reader of metadata looks at."""
    tail = path.read_tail(_FOOTER_BYTES)
    size_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if _FOOTER_BYTES < size_bytes <= _MOST_FOOTER_BYTES:  # else a damaged length would ask for gigabytes
        tail = path.read_tail(size_bytes)
    return b"PAR1" + tail[-size_bytes:]


def summary_of_plan(path: Place, plan_id: str) -> ShardSummary | None:
    """The footer's summary where the file is a published shard of this plan, else None."""
    summary = shard_summary(path)
    return summary if summary is not None and summary.plan_id == plan_id else None


def read_shard(path: Place, columns: list[str] | None = None) -> pa.Table:
    """The rows of a published shard, page checksums verified.

    Raises:
        RunFailed: the file is damaged.
    """
    return _read(path, path, columns)


def _read(source: Place | IO[bytes], path: Place, columns: list[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(_opened(source), page_checksum_verification=True) as file:
            return file.read(columns)
    except (OSError, ValueError, pa.ArrowException) as problem:  # a name that is no UTF-8 is a ValueError
        raise RunFailed(
            f"{path} is damaged ({problem}). Delete it and run again: only its rows are asked for anew."
        ) from problem


def publish_shard(
    table: pa.Table,
    summary: ShardSummary,
    *,
    final: Place,
    attempt_path: Place,
    compression: str,
    confirm: Callable[[], None] = lambda: None,
) -> bool:
    """Write `table` to `attempt_path`, check what is on disk, and give it its final name.

    attempt_path: not used in an object store.
    confirm: called right before that; raises if the name is not to be given any more.

    Returns:
        True if this call published it; False if the shard of the same plan was there already and ours was discarded.

    Raises:
        RunFailed: the disk is full, the folder is gone, or the written file does not read back.
    """
    table = table.replace_schema_metadata(summary.to_metadata())
    won = False
    try:
        if isinstance(final, ObjectPath):
            return _put(table, summary.plan_id, final, compression, confirm)
        assert isinstance(attempt_path, Path)
        try:
            _write(table, attempt_path, compression)
            crash_point("shard_closed")
            _check(table, attempt_path, attempt_path)
            crash_point("shard_checked")
            confirm()
            won = _publish(attempt_path, final, summary.plan_id)
        except (OSError, RunFailed):
            # It may be there all the same: the worker that was quicker has cleared work/ away, our copy included, or a
            # network file system lost its reply.
            if not summary_of_plan(final, summary.plan_id):
                raise
        crash_point("shard_published")
        sync_directory(final.parent)
        return won
    except OSError as problem:
        raise RunFailed(
            f"{final} could not be written: {problem.strerror or problem}. Finished answers are kept in the journals; "
            "make room or restore the folder and run the same command again."
        ) from problem
    finally:
        with suppress(OSError):  # a folder that is gone or read-only says so above
            if isinstance(attempt_path, Path):
                attempt_path.unlink()


def _put(table: pa.Table, plan_id: str, final: ObjectPath, compression: str, confirm: Callable[[], None]) -> bool:
    """As publish_shard, without a file beside."""
    file = BytesIO()
    crash_point("shard_opened")
    write_content(table, file, compression)
    crash_point("shard_written")
    crash_point("shard_closed")
    _check(table, BytesIO(file.getvalue()), final)
    crash_point("shard_checked")
    confirm()
    won = final.create(file.getvalue())
    while not won and not summary_of_plan(final, plan_id):
        # Another plan's or a damaged one: replaced in one step, unless somebody has just done so.
        won = final.exchange(file.getvalue(), final.version())
    crash_point("shard_published")
    if not summary_of_plan(final, plan_id):
        raise RunFailed(f"{final} does not read back as it was put; the store is not to be trusted.")
    return won


def _write(table: pa.Table, path: Path, compression: str) -> None:
    # Not `with ParquetWriter(...)`: on an exception that writes a valid footer over half the rows.
    with open(path, "xb") as file:
        crash_point("shard_opened")
        write_content(table, crashing_file(file, "shard_bytes"), compression)
        crash_point("shard_written")
        file.flush()
        os.fsync(file.fileno())


def write_content(table: pa.Table, file: IO[bytes], compression: str) -> None:
    """A shard's bytes; the same for the same table and pyarrow."""
    pq.write_table(
        table,
        file,
        compression=compression,
        write_page_checksum=True,
        row_group_size=max(1, min(len(table), 10_000)),
    )


def _opened(source: Place | IO[bytes]) -> Path | IO[bytes]:
    return open_read(source) if isinstance(source, ObjectPath) else source


def _check(table: pa.Table, source: Path | IO[bytes], path: Place) -> None:
    written = _read(source, path)
    if written.num_rows != table.num_rows or not written.schema.equals(table.schema):
        raise RunFailed(f"{path} does not read back as it was written; the storage is not to be trusted.")


def _publish(attempt_path: Path, final: Path, plan_id: str) -> bool:
    try:
        os.link(attempt_path, final)
        return True
    except FileExistsError:
        # A lost reply can turn success into "exists" (NFS): then both names are the same file.
        if _same_file(attempt_path, final):
            return True
        if summary_of_plan(final, plan_id):
            return False
        if final.is_dir():
            raise RunFailed(f"{final} is a folder where a shard has to be; move it away and run again.") from None
    except OSError as problem:
        if problem.errno not in NO_HARD_LINKS:
            raise
        if summary_of_plan(final, plan_id):
            return False
    # Another plan's file, a damaged one, or no hard links here: replaced in one step, never deleted first.
    os.replace(attempt_path, final)
    return True


def _same_file(first: Path, second: Path) -> bool:
    try:
        a, b = os.stat(first), os.stat(second)
    except FileNotFoundError:
        return False
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino) and stat.S_ISREG(a.st_mode)
