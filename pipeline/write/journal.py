"""The journal of a shard: finished answers on disk before the shard is whole.

A journal is one attempt's file, `work/part-00042.<attempt>.journal`, only ever appended to by its owner:

    magic | length u32 | crc32 u32 | payload | length u32 | crc32 u32 | payload | ...

The first payload is a JSON header (JournalHeader), each later one an Arrow IPC stream of some answers. Whatever stands
behind the first frame that is short, empty or fails its checksum is ignored: it is the tail of a process that was
killed, or the zeros of a machine that lost power. Nobody appends to a file whose end may be torn: what is written
behind a torn frame would be lost with it.

An object store appends nothing: there each append is a journal of its own, `work/part-00042.<attempt>-K.journal`.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.write.crash_point import crash_point, crashing_file
from pipeline.write.file import Place, open_read, sync_directory
from pipeline.write.object_store import ObjectPath

log = logging.getLogger(__name__)

_MAGIC = b"vlmbatchj1\n"
_FRAME = struct.Struct("<II")  # payload length in bytes, crc32 of the payload
_ERROR = {"status", "error_stage", "error_type"}  # columns of answers


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """What the answers of a journal are for."""

    plan_id: str
    shard: int
    generation: int  # of the shard's file that they will be in


class Appendable(Protocol):
    """An open journal of this attempt."""

    def append(self, rows: pa.RecordBatch) -> None:
        """Write the answers and have the disk, or the store, confirm them."""
        ...

    def close(self) -> None: ...


def new_journal(path: Place, header: JournalHeader) -> Appendable:
    """A journal for an attempt's answers.

    Raises:
        OSError: it cannot be written, or is there already.
    """
    return Segments(path, header) if isinstance(path, ObjectPath) else Journal(path, header)


class Segments:
    """A journal in an object store: an object for each append, none of which is ever changed."""

    def __init__(self, path: ObjectPath, header: JournalHeader) -> None:
        self._path, self._header, self._number = path, header, 0

    def append(self, rows: pa.RecordBatch) -> None:
        """See Appendable."""
        path = self._path.with_name(f"{self._path.stem}-{self._number}.journal")
        crash_point("journal_created")
        if not path.create(_MAGIC + _frame(_header_payload(self._header)) + _frame(_payload(rows))):
            raise FileExistsError(f"{path} is there already: two attempts have one name")
        crash_point("journal_appended")
        crash_point("journal_synced")
        self._number += 1

    def close(self) -> None:
        """Nothing is open."""


class Journal:
    """An open journal of this attempt in a file. Not safe for two threads at once: the ledger holds a lock around it.

    After an OSError the file may end in half a frame: close it and go on in a new one.
    """

    def __init__(self, path: Path, header: JournalHeader) -> None:
        self.path = path
        # "x": the name carries the attempt, so an existing file means that two attempts share an identity. Unbuffered:
        # what a full disk refused must not lie in a buffer that a later close() writes.
        file = open(path, "xb", buffering=0)  # noqa: SIM115 - held until close()
        self._file = crashing_file(file, "journal_bytes")
        try:
            self._write(_MAGIC + _frame(_header_payload(header)))
            sync_directory(path.parent)  # a file that the disk has is lost with a name that it has not
            crash_point("journal_created")
        except OSError:
            self._file.close()
            raise

    def append(self, rows: pa.RecordBatch) -> None:
        """See Appendable."""
        self._write(_frame(_payload(rows)))
        crash_point("journal_appended")
        os.fsync(self._file.fileno())
        crash_point("journal_synced")

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


def read_journal(path: Place, header: JournalHeader, *, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The answers of a journal up to its first damaged frame; nothing if it is for something else."""
    batches: list[pa.RecordBatch] = []
    for number, (_, payload) in enumerate(_frames(path)):
        if number == 0:
            if json.loads(payload) != asdict(header):
                return []
            continue
        with pa.ipc.open_stream(payload) as stream:
            if not stream.schema.equals(schema):
                return []
            batches.extend(stream)
    return batches


@dataclass(slots=True)
class JournalCount:
    """Answers of one journal and the errors among them, for a status: whole frames only.

    It may look again as the journal grows: what it has counted is not read again.
    """

    num_rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # "stage/type" -> answers
    num_bytes: int = 0  # that were counted
    is_foreign: bool = False  # of another plan

    def look(self, path: Place, *, plan_id: str) -> None:
        """Count what was appended since the last look."""
        if self.is_foreign:
            return
        begins = self.num_bytes == 0
        for end, payload in _frames(path, self.num_bytes):
            self.num_bytes = end
            if not begins:
                self._add(payload)
            elif json.loads(payload).get("plan_id") != plan_id:
                self.is_foreign = True
                return
            begins = False

    def _add(self, payload: bytes) -> None:
        with pa.ipc.open_stream(payload) as stream:
            for batch in stream:
                self.num_rows += batch.num_rows
                if not _ERROR.issubset(batch.schema.names):
                    continue
                failed = batch.select(["error_stage", "error_type"]).filter(pc.equal(batch["status"], "error"))
                self.errors.update(f"{row['error_stage']}/{row['error_type']}" for row in failed.to_pylist())


def _header_payload(header: JournalHeader) -> bytes:
    return json.dumps(asdict(header)).encode()


def _payload(rows: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_batch(rows)
    return bytes(sink.getvalue().to_pybytes())


def _frame(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _frames(path: Place, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Where each whole frame ends in the file, and its payload. start: where an earlier one ended."""
    try:
        yield from _whole_frames(path, start)
    except FileNotFoundError:  # published and removed by another worker meanwhile
        return
    except OSError as problem:  # as a torn tail: what cannot be read is asked for again, and nothing is lost
        log.warning("%s cannot be read: %s; answers that stand behind that place count as missing", path, problem)


def _whole_frames(path: Place, start: int) -> Iterator[tuple[int, bytes]]:
    if isinstance(path, Path) and not path.is_file():  # gone, or a FIFO, whose opening would wait for ever
        return
    with open_read(path) as file:
        size = file.seek(0, os.SEEK_END)
        end = file.seek(start)
        if not start:
            end = len(_MAGIC)
            if file.read(end) != _MAGIC:
                return
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            end += _FRAME.size + length
            if not length or end > size:  # zeros pass their own checksum; a flipped length would ask for gigabytes
                return
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            yield end, payload
