"""The journal: answers that are on disk before their shard is, and what is left of them after a crash."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.write.journal import Journal, JournalCount, JournalHeader, read_journal

SCHEMA = pa.schema([pa.field("row_index", pa.int64(), nullable=False), pa.field("response", pa.string())])


def batch(*rows: tuple[int, str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"row_index": index, "response": text} for index, text in rows], SCHEMA)


def three_appends(path: Path) -> list[int]:
    """A journal of three appends; the file's size after its header and after each of them."""
    journal = Journal(path, JournalHeader("p", 0, 0))
    sizes = [path.stat().st_size]
    for number in range(3):
        journal.append(batch((number, f"answer {number}"), (10 + number, "ü \0 \n")))
        sizes.append(path.stat().st_size)
    journal.close()
    return sizes


def read(
    path: Path, *, plan_id: str = "p", shard: int = 0, generation: int = 0, schema: pa.Schema = SCHEMA
) -> list[pa.RecordBatch]:
    return read_journal(path, JournalHeader(plan_id, shard, generation), schema=schema)


def counted(path: Path, plan_id: str) -> int:
    count = JournalCount()
    count.look(path, plan_id=plan_id)
    return count.num_rows


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    three_appends(path)
    found = read(path)
    assert [part.to_pylist()[0] for part in found] == [{"row_index": n, "response": f"answer {n}"} for n in range(3)]
    assert found[0]["response"][1].as_py() == "ü \0 \n"
    assert counted(path, "p") == 6


def test_a_journal_torn_at_any_byte_keeps_every_whole_append(tmp_path: Path) -> None:
    """Fault 3: a journal torn at any byte keeps every whole append before."""
    path, torn = tmp_path / "j", tmp_path / "torn"
    sizes = three_appends(path)
    content = path.read_bytes()
    for length in [*range(0, sizes[-2], 29), *range(sizes[-2], len(content) + 1)]:
        torn.write_bytes(content[:length])
        whole = sum(length >= size for size in sizes[1:])
        assert len(read(torn)) == whole, f"cut at byte {length}"


def test_a_flipped_byte_hides_its_append_and_never_gives_another_answer(tmp_path: Path) -> None:
    path, damaged = tmp_path / "j", tmp_path / "damaged"
    sizes = three_appends(path)
    content, good = path.read_bytes(), read(path)
    for place in range(0, len(content), 3):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        before = sum(place >= size for size in sizes[1:])
        kept = 0 if place < sizes[0] else before
        assert read(damaged) == good[:kept], f"byte {place}"


@pytest.mark.parametrize("tail", [bytes(4096), bytes(8), struct.pack("<II", 0xFFFFFFF0, 1) + b"x"])
def test_a_tail_of_zeros_or_of_an_absurd_length_is_no_append(tmp_path: Path, tail: bytes) -> None:
    """Fault 9: a tail of zeros, as power loss may leave it (eight pass their own checksum), or of an absurd length."""
    path = tmp_path / "j"
    three_appends(path)
    with open(path, "ab") as file:
        file.write(tail)
    assert len(read(path)) == 3


@pytest.mark.parametrize("content", [b"", b"v", b"not a journal at all", b"vlmbatchj1\n", b"vlmbatchj1\n" + bytes(8)])
def test_an_empty_or_foreign_file_holds_nothing(tmp_path: Path, content: bytes) -> None:
    """Fault 23: an empty or foreign file with the name of a journal holds no answer."""
    path = tmp_path / "j"
    path.write_bytes(content)
    assert read(path) == []
    assert counted(path, "p") == 0


def test_a_journal_of_another_plan_shard_or_schema_holds_nothing_for_us(tmp_path: Path) -> None:
    path = tmp_path / "j"
    three_appends(path)
    assert len(read(path)) == 3
    assert read(path, plan_id="q") == []
    assert read(path, shard=1) == []
    assert read(path, generation=1) == []
    assert read(path, schema=SCHEMA.append(pa.field("more", pa.int8()))) == []
    assert counted(path, "q") == 0


def test_a_journal_that_was_removed_meanwhile_holds_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "gone") == []


def test_two_attempts_cannot_share_a_file(tmp_path: Path) -> None:
    three_appends(tmp_path / "j")
    with pytest.raises(FileExistsError):
        Journal(tmp_path / "j", JournalHeader("p", 0, 0))


def test_an_append_is_on_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 9: an append has reached the disk when it returns."""
    path, synced = tmp_path / "j", []
    journal = Journal(path, JournalHeader("p", 0, 0))
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_size), real(number)))
    journal.append(batch((1, "x")))
    assert synced == [path.stat().st_size]
    journal.close()
