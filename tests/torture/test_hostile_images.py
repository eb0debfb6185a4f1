"""Images that are made to do harm, among good ones: each becomes a record in bounded time and memory; the others are
answered as ever."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import right_answer
from fake_run import CONTROLS, Ended, fake_run
from PIL import Image

from pipeline.errors import RowFault
from pipeline.prompt.image import open_image
from pipeline.records import ImageRef

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

BAD_IMAGES = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "bad_images"
PROMPT = "What is it?"
OVER_A_FOLDER = ["dataset=images", "dataset.pattern=*", f"prompt.user={PROMPT}", "max_error_rate=null"]


def png(number: int) -> bytes:
    """A small picture like no other."""
    encoded = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (5 + number % 7, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def good_pictures(folder: Path, number: int) -> dict[str, str]:
    """So many good pictures, whose names stand between those of others; the right answers."""
    answers = {}
    for place in range(number):
        path = folder / f"{place:03d}-good.png"
        path.write_bytes(png(place))
        image = open_image(ImageRef(path=str(path)), max_image_pixels=100).image
        answers[path.name] = right_answer([image], PROMPT)
    return answers


def assert_records(ended: Ended, folder: Path, right: dict[str, str]) -> list[dict[str, Any]]:
    """One record for each name in the folder, the right answers, and an error that can be read for whoever has none.

    The records of the others.
    """
    assert [row["id"] for row in ended.rows] == sorted(os.listdir(folder))
    assert {row["id"]: row["response"] for row in ended.rows if row["id"] in right} == right
    assert not CONTROLS & set(ended.printed)
    others = [row for row in ended.rows if row["id"] not in right]
    for row in others:
        assert (row["status"] == "error") == (row["response"] is None)
        if row["status"] == "error":
            assert row["error_stage"] in ("read", "decode")
            assert row["id"] in row["error_message"] and len(row["error_message"]) < 500
            assert row["error_message"].isprintable()
    return others


@pytest.mark.skipif(not BAD_IMAGES.is_dir(), reason="no shared test data beside this checkout")
def test_every_hostile_file_among_as_many_good_ones(tmp_path: Path) -> None:
    """Fault 38: 67 hostile images among as many good ones: a record each, no worker lost, good answers unchanged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = sorted(path for path in BAD_IMAGES.rglob("*") if path.is_file())
    assert len(files) > 50
    for place, path in enumerate(files):
        (folder / f"{place:03d}-{path.name}").symlink_to(path.resolve())
    right = good_pictures(folder, len(files))
    ended = fake_run(
        tmp_path, *OVER_A_FOLDER, f"dataset.path={folder}", "engine.num_workers=2", "engine.worker_timeout_seconds=20",
        "engine.worker_memory_bytes=300000000",
    )  # fmt: skip
    hostile = assert_records(ended, folder, right)
    kinds = {row["error_type"] for row in hostile}
    assert {None, "UnidentifiedImageError", "DecompressionBombError", "OSError"} <= kinds
    assert not {"WorkerDied", "WorkerTimeout", "MemoryError"} & kinds
    assert "worker process ended" not in ended.printed


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = zlib.compress(bytes(2))) -> bytes:
    """A grey picture of a bit a pixel, with such chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    encoded = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        encoded += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return encoded


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def tiff_of_tiles(side: int) -> bytes:
    """A picture of 10 x 10 pixels in a tile of side x side."""
    tags = ((256, 10), (257, 10), (258, 8), (259, 8), (262, 1), (322, side), (323, side), (324, 200), (325, 100))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(1000)


def bombs() -> dict[str, tuple[bytes, str | None]]:
    """Small files that ask for much, and the type of the error that they are to come to."""
    huge = zlib.compress(bytes(200 << 20), 1)
    jpeg = io.BytesIO()
    Image.new("L", (1, 1)).save(jpeg, "JPEG")
    start, _, rest = jpeg.getvalue().partition(b"\xff\xc0")
    lossless = (0x2F | 16382 << 8 | 16382 << 22).to_bytes(5, "little") + bytes(20)
    return {
        "side.png": (png_of(30_000, 30_000, pixels=zlib.compress(bytes(3751 * 30_000), 1)), "DecompressionBombError"),
        "side.jpg": (start + b"\xff\xc0" + rest[:3] + b"\xff\xdc\xff\xdc" + rest[7:], "DecompressionBombError"),
        "side.webp": (riff((b"VP8L", lossless)), "DecompressionBombError"),
        "side.gif": (b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", "DecompressionBombError"),
        "side.ppm": (b"P6 99999999 99999999 255\n", "DecompressionBombError"),
        "tile.tif": (tiff_of_tiles(60_000), "OSError"),
        "ztxt.png": (png_of(1, 1, (b"zTXt", b"comment\0\0" + huge)), "ValueError"),
        "itxt.png": (png_of(1, 1, (b"iTXt", b"comment\0\1\0\0\0" + huge)), "ValueError"),
        "iccp.png": (png_of(1, 1, (b"iCCP", b"profile\0\0" + huge)), "ValueError"),
        "texts.png": (png_of(1, 1, *[(b"zTXt", b"comment\0\0" + zlib.compress(bytes(1 << 19)))] * 400), "ValueError"),
        "rest.png": (png_of(1, 1, pixels=huge), None),  # what is behind its one pixel is not unpacked
    }


def test_bombs(tmp_path: Path) -> None:
    """Fault 39: small files that unpack to much: refused within a second and 300 MB; their neighbours are answered."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    made = bombs()
    for name, (data, kind) in made.items():
        (folder / name).write_bytes(data)
        found = None
        started = time.process_time()  # of this process alone, so that a busy machine does not count
        try:
            open_image(ImageRef(path=str(folder / name)), max_image_pixels=100_000_000)
        except RowFault as fault:
            found = fault.kind
        assert time.process_time() - started < 1, name
        assert found == kind, name
    # Within max_image_pixels and not within the memory: an error row too.
    (folder / "large.png").write_bytes(png_of(9_900, 9_900, pixels=zlib.compress(bytes(1239 * 9_900), 1)))
    right = good_pictures(folder, 20)
    for name, format in (("later.webp", "WEBP"), ("later.tif", "TIFF"), ("later.avif", "AVIF")):
        Image.new("RGB", (4, 3), "red").save(folder / name, format)  # its library can still be loaded
        image = open_image(ImageRef(path=str(folder / name)), max_image_pixels=100).image
        right[name] = right_answer([image], PROMPT)
    ended = fake_run(
        tmp_path, *OVER_A_FOLDER, f"dataset.path={folder}", "engine.worker_memory_bytes=300000000",
    )  # fmt: skip
    others = assert_records(ended, folder, right)
    assert {row["id"]: row["error_type"] for row in others} == {
        **{name: kind for name, (_, kind) in made.items()}, "large.png": "MemoryError",
    }  # fmt: skip
    assert "engine.worker_memory_bytes" in ended.row("large.png")["error_message"]
    assert "worker process ended" not in ended.printed


