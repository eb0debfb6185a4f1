"""Thumbnails: small, as the model saw the picture, and a hostile file costs one of them."""

from __future__ import annotations

import base64
import io
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from made_run import jpeg
from PIL import Image

from pipeline.page import thumbnail as thumbnail_module
from pipeline.page.thumbnail import Thumbnail, Thumbnails
from pipeline.prompt.image import decode_image
from pipeline.records import ImageRef
from pipeline.tensors.worker import limit_memory

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def made(*pictures: bytes, max_image_pixels: int = 100_000_000, seconds: float = 20) -> list[Thumbnail]:
    with Thumbnails[int](max_image_pixels, seconds) as thumbnails:
        found = list(thumbnails.made(enumerate(pictures)))
    assert [key for key, _ in found] == list(range(len(pictures))), "in order"
    return [thumbnail for _, thumbnail in found]


def opened(thumbnail: Thumbnail) -> Image.Image:
    assert thumbnail.uri is not None, thumbnail.problem
    head, _, data = thumbnail.uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def png(image: Image.Image, **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG", **options)
    return encoded.getvalue()


def test_a_thumbnail_is_small_and_keeps_the_shape_of_its_picture() -> None:
    wide, small = made(jpeg(2000, 500), png(Image.new("RGB", (20, 30), (200, 30, 30))))
    assert opened(wide).size == (320, 80)
    assert opened(small).size == (20, 30), "not made larger"
    assert abs(opened(small).getpixel((10, 15))[0] - 200) < 12


def test_a_thumbnail_is_upright_and_on_white_as_the_model_saw_it() -> None:
    turned = io.BytesIO()
    image = Image.new("RGB", (400, 200), "white")
    image.paste((250, 0, 0), (0, 0, 100, 200))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter: red is above
    image.save(turned, "JPEG", exif=exif)
    clear = png(Image.new("RGBA", (50, 50), (0, 0, 0, 0)))
    upright, white = made(turned.getvalue(), clear)
    assert opened(upright).size == (160, 320)
    assert opened(upright).getpixel((80, 20))[1] < 60 < opened(upright).getpixel((80, 300))[1]
    assert min(opened(white).getpixel((25, 25))) > 245


def test_a_file_that_is_no_picture_says_why() -> None:
    good, text, empty, large = made(jpeg(50, 50), b"hello", b"", jpeg(300, 300), max_image_pixels=40_000)
    assert good.problem is None
    assert text.uri is None and "not readable as JPEG" in (text.problem or "")
    assert "0 bytes" in (empty.problem or "")
    assert "90000 pixels" in (large.problem or "")


def hostile_serve(pipe: Connection, max_image_pixels: int) -> None:
    """As the process of a decoder in which files can do what they like."""
    pipe.send_bytes(b"+")
    while True:
        data = pipe.recv_bytes()
        if data == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if data == b"hang":
            time.sleep(60)
        if data == b"end":
            os._exit(3)
        pipe.send_bytes(thumbnail_module._reply(data, max_image_pixels))


def test_a_picture_that_crashes_or_hangs_its_decoder_costs_one_thumbnail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnail_module, "_serve", hostile_serve)
    monkeypatch.setattr(thumbnail_module, "_MOST_PROCESSES", 1)
    good = jpeg(50, 50)
    began = time.monotonic()
    found = made(good, b"crash", good, b"hang", good, b"end", b"end", good, seconds=2)
    assert time.monotonic() - began < 50
    problems = [thumbnail.problem for thumbnail in found]
    assert problems[1] == "not shown: its decoder crashed (SIGSEGV)"
    assert problems[3] == "not shown: decoding it took longer than 2 s"
    assert problems[5] == problems[6] == "not shown: its decoder crashed (exit code 3)"
    assert [place for place, problem in enumerate(problems) if problem is None] == [0, 2, 4, 7]


def frugal_serve(pipe: Connection, max_image_pixels: int) -> None:
    """As the process of a decoder that may take little."""
    limit_memory(40 << 20)
    hostile_serve(pipe, max_image_pixels)


def test_a_picture_that_needs_too_much_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnail_module, "_serve", frugal_serve)
    huge, good = made(png(Image.new("RGB", (5000, 4000))), jpeg(50, 50))
    assert huge.uri is None and "memory" in (huge.problem or "")
    assert good.problem is None


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size() -> None:
    """For thumbnails; the program itself decodes all of it."""
    data = jpeg(4000, 2400)
    fraction = decode_image(ImageRef(data=data), data, max_image_pixels=100_000_000, least_side_pixels=640)
    whole = decode_image(ImageRef(data=data), data, max_image_pixels=100_000_000)
    assert fraction.image.size == (2000, 1200)
    assert whole.image.size == (4000, 2400)


def test_no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnails = Thumbnails[int](1_000_000)
    assert len(list(thumbnails.made(enumerate([jpeg(50, 50)] * 8)))) == 8
    processes = [decoder._process for decoder in thumbnails._decoders]
    assert processes and all(process is not None and process.is_alive() for process in processes)
    thumbnails.close()
    assert not any(process is not None and process._popen.poll() is None for process in processes)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no pictures of other projects beside the checkout")
def test_bad_and_odd_pictures_of_other_projects() -> None:
    """Fault 39: each gives a thumbnail or a sentence."""
    paths = [
        path for name in ("bad_images", "odd_images") for path in sorted((SHARED / name).rglob("*")) if path.is_file()
    ]
    found = made(*(path.read_bytes() for path in paths))
    assert len(found) > 100
    for path, thumbnail in zip(paths, found, strict=True):
        assert (thumbnail.uri is None) != (thumbnail.problem is None), path
        assert "crashed" not in (thumbnail.problem or ""), path
    assert sum(thumbnail.uri is not None for thumbnail in found) > 60
