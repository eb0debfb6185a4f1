"""ImageRef -> an upright RGB picture, or the RowFault that says why not. Each image is read once.

Nothing in a file is believed: only the usual formats are tried, the header's size is checked before a pixel is decoded,
a truncated file is an error instead of half a grey picture, and what Pillow warns about is recorded. Memory and time
beyond that are bounded by the process that calls this. Pillow's limits and Python's warning filters are process-wide:
call it from one thread at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

from PIL import (  # noqa: F401  # see FORMATS
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pipeline.errors import RowFault
from pipeline.prompt.fetch import FetchLimits, fetch, shown
from pipeline.prompt.pixels import num_frames, orientation, to_rgb, upright
from pipeline.records import ImageRef, Stage

# Their plugins are imported above, and not by Pillow at the first file of a kind: by then a worker's memory is limited,
# and a library that could not be loaded once counts as not installed for as long as the worker lives.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # MPO, a JPEG of several, opens as JPEG
MAX_ENCODED_BYTES = 1 << 30
MAX_WARNINGS = 8  # of one image
# Where an address in a row may lead without dataset.allow_urls: stores that a dataset can live in.
STORES = frozenset(("abfs", "abfss", "adl", "az", "gcs", "gs", "hdfs", "hf", "memory", "oci", "oss", "r2", "s3", "s3a"))
# Else a thread for each core of the host, and with their stacks more than the memory that a worker may take.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """A decoded image and where it came from."""

    image: Image.Image  # RGB, upright, all in memory
    sha256: str  # hex digest of the encoded bytes
    width: int  # in pixels, of the upright original
    height: int
    warnings: tuple[str, ...] = ()


def open_image(ref: ImageRef, *, max_image_pixels: int, allow_urls: bool = False) -> OpenedImage:
    """Read, check and decode an image.

    Raises:
        RowFault: stage `read` where the bytes cannot be had, stage `decode` where they are no usable image.
    """
    return decode_image(ref, image_bytes(ref, allow_urls=allow_urls), max_image_pixels=max_image_pixels)


def decode_image(
    ref: ImageRef, data: bytes, *, max_image_pixels: int, least_side_pixels: int | None = None
) -> OpenedImage:
    """Check and decode the bytes of an image.

    Transparency is put on white, the first frame stands for an animation, grey of more than 8 bits is scaled.

    least_side_pixels: a JPEG may come at a half, a quarter or an eighth of its size as long as no side is shorter than
        this, for an eighth of the time and memory; width and height are those of what comes.

    Raises:
        RowFault: stage `decode`: they are no usable image.
    """
    name = ref.path if ref.path is not None else "image bytes"
    if not data:
        raise RowFault(Stage.DECODE, "UnidentifiedImageError", f"{name}: empty, 0 bytes")
    try:
        with _strict(max_image_pixels) as said:
            image, notes = _decoded(data, least_side_pixels)
    except UnidentifiedImageError:
        message = f"{name}: not readable as {', '.join(FORMATS)}; {len(data)} bytes, starting with {data[:12]!r}"
        message += "".join(f"; {_text(entry.message)}" for entry in said[:1])  # a Pillow without AVIF says so here
        raise RowFault(Stage.DECODE, "UnidentifiedImageError", message) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        declared = re.search(r"\d+", str(error))
        message = (
            f"{name}: {declared[0] if declared else 'too many'} pixels, prompt.max_image_pixels={max_image_pixels}"
        )
        raise RowFault(Stage.DECODE, "DecompressionBombError", message) from None
    except MemoryError:
        message = f"{name}: decoding it takes more memory than engine.worker_memory_bytes allows"
        raise RowFault(Stage.DECODE, "MemoryError", message) from None
    except Exception as error:  # its decoders raise what they like: AVIF's a RuntimeError, PNG's a SyntaxError
        raise RowFault(Stage.DECODE, type(error).__name__, f"{name}: cannot be decoded: {_text(error)}") from None
    heard = dict.fromkeys(_text(entry.message) for entry in said)
    return OpenedImage(
        image=image,
        sha256=hashlib.sha256(data).hexdigest(),
        width=image.width,
        height=image.height,
        warnings=(*notes, *heard)[:MAX_WARNINGS],
    )


def image_bytes(ref: ImageRef, *, allow_urls: bool = False) -> bytes:
    """The encoded bytes of an image.

    Raises:
        RowFault: stage `read`: no such file, no permission, not a regular file, too large, or an address not allowed.
    """
    if (ref.data is None) == (ref.path is None):
        raise ValueError("an ImageRef holds either data or a path")
    if ref.data is not None:
        return ref.data
    path = ref.path or ""
    protocols = [part.partition("://")[0].lower() for part in path.split("::") if "://" in part]
    try:
        if not protocols or protocols == ["file"]:
            return _file_bytes(path[7:] if protocols else path)
        if protocols[0] in ("http", "https"):
            if not allow_urls:
                raise RowFault(Stage.READ, "UrlsNotAllowed", f"{shown(path)}: dataset.allow_urls=true fetches URLs")
            return fetch(path, FetchLimits())  # not fsspec's client, which goes to any address
        if len(protocols) > 1 or "::" in path or protocols[0] not in STORES:
            message = f"{path}: expected a path or one of {', '.join(sorted(STORES))}"
            raise RowFault(Stage.READ, "UrlsNotSupported", message)
        return _store_bytes(path)
    except (OSError, ValueError, ImportError) as error:
        raise RowFault(
            Stage.READ, type(error).__name__, f"{path}: {getattr(error, 'strerror', None) or error}"
        ) from None


def _file_bytes(path: str) -> bytes:
    # A FIFO would wait for ever, a device never ends: look before opening, and again at what was opened.
    _require_file(os.stat(path), path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        _require_file(status, path)
        data = stream.read(status.st_size)  # not the limit: what is asked for is allocated at once
        while len(data) <= MAX_ENCODED_BYTES and (more := stream.read(1 << 20)):  # it grows while it is read
            data += more
        return _bounded(data, path)


def _store_bytes(path: str) -> bytes:
    import fsspec

    with fsspec.open(path, "rb") as stream:
        return _bounded(stream.read(MAX_ENCODED_BYTES + 1), path)


def _bounded(data: bytes, path: str) -> bytes:
    if len(data) > MAX_ENCODED_BYTES:
        raise RowFault(Stage.READ, "FileTooLarge", f"{path}: more than {MAX_ENCODED_BYTES:,} bytes")
    return data


def _require_file(status: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise RowFault(Stage.READ, "IsADirectoryError", f"{path}: a folder, expected an image file")
    if not stat.S_ISREG(status.st_mode):
        raise RowFault(Stage.READ, "NotARegularFile", f"{path}: a pipe, device or socket, expected an image file")
    if status.st_size > MAX_ENCODED_BYTES:
        raise RowFault(Stage.READ, "FileTooLarge", f"{path}: {status.st_size:,} bytes, limit {MAX_ENCODED_BYTES:,}")


def _decoded(data: bytes, least_side_pixels: int | None) -> tuple[Image.Image, list[str]]:
    notes: list[str] = []
    with Image.open(BytesIO(data), formats=FORMATS) as source:  # refuses by the header what has too many pixels
        if least_side_pixels is not None:
            source.draft(None, (least_side_pixels, least_side_pixels))
        source.load()
        try:
            turn = orientation(source)
        except Exception as error:
            turn = 1
            notes.append(f"EXIF ignored: {_text(error)}")
        image = upright(to_rgb(source, notes), turn)
        try:
            frames = num_frames(source)
        except Exception:  # a broken later frame is no fault of the first
            frames = "several"
    if frames != "1":
        notes.append(f"first of {frames} frames")
    image.info = {}  # EXIF and profiles end here
    return image, notes


@contextmanager
def _strict(max_image_pixels: int) -> Iterator[list[warnings.WarningMessage]]:
    """Pillow with our pixel limit, its bomb warning an error, all other warnings collected."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_image_pixels
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield said
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _text(error: object) -> str:
    """A message that is the same in every run: without addresses of objects."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))[:300] or type(error).__name__
