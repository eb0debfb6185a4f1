"""The source of a run, opened again, and the images that its rows were asked about."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.dataset.base import Dataset, Inputs
from pipeline.dataset.registry import planned_reader
from pipeline.errors import RowFault
from pipeline.plan import Plan, read_inputs
from pipeline.prompt.image import image_bytes
from pipeline.records import ImageRef, Row
from pipeline.write.file import Place


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
    """Images by position of their row.

    Raises:
        RunFailed, UsageError: as source_of().
    """

    def __init__(self, output_dir: Place, plan: Plan, root: str | None = None) -> None:
        self._source = source_of(output_dir, plan, root)

    def of_rows(self, indices: Sequence[int]) -> Iterator[tuple[int, list[SourceImage]]]:
        """The images of these rows, in the order given; a row that cannot be read has one with a problem."""
        for index in indices:
            for row in self._source.dataset.rows(index, index + 1):
                yield index, self._of_row(row)

    def _of_row(self, row: Row) -> list[SourceImage]:
        if row.fault is not None:
            return [SourceImage(None, None, row.fault.message)]
        return [self._read(ref) for ref in row.images]

    def _read(self, ref: ImageRef) -> SourceImage:
        try:
            data = image_bytes(ref, allow_urls=self._source.allow_urls)
        except RowFault as fault:
            return SourceImage(None, None, fault.message)
        return SourceImage(data, hashlib.sha256(data).hexdigest())
