"""Rows that were under way when processes died: narrowed down, and nobody condemned for one death."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.write.suspects import NOBODY, Suspects, Taken, read_suspects


def death(folder: Path, rows: list[int], *, alone: bool = False) -> None:
    """An attempt that gave these rows to its engine and was killed."""
    taken = Taken(folder, "part-00000", f"attempt{len(list(folder.iterdir()))}")
    for row in rows:
        taken.add(row, alone=alone)
    assert taken._file is not None
    os.close(taken._file)


def suspects(folder: Path, unanswered: range = range(100)) -> Suspects:
    return read_suspects(folder, "part-00000", unanswered)


def test_one_death_says_nothing(tmp_path: Path) -> None:
    death(tmp_path, [1, 2, 3])
    assert suspects(tmp_path) == NOBODY


def test_rows_under_way_twice_are_asked_apart_in_a_few_groups(tmp_path: Path) -> None:
    death(tmp_path, list(range(40)))
    death(tmp_path, list(range(20, 80)))
    found = suspects(tmp_path)
    assert [row for group in found.groups for row in group] == list(range(20, 40))
    assert max(map(len, found.groups)) == 3
    assert found.culprits == frozenset()


def test_a_group_that_dies_is_divided_and_comes_first(tmp_path: Path) -> None:
    for _ in range(2):
        death(tmp_path, list(range(16)))
    death(tmp_path, [4, 5])
    assert suspects(tmp_path).groups == ((4,), (5,), (0, 1), (2, 3), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15))


def test_who_was_alone_once_is_asked_alone_again_before_the_others(tmp_path: Path) -> None:
    for _ in range(3):
        death(tmp_path, list(range(40)))
    death(tmp_path, [30], alone=True)
    found = suspects(tmp_path)
    assert (found.groups[0], found.culprits) == ((30,), frozenset())
    assert sorted(row for group in found.groups for row in group) == list(range(40))


def test_who_was_alone_twice_is_a_culprit_and_stays_one(tmp_path: Path) -> None:
    for _ in range(2):
        death(tmp_path, [4, 5, 6])
    for _ in range(2):
        death(tmp_path, [5], alone=True)
    death(tmp_path, [4, 6])  # 5 was put down as an error, and the disk did not have it yet
    assert suspects(tmp_path).culprits == {5}
    assert suspects(tmp_path).groups == ((4,), (6,))


def test_one_death_alone_condemns_nobody(tmp_path: Path) -> None:
    death(tmp_path, [5], alone=True)
    assert suspects(tmp_path) == NOBODY


def test_an_answer_acquits(tmp_path: Path) -> None:
    for _ in range(2):
        death(tmp_path, [1, 2, 3])
    assert suspects(tmp_path, range(3, 9)).groups == ((3,),)


def test_an_attempt_that_ends_in_good_order_leaves_nothing(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "part-00000", "a")
    taken.close()
    taken.add(3)
    taken.add(3)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [8]
    taken.close()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_or_foreign_note_is_no_witness(tmp_path: Path) -> None:
    death(tmp_path, [1, 2])
    (tmp_path / "part-00000.x.taken").write_bytes(b"\x01\0\0\0\0\0\0\0\x02\0")
    (tmp_path / "part-00000.y.taken").write_bytes(b"")
    (tmp_path / "part-000000.z.taken").write_bytes(b"\x02\0\0\0\0\0\0\0")
    assert suspects(tmp_path).groups == ((1,),)
