"""The source of a run, opened again, and the images that its rows were asked about."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.dataset.base import MARK_EVERY, Dataset, Inputs
from pipeline.dataset.registry import planned_reader
from pipeline.errors import RowFault, RunFailed
from pipeline.kept_images import KeptImages, keeps_images
from pipeline.plan import Plan, read_inputs
from pipeline.prompt.image import image_bytes
from pipeline.records import ImageRef, Row
from pipeline.write.file import Place

# Rows that are no further apart are read in one pass over what lies between. A Parquet file is read from the beginning
# of a row group anyway; other formats begin near any row.
_NEAR_ROWS = {"demo": 10_000, "parquet": 10_000, "hub": 10_000}


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a row, encoded; or why it cannot be had, as a sentence."""

    data: bytes | None
    sha256: str | None  # of data
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What a plan was made of."""

    inputs: Inputs
    dataset: Dataset
    allow_urls: bool  # whether images may be fetched from http addresses


def source_of(output_dir: Place, plan: Plan, root: str | None = None) -> Source:
    """The source of a plan.

    root: where it lies now; None = where the plan found it.

    Raises:
        RunFailed: the plan's inputs are missing.
        UsageError: the reader of the source needs a package that is not installed.
    """
    inputs = read_inputs(output_dir, plan)
    if root is not None:
        inputs = replace(inputs, root=root)
    reader = planned_reader(plan.settings)
    return Source(inputs, reader.open(inputs), reader.allow_urls)


class SourceImages:
    """Images by position of their row: from the source; where that is gone or has changed, those that the run kept.

    Raises:
        RunFailed, UsageError: as source_of().
    """

    def __init__(self, output_dir: Place, plan: Plan, root: str | None = None) -> None:
        self._source = source_of(output_dir, plan, root)
        self._kept = KeptImages(output_dir, plan) if keeps_images(plan) else None
        self._near_rows = _NEAR_ROWS.get(str(plan.settings["dataset.kind"]), MARK_EVERY)

    def of_rows(
        self, indices: Sequence[int], recorded: Mapping[int, Sequence[str]] | None = None
    ) -> Iterator[tuple[int, list[SourceImage]]]:
        """The images of these rows, in the order given; a row that cannot be read has one with a problem.

        Ascending rows are read in one pass where they lie near each other.

        recorded: by row, the hashes of the images that it was asked about: where the source has others by now, the
            kept ones are given, if there are any.
        """
        for near in self._together(indices):
            for index, images in zip(near, self._of_source(near), strict=True):
                if self._kept is not None and not _as_asked(images, (recorded or {}).get(index)):
                    images = self._of_output(self._kept, index) or images
                yield index, images

    def _together(self, indices: Sequence[int]) -> Iterator[list[int]]:
        near: list[int] = []
        for index in indices:
            if near and not near[-1] < index <= near[-1] + self._near_rows:
                yield near
                near = []
            near.append(index)
        if near:
            yield near

    def _of_source(self, ascending: Sequence[int]) -> Iterator[list[SourceImage]]:
        done = 0
        try:
            for row in self._source.dataset.rows(ascending[0], ascending[-1] + 1):
                if row.index == ascending[done]:
                    yield self._of_row(row)
                    done += 1
        except RunFailed as problem:  # the file is gone, or another one by now
            yield from [[SourceImage(None, None, str(problem))]] * (len(ascending) - done)

    def _of_row(self, row: Row) -> list[SourceImage]:
        if row.fault is not None:
            return [SourceImage(None, None, row.fault.message)]
        return [self._read(ref) for ref in row.images]

    def _read(self, ref: ImageRef) -> SourceImage:
        try:
            data = image_bytes(ref, allow_urls=self._source.allow_urls)
        except RowFault as fault:
            return SourceImage(None, None, fault.message)
        return _hashed(data)

    def _of_output(self, kept: KeptImages, index: int) -> list[SourceImage]:
        images = kept.of_row(index) or []
        return [
            SourceImage(None, None, "could not be read when the row was asked") if data is None else _hashed(data)
            for data in images
        ]


def _hashed(data: bytes) -> SourceImage:
    return SourceImage(data, hashlib.sha256(data).hexdigest())


def _as_asked(images: Sequence[SourceImage], recorded: Sequence[str] | None) -> bool:
    """Whether all images could be read and, as far as is known, are those that the row was asked about."""
    return all(image.data is not None and (not recorded or image.sha256 in recorded) for image in images)
