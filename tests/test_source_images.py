"""The images that rows were asked about: from the source, or as the run kept them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_run import made_run, put_pictures

from pipeline.kept_images import KeptImages
from pipeline.source_images import SourceImages


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_images_come_in_the_order_in_which_rows_are_asked_for(tmp_path: Path) -> None:
    plan = made_run(tmp_path / "out", put_pictures(tmp_path / "in", 9))
    there = contents(tmp_path / "in")
    order = [4, 2, 3, 8, 8, 0]
    found = list(SourceImages(tmp_path / "out", plan).of_rows(order))
    assert [index for index, _ in found] == order
    for index, [image] in found:
        assert image.data == there[index] and image.sha256 == hashlib.sha256(there[index]).hexdigest()


def test_ascending_rows_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = made_run(tmp_path / "out", put_pictures(tmp_path / "in", 9))
    images = SourceImages(tmp_path / "out", plan)
    asked, rows = [], images._source.dataset.rows
    monkeypatch.setattr(images._source.dataset, "rows", lambda *span: asked.append(span) or rows(*span))
    list(images.of_rows([1, 2, 7, 3]))
    assert asked == [(1, 8), (3, 4)]


def test_a_row_that_cannot_be_read_has_a_problem(tmp_path: Path) -> None:
    plan = made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    (tmp_path / "in/00001.png").unlink()
    found = dict(SourceImages(tmp_path / "out", plan).of_rows([0, 1, 2]))
    assert [found[index][0].data is None for index in range(3)] == [False, True, False]
    assert "00001.png" in (found[1][0].problem or "")


def test_kept_images_stand_in_for_those_that_are_gone_or_changed(tmp_path: Path) -> None:
    plan = made_run(tmp_path / "out", put_pictures(tmp_path / "in", 9), settings={"write.keep_images": True})
    there = contents(tmp_path / "in")
    hashes = {index: [hashlib.sha256(data).hexdigest()] for index, data in enumerate(there)}
    (tmp_path / "in/00001.png").unlink()
    (tmp_path / "in/00005.png").write_bytes(there[6])
    images = SourceImages(tmp_path / "out", plan)
    found = dict(images.of_rows(range(9), hashes))
    assert [found[index][0].data for index in range(9)] == there
    unasked = dict(images.of_rows([5]))
    assert unasked[5][0].data == there[6], "nobody said what it should be"


def test_kept_images_are_found_in_any_order_and_missing_shards_have_none(tmp_path: Path) -> None:
    settings = {"write.keep_images": True, "write.prefix": "my_"}
    plan = made_run(tmp_path / "out", put_pictures(tmp_path / "in", 9), settings=settings, num_shards=2)
    there = contents(tmp_path / "in")
    kept = KeptImages(tmp_path / "out", plan)
    for index in (5, 0, 2, 1, 5, 5, 3):
        assert kept.of_row(index) == [there[index]]
    assert kept.of_row(8) is None
    assert kept.of_row(4) == [there[4]]


def test_a_damaged_shard_keeps_nothing(tmp_path: Path) -> None:
    plan = made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3), settings={"write.keep_images": True})
    path = tmp_path / "out/data/part-00000.parquet"
    content = bytearray(path.read_bytes())
    footer = pq.read_metadata(path).serialized_size
    content[4 : len(content) - footer - 8] = b"\0" * (len(content) - footer - 12)
    path.write_bytes(content)
    assert KeptImages(tmp_path / "out", plan).of_row(1) is None
