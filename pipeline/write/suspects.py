"""Rows that end the whole process: narrowed down by what was under way each time that it died.

    work/part-00042.<attempt>.taken    the rows of a shard that an attempt gave to its engine, in eight bytes each

The file goes when its attempt ends in good order, so one that is still there is of a process that was killed. One
death says nothing: schedulers kill, too. Rows that were under way at several deaths of one shard are suspects: asked
last, in a few groups, one group at a time, those with the most deaths first. Whoever kills for other reasons costs no
more than that. A row that kills leaves a smaller group at each death; one that was alone at two of them becomes an
error record (after delta debugging, Zeller and Hildebrandt 2002, with deaths that happen anyway as its tests). Once
would not do: a run that is killed every few seconds comes to rows that are asked alone, and one is under way at the
next kill.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from pipeline.write.file import Place, matching
from pipeline.write.object_store import ObjectPath

_ROW = struct.Struct("<q")
_LEAST_DEATHS = 2
_LEAST_DEATHS_ALONE = 2
_NUM_GROUPS = 8


@dataclass(frozen=True, slots=True)
class Suspects:
    """Rows that may have ended processes: `groups` to ask one by one, `culprits` that were alone at it twice."""

    groups: tuple[tuple[int, ...], ...] = ()
    culprits: frozenset[int] = frozenset()


NOBODY = Suspects()


class Taken:
    """The rows of one shard that this attempt gives to its engine. Written without fsync: it is for deaths of the
    process, not of the machine.

    In an object store, where each note is a request, the rows behind it that are on their way are noted with it.
    """

    def __init__(self, work_dir: Place, stem: str, attempt_id: str) -> None:
        self._path = work_dir / f"{stem}.{attempt_id}.taken"
        self._file: int | None = None
        self._rows: dict[int, bytes] = {}  # noted already

    def add(self, row_index: int, *, alone: bool = False, on_their_way: Iterable[int] = ()) -> None:
        """A row is on its way into the engine. on_their_way: those that may follow it, in any order.

        Raises:
            OSError: the folder cannot be written.
        """
        if row_index in self._rows:  # another prompt about it, or a second look at the first samples
            return
        if isinstance(self._path, ObjectPath):
            rows = [row for row in on_their_way if row not in self._rows and row != row_index]
            self._rows |= {row: _ROW.pack(row) for row in rows} if not alone else {}
            self._rows[row_index] = _ROW.pack(-1 - row_index if alone else row_index)
            self._path.replace(b"".join(self._rows.values()))
            return
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._rows[row_index] = _ROW.pack(-1 - row_index if alone else row_index)
        os.write(self._file, self._rows[row_index])

    def close(self) -> None:
        """The attempt is done with the shard, in good order."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._rows:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def read_suspects(work_dir: Place, stem: str, unanswered: Collection[int]) -> Suspects:
    """Of the rows without an answer, those that were under way at two deaths of processes or more."""
    under_way: list[set[int]] = []
    alone: Counter[int] = Counter()
    for path in taken_files(work_dir, stem):
        with suppress(OSError):  # its attempt has just ended in good order
            content = path.read_bytes()
            rows = [number for (number,) in _ROW.iter_unpack(content[: len(content) // _ROW.size * _ROW.size])]
            under_way.append({number if number >= 0 else -1 - number for number in rows}.intersection(unanswered))
            alone.update([-1 - rows[-1]] if rows and rows[-1] < 0 else [])
    deaths = Counter(row for rows in under_way for row in rows)
    suspects = {row: number for row, number in deaths.items() if number >= _LEAST_DEATHS}
    culprits = frozenset(row for row in suspects if alone[row] >= _LEAST_DEATHS_ALONE)
    once = sorted(row for row in suspects if alone[row] and row not in culprits)
    groups: list[tuple[int, ...]] = [(row,) for row in once]  # first, and alone again
    for most in sorted(set(suspects.values()), reverse=True):
        alike = sorted(row for row, number in suspects.items() if number == most and not alone[row])
        size = -(-len(alike) // _NUM_GROUPS)
        groups += [tuple(alike[start : start + size]) for start in range(0, len(alike), size or 1)]
    return Suspects(tuple(groups), culprits)


def taken_files(work_dir: Place, stem: str) -> list[Place]:
    """What attempts at a shard noted, dead ones and live ones."""
    return [path for path in matching(work_dir, f"{stem}.*.taken") if path.is_file()]
