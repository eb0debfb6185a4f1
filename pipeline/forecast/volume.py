"""Bytes that a run writes, and what writing them takes: the sampled answers as a shard's file, made in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa

from pipeline.records import Answer
from pipeline.write.columns import journal_batch
from pipeline.write.schema import OutputSchema, journal_row
from pipeline.write.shard import write_content

_LEAST_RECORDS = 8  # to tell what a file takes anyway from what its records take


@dataclass(frozen=True, slots=True)
class Volume:
    """Of the output.

    Args:
        file_bytes: of a shard's file that has no records: its schema, its footer.
        record_bytes: of a record there, images aside.
        journal_bytes: of a record in a journal, images aside, until its shard is published.
        seconds: to put down a record.
    """

    file_bytes: float
    record_bytes: float
    journal_bytes: float
    seconds: float

    def data_bytes(self, num_records: int, num_shards: int) -> float:
        """Of the files in data/, kept images aside."""
        return num_shards * self.file_bytes + num_records * self.record_bytes


def volume(
    answers: Sequence[tuple[Answer, Mapping[str, Any]]],
    schema: OutputSchema,
    constants: Mapping[str, str | None],
    compression: str,
) -> Volume:
    """What these answers would take.

    answers: each with the input columns of its row; their images are not counted.
    """
    bare = OutputSchema(
        pa.schema([field for field in schema.inputs if field.name != schema.image_column]),
        schema.response_column,
        schema.prefix,
    )
    began = time.perf_counter()
    rows = [journal_row(answer, columns, bare, 1) for answer, columns in answers]
    batch, _ = journal_batch(rows, bare)
    journal = pa.Table.from_batches([batch])
    whole = _file_bytes(journal, bare, constants, compression)
    seconds = time.perf_counter() - began
    num_records = max(1, len(answers))
    if num_records < _LEAST_RECORDS:
        per_record, file_bytes = whole / num_records, 0.0
    else:
        half = _file_bytes(journal.slice(0, num_records // 2), bare, constants, compression)
        per_record = max(0.0, (whole - half) / (num_records - num_records // 2))
        file_bytes = max(0.0, whole - per_record * num_records)
    return Volume(file_bytes, per_record, journal.nbytes / num_records, seconds / num_records)


def _file_bytes(journal: pa.Table, schema: OutputSchema, constants: Mapping[str, str | None], compression: str) -> int:
    file = BytesIO()
    write_content(schema.publish(journal, constants), file, compression)
    return file.tell()
