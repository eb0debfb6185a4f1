"""What changes on disk after it was written: damaged shards, edited manifests, other images under an old name."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_model import right_answer
from faultbox import PROMPT, Box, Found
from PIL import Image

from pipeline.audit import Audit, AuditOptions, audit
from pipeline.prompt.image import open_image
from pipeline.records import ImageRef


def deep(output_dir: Path, root: str | None = None) -> Audit:
    return audit(output_dir, AuditOptions(deep=True, root=root))


def shards(box: Box) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (box.output / "data").iterdir()}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A run that is done: three shards, 77 pictures, 13 of which are none."""
    box = Box(tmp_path / "box", 90, shard_rows=40)
    box.run()
    return box


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("step", [97, pytest.param(3, marks=pytest.mark.torture)])
def test_damage_in_any_region_of_a_shard(step: int, box: Box, found: Found) -> None:
    """Fault 22: a flipped bit in a shard's magic, pages, footer or length is found, or no reader can notice it."""
    path = box.output / "data" / "part-00001.parquet"
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    rows, statistics = pq.read_table(path).to_pylist(), read_statistics(path)
    assert deep(box.output).passed
    num_found = 0
    pages, inside = range(4, footer, (footer - 4) // 40), range(footer, len(whole) - 8, step)
    for place in [*range(4), *pages, *inside, *range(len(whole) - 8, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        seen = deep(box.output)
        found.num_faults += 1
        if seen.passed and not seen.num_unlike:
            assert (pq.read_table(path).to_pylist(), read_statistics(path)) == (rows, statistics), f"byte {place}"
        else:
            num_found += 1
            assert all("part-00001" in problem or "1 shards" in problem for problem in seen.problems), seen.problems
            assert seen.problems or seen.num_unlike == 1
    assert num_found > found.num_faults / 3
    path.unlink()
    box.log.unlink()
    box.finish(found)
    assert set(box.made()) == {f"{row['row_index']}/default/0" for row in rows if row["status"] == "ok"}
    assert path.read_bytes() == whole
    assert deep(box.output).passed


def read_statistics(path: Path) -> list[object]:
    footer = pq.read_metadata(path)
    chunks = [footer.row_group(0).column(number) for number in range(footer.num_columns)]
    return [chunk.statistics and chunk.statistics.to_dict() for chunk in chunks]


def test_other_pictures_under_old_names(box: Box, found: Found) -> None:
    """Fault 27: other bytes under the same path and size are found by audit deep=true; their shard alone is redone."""
    before, names = shards(box), ("00040.png", "00044.png")
    for name in names:
        picture = box.source / name
        size_bytes, encoded = picture.stat().st_size, io.BytesIO()
        Image.new("RGB", (5, 2), (1, 2, 3)).save(encoded, "PNG")
        content = encoded.getvalue()
        assert len(content) <= size_bytes
        picture.write_bytes(content.ljust(size_bytes, b"\0"))
    assert audit(box.output).passed  # nothing is read that costs much
    seen = deep(box.output)
    assert len(seen.problems) == 1
    assert "part-00001.parquet: 2 rows were asked about other images" in seen.problems[0]
    assert ": 00040.png, 00044.png." in seen.problems[0]
    found.num_faults += 2
    (box.output / "data" / "part-00001.parquet").unlink()
    for name in names:
        image = open_image(ImageRef(path=str(box.source / name)), max_image_pixels=100).image
        box.right[name] = right_answer([image], PROMPT)
    box.look_again()
    box.run()
    box.check_always()
    assert {name for name, content in shards(box).items() if before[name] != content} == {"part-00001.parquet"}
    assert deep(box.output).passed


def test_pictures_that_are_gone_or_moved(box: Box) -> None:
    elsewhere = box.folder / "elsewhere"
    os.rename(box.source, elsewhere)
    assert len(deep(box.output).problems) == 3
    seen = deep(box.output, root=str(elsewhere))
    assert seen.passed
    assert seen.num_images == 90 - 90 // 7


def test_an_edited_manifest(tmp_path: Path) -> None:
    box = Box(tmp_path / "box", 9)
    manifest = box.folder / "rows.jsonl"
    manifest.write_text("".join(f'{{"image": "pictures/{n:05d}.png", "word": "old"}}\n' for n in range(9)))
    words = [f"dataset.path={manifest}" if word.startswith("dataset.path=") else word for word in box.words]
    box.words = ["dataset=jsonl" if word == "dataset=images" else word for word in words]
    box.run()
    assert deep(box.output).passed
    manifest.write_text(manifest.read_text().replace("old", "new", 1))
    assert deep(box.output).problems == [
        "rows.jsonl was edited since it was planned; restore it, or choose another output_dir"
    ]
