"""Instants at which a test has the process die, as a kernel, a scheduler or a power cut might.

    VLM_BATCH_CRASH_AT=journal_synced        SIGKILL the first time that this point is reached
    VLM_BATCH_CRASH_AT=journal_synced:3      the third time
    VLM_BATCH_CRASH_AT=shard_bytes:4096      when so many bytes have been written into files of this kind

Without the variable a point costs one comparison. The tests go through all of `CRASH_POINTS`, and a name that is not in
it is an error, so that none is forgotten and none is never reached.
"""

from __future__ import annotations

import os
import signal
from typing import BinaryIO

CRASH_POINTS = {
    "plan_ready": "plan.json is written beside, and has not its name yet",
    "plan_created": "plan.json is there, plan/inputs.parquet is not",
    "inputs_placed": "plan/inputs.parquet is there, too",
    "claim_taken": "a shard is claimed, nothing is known about it yet",
    "journal_created": "a journal has its header and no answer",
    "journal_appended": "answers are written and the disk has not confirmed them",
    "journal_synced": "the disk has them",
    "shard_opened": "the attempt's file of a shard is there and empty",
    "shard_written": "it is whole, the disk has not confirmed it",
    "shard_closed": "it is closed and not checked",
    "shard_checked": "it is checked and has not its name yet",
    "shard_published": "it has its name, and the attempt's name still",
    "shard_settled": "the attempt's name is gone, the journals are there",
    "journal_removed": "the first of the journals is gone",
    "generation_published": "answers of a retry are in work/, and not in the place of the shard yet",
    "generation_in_place": "they are, and the file in work/ is there still",
    "inputs_extended": "plan/inputs-N.parquet is there, and plan.json does not name it yet",
    "overwrite_begun": "a run is to be moved aside, nothing has moved yet",
    "overwrite_without_plan": "its plan has moved, its answers have not",
    "manifest_ready": "every shard is published, manifest.json is not written",
    "manifest_written": "manifest.json is there, and work/ still",
    "stray_removed": "the first of what was left in work/ is gone",
}
BYTES = {"journal_bytes": "so many bytes of journals", "shard_bytes": "so many bytes of shards' files"}
VARIABLE = "VLM_BATCH_CRASH_AT"


class _Armed:
    """What the environment asks for; read once."""

    def __init__(self, words: str) -> None:
        self.name, _, number = words.partition(":")
        self.left = int(number or 1)
        if self.name and self.name not in CRASH_POINTS | BYTES:
            raise ValueError(f"{VARIABLE}={words}: there is no such point; the points are {[*CRASH_POINTS, *BYTES]}")


_armed = _Armed(os.environ.get(VARIABLE, ""))


def crash_point(name: str) -> None:
    """Die here, if a test wants it so."""
    if name == _armed.name:
        _armed.left -= 1
        if _armed.left <= 0:
            _die()


def crashing_file(file: BinaryIO, name: str) -> BinaryIO:
    """The file; or, if a test wants it so, one that writes so many bytes and dies."""
    return _CrashingFile(file) if name == _armed.name else file  # type: ignore[return-value]


class _CrashingFile:
    """Passes everything on but the bytes that the process does not live to write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, content: bytes) -> int:
        part = bytes(content)[: _armed.left]
        _armed.left -= len(part)
        while part:
            part = part[self._file.write(part) :]
        self._file.flush()
        if _armed.left <= 0:
            _die()
        return len(content)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # the signal is on its way: nothing after this point happens
