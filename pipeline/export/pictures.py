"""The encoded images of exported records, as long as they are those that the model was asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.export.options import ExportOptions
from pipeline.export.selection import Selection
from pipeline.source_images import SourceImage, SourceImages
from pipeline.write.file import Place

# By their first bytes: a name may say something else, and kept images have none.
_BEGINNINGS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"II+\0": "tif",
    b"MM\0+": "tif",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded image."""

    data: bytes
    extension: str  # jpg, png ..., by what it is


@dataclass(frozen=True, slots=True)
class Lost:
    """Why the images of a record cannot be had."""

    kind: str
    message: str


class Pictures:
    """Images by record, from the source or, where that is gone, from those that the run kept.

    Raises:
        RunFailed, UsageError: as SourceImages().
    """

    COLUMNS = ("row_index", "image_sha256")  # that of() needs

    def __init__(self, selection: Selection, options: ExportOptions, output_dir: Place) -> None:
        self._source = SourceImages(output_dir, selection.plan, options.root)

    def of(self, table: pa.Table) -> Iterator[list[Picture] | Lost]:
        """The images of each record of a table, in its order. Those of a row are read once.

        Raises:
            RunFailed, UsageError: as SourceImages.of_rows().
        """
        rows = table["row_index"].to_pylist()
        recorded: dict[int, list[str]] = {}
        for row, hashes in zip(rows, table["image_sha256"].to_pylist(), strict=True):
            recorded[row] = recorded.get(row) or hashes or []  # an error record may have none
        found = self._source.of_rows(list(recorded), recorded)
        last, pictures = -1, None
        for row in rows:
            if row != last or pictures is None:
                last, images = next(found)
                assert last == row
                pictures = _checked(images, recorded[row])
            yield pictures


def _checked(images: Sequence[SourceImage], recorded: Sequence[str]) -> list[Picture] | Lost:
    pictures = []
    for image in images:
        if image.data is None:
            return Lost("images that cannot be read", image.problem or "")
        if recorded and image.sha256 not in recorded:
            return Lost("images that are others than the model was asked about", "changed since the run")
        extension = _extension(image.data)
        if extension is None:
            return Lost("images of no known format", f"begins with {image.data[:8]!r}")
        pictures.append(Picture(image.data, extension))
    return pictures


def _extension(data: bytes) -> str | None:
    for beginning, extension in _BEGINNINGS.items():
        if data.startswith(beginning):
            return extension
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return "avif"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "ppm"
    return None