FAILING = {
    "loop": "WorkerTimeout",
    "wait": "WorkerTimeout",
    "hold": "WorkerTimeout",
    "crash": "WorkerDied",
    "eat": "MemoryError",
    "fill": "MemoryError",
}


@pytest.mark.parametrize("num_each", [1, pytest.param(6, marks=pytest.mark.torture)])
def test_a_decoder_that_hangs_crashes_or_eats_memory(num_each: int, tmp_path: Path) -> None:
    """Fault 46: a decoder that hangs, crashes or takes all memory costs its row, and the workers go on."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in FAILING:
        for number in range(num_each):
            (folder / f"{name}-{number}.png").write_bytes(png(number))
    for number in range(60):
        (folder / f"{number:03d}-good.png").write_bytes(png(number))
        (folder / f"x{number:03d}-good.png").write_bytes(png(number))
    ended = fake_run(
        tmp_path, *OVER_A_FOLDER, f"dataset.path={folder}", "engine.num_workers=2", "engine.worker_timeout_seconds=2",
        "engine.worker_memory_bytes=200000000", model="odd_model",
    )  # fmt: skip
    assert [row["id"] for row in ended.rows] == sorted(os.listdir(folder))
    found = {row["id"]: row["error_type"] for row in ended.rows if row["status"] == "error"}
    assert found == {f"{name}-{number}.png": kind for name, kind in FAILING.items() for number in range(num_each)}
    assert sum(row["response"] == PROMPT for row in ended.rows) == 120
    late = ended.row("loop-0.png")
    assert late["error_stage"] == "decode"
    assert "took longer than 2 s (engine.worker_timeout_seconds)" in late["error_message"]


@pytest.fixture
def odd_files(tmp_path: Path) -> Path:
    """Files that are none, or not what their name says, and what they must come to."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    encoded = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(encoded, "JPEG")
    whole = encoded.getvalue()
    for name, share in (("cut-0.jpg", 0), ("cut-0.1.jpg", 0.001), ("cut-50.jpg", 0.5), ("cut-99.jpg", 0.99)):
        (folder / name).write_bytes(whole[: int(len(whole) * share)])
    (folder / "text.jpg").write_text("Not found, sorry.")
    (folder / "page.html.jpg").write_text("<!doctype html><title>404</title>")
    (folder / "png.jpg").write_bytes(png(1))
    (folder / "dangling.jpg").symlink_to("gone.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.png").write_bytes(png(2))
    return folder


