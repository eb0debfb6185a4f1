"""What the text file of an image is called, and whether two images would have the same."""

from __future__ import annotations

import hashlib
import posixpath
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from pipeline.dataset.images import EXTENSIONS
from pipeline.errors import UsageError
from pipeline.export.options import ExportOptions
from pipeline.export.selection import Selection

_MAX_EXAMPLES = 3
_IMAGES = frozenset(f".{extension}" for extension in EXTENSIONS.split())


class SidecarNames:
    """Names by id: PATH.jpg has PATH.txt.

    Args:
        beside_sources: whether the texts lie in the folder of the images.
    """

    def __init__(self, selection: Selection, options: ExportOptions, *, beside_sources: bool) -> None:
        self._selection, self._options, self._beside_sources = selection, options, beside_sources
        self._of_files = selection.plan.settings["dataset.kind"] == "images"  # whether ids are names of files

    def of(self, row_id: str) -> str | None:
        """The path relative to the folder, with forward slashes; None where the id is no path inside a folder."""
        if "\0" in row_id or any(part in ("", ".", "..") for part in row_id.split("/")):
            return None
        stem, extension = posixpath.splitext(row_id)
        # Elsewhere an id may be any text, and what is behind its last dot is no extension: v1.5
        is_image = self._of_files or extension.lower() in _IMAGES
        return f"{stem if is_image and not self._options.full_names else row_id}.{self._options.format}"

    def refuse_clashes(self, *, ignore_case: bool) -> None:
        """Refuse what would put two texts into one file, or a text into a file of the source.

        16 bytes a row, whatever the ids are like.

        ignore_case: whether the file system takes names for the same that differ in case or Unicode form.

        Raises:
            UsageError: with examples.
        """

        def digest(name: str) -> int:
            if ignore_case:
                name = unicodedata.normalize("NFC", name).casefold()
            return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

        texts, sources = array("Q"), array("Q")
        for row_id, name, has_text in self._names():
            if has_text:
                texts.append(digest(name))
            if self._beside_sources:
                sources.append(digest(row_id))
        values, counts = np.unique(np.frombuffer(texts, np.uint64), return_counts=True)
        doubled = set(values[counts > 1].tolist())
        taken = set(np.intersect1d(values, np.frombuffer(sources, np.uint64)).tolist())
        if not doubled and not taken:
            return
        clashes: dict[int, list[str]] = defaultdict(list)
        files = {}
        for row_id, name, has_text in self._names():
            key = digest(name)
            if has_text and (key in doubled or key in taken):
                clashes[key].append(row_id)
                files[key] = name
        examples = "; ".join(
            f"{' and '.join(map(repr, clashes[key][:2]))} -> {files[key]!r}" for key in list(clashes)[:_MAX_EXAMPLES]
        )
        if taken:
            raise UsageError(
                f"{len(taken)} texts would have the name of a file that the run was asked about: {examples}. Nothing "
                "was written. Choose another format (txt, caption), or give a folder: to=..."
            )
        raise UsageError(
            f"{len(doubled)} texts would have the name of another: {examples}. Nothing was written. full_names=true "
            f"keeps the extension in the name, as in a.jpg.{self._options.format}."
        )

    def _names(self) -> Iterator[tuple[str, str, bool]]:
        """Each row's id, the name of its text, and whether it has one; ids that make no name are left out."""
        prompt, sample = self._selection.prompt_names[0], self._options.sample_index or 0
        for table in self._selection.results.tables(["id", "prompt_name", "sample_index", "status"]):
            chosen = pc.and_(pc.equal(table["prompt_name"], prompt), pc.equal(table["sample_index"], sample))
            table = table.filter(chosen)
            for row_id, status in zip(table["id"].to_pylist(), table["status"].to_pylist(), strict=True):
                if (name := self.of(row_id)) is not None:
                    yield row_id, name, status == "ok"
