"""format=llava: a JSON list of conversations as LLaVA's trainers read it; one for each record.

    {"id": ..., "image": "cats/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nDescribe it."}, {"from": "gpt", "value": "A cat."}]}

Of several images `image` is a list, and <image> stands as often. Paths are relative to the folder of the images, which
trainers are given apart; copy_images=true writes the images beside the file, for those that are no files. An answer or
prompt that holds <image> itself is left out: a trainer would look for one more image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.dataset.files import is_local
from pipeline.errors import RunFailed, UsageError
from pipeline.export.destination import new_file, put, refuse_taken, target
from pipeline.export.jsonl import text
from pipeline.export.options import COMMON, Errors, ExportOptions
from pipeline.export.pictures import Lost, Picture, Pictures
from pipeline.export.selection import Selection
from pipeline.source_images import Source, source_of
from pipeline.write.file import Place
from pipeline.write.object_store import ObjectPath

OBEYED = COMMON | {"to", "root", "copy_images"}
ERRORS = Errors.skip
_IMAGE = "<image>"
_COLUMNS = ("id", "prompt_name", "sample_index", "prompt", "response", *Pictures.COLUMNS)

Found = list[str] | Lost  # the paths of a record's images


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write the file, and the images where they are copied; where they are, as a phrase.

    Raises:
        UsageError: it is there already, or the images are no files and are not copied.
        RunFailed: something cannot be written, or the source cannot be opened.
    """
    path = target(output_dir, options.to, "llava.json")
    refuse_taken(path, options.exists)
    images: _Named | _Copied
    if options.copy_images:
        images = _Copied(Pictures(selection, options, output_dir), path.with_name(f"{path.stem}_images"))
    else:
        images = _Named(source_of(output_dir, selection.plan, options.root))
    separator = b"[\n"
    with new_file(path) as file:
        for table in selection.tables(_COLUMNS):
            for row, found in zip(table.to_pylist(), images.of(table), strict=True):
                if _IMAGE in f"{row['prompt']}{row['response']}":
                    selection.left_out[f"with {_IMAGE} in their words"] += 1
                elif isinstance(found, Lost):
                    selection.fail(found.kind, f"{row['id']}: {found.message}")
                else:
                    file.write(separator + text(_conversation(row, found, selection)).encode())
                    separator = b",\n"
                    selection.num_written += 1
        file.write(b"\n]\n" if selection.num_written else b"[]\n")
    return f"in {path}; images are relative to {images.folder}"


def _conversation(row: dict[str, Any], images: list[str], selection: Selection) -> dict[str, Any]:
    found: dict[str, Any] = {"id": selection.record_id(row["id"], row["prompt_name"], row["sample_index"])}
    if images:
        found["image"] = images[0] if len(images) == 1 else images
    return found | {
        "conversations": [
            {"from": "human", "value": f"{_IMAGE}\n" * len(images) + (row["prompt"] or "")},
            {"from": "gpt", "value": row["response"]},
        ]
    }


class _Named:
    """Images as the files that the source has them in."""

    def __init__(self, source: Source) -> None:
        self._dataset = source.dataset
        self.folder = source.inputs.root

    def of(self, table: pa.Table) -> Iterator[Found]:
        rows = table["row_index"].to_pylist()
        if not rows:
            return
        wanted = set(rows)
        source = (row for row in self._dataset.rows(rows[0], rows[-1] + 1) if row.index in wanted)
        row = next(source)
        paths = [self._relative(ref.path) for ref in row.images]
        for index in rows:
            if row.index != index:
                row = next(source)
                paths = [self._relative(ref.path) for ref in row.images]
            yield paths

    def _relative(self, path: str | None) -> str:
        if path is None:
            raise UsageError("the images are no files that a trainer could open. copy_images=true writes them as such.")
        if is_local(self.folder) and is_local(path):
            found = os.path.relpath(path, self.folder)
            return path if found.split(os.sep)[0] == os.pardir else found
        return path.removeprefix(self.folder.rstrip("/") + "/")


class _Copied:
    """Images as files of our own, called by their row."""

    def __init__(self, pictures: Pictures, folder: Place) -> None:
        self._pictures, self._images = pictures, folder
        self.folder = folder.parent

    def of(self, table: pa.Table) -> Iterator[Found]:
        latest: list[Picture] | Lost | None = None
        names: Found = []
        for index, found in zip(table["row_index"].to_pylist(), self._pictures.of(table), strict=True):
            if found is not latest:  # else another record of the same row
                latest, names = found, found if isinstance(found, Lost) else self._put(index, found)
            yield names

    def _put(self, index: int, pictures: list[Picture]) -> list[str]:
        names = [f"{index:09d}_{number}.{picture.extension}" for number, picture in enumerate(pictures)]
        try:
            if not isinstance(self._images, ObjectPath):
                self._images.mkdir(parents=True, exist_ok=True)
            for name, picture in zip(names, pictures, strict=True):
                put(self._images / name, picture.data, over=True)
        except OSError as problem:
            raise RunFailed(f"{self._images} cannot be written: {problem}.") from problem
        return [f"{self._images.name}/{name}" for name in names]