REGULAR = {
    "cut-0.jpg": ("decode", "UnidentifiedImageError"),
    "cut-0.1.jpg": ("decode", "UnidentifiedImageError"),
    "cut-50.jpg": ("decode", "OSError"),
    "cut-99.jpg": ("decode", "OSError"),
    "text.jpg": ("decode", "UnidentifiedImageError"),
    "page.html.jpg": ("decode", "UnidentifiedImageError"),
    "png.jpg": (None, None),
}


def test_odd_files_of_a_folder(odd_files: Path) -> None:
    """Fault 40: cut, empty, misnamed files, dangling links, pipes, devices in a folder: records, nothing waited for."""
    ended = fake_run(odd_files.parent, *OVER_A_FOLDER, f"dataset.path={odd_files}", timeout=60)
    found = {row["id"]: (row["error_stage"], row["error_type"]) for row in ended.rows}
    assert found == REGULAR | {
        "dangling.jpg": ("read", "FileNotFoundError"),
        "itself.jpg": ("read", "OSError"),
        "zero.jpg": ("read", "NotARegularFile"),
        "pipe.jpg": ("read", "NotARegularFile"),
        "folder.jpg/inside.png": (None, None),
    }


def test_odd_files_that_rows_name(odd_files: Path, tmp_path: Path) -> None:
    """Fault 40: the same where rows of a manifest name them, and a folder in the place of an image."""
    names = sorted(os.listdir(odd_files))
    lines = [json.dumps({"name": name, "image": f"pictures/{name}"}) for name in [*names, "gone.jpg"]]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, json.dumps({"name": "none", "image": None})]))
    ended = fake_run(
        tmp_path, "dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl", "dataset.id_column=name",
        f"prompt.user={PROMPT}", "max_error_rate=null", timeout=60,
    )  # fmt: skip
    found = {row["id"]: (row["error_stage"], row["error_type"]) for row in ended.rows}
    assert found == REGULAR | {
        "dangling.jpg": ("read", "FileNotFoundError"),
        "gone.jpg": ("read", "FileNotFoundError"),
        "itself.jpg": ("read", "OSError"),
        "zero.jpg": ("read", "NotARegularFile"),
        "pipe.jpg": ("read", "NotARegularFile"),
        "folder.jpg": ("read", "IsADirectoryError"),
        "none": ("read", "NullImage"),
    }
