"""The records that a report looks at: all of a small run, some shards of a large one; and those that it shows.

Two passes over the files: the first, over narrow columns and the answers, counts and chooses; the second reads the
chosen records whole. Neither holds more than a few hundred records at a time, and images are in neither.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.results import INPUT, Results
from pipeline.write.file import open_read

MOST_RECORDS = 200_000  # looked at
_MOST_TEXT_BYTES = 1 << 30  # of answers, as they lie in memory
_MOST_CLASSES = 24  # of errors, that have examples
_MOST_SHARDS_OF_A_CLASS = 3  # read for its examples where the sample has too few
_WARNING_CHARACTERS = 200
_MOST_KINDS = 10_000  # of warnings, that are told apart
_BATCH_ROWS = 500
_BUFFER_BYTES = 1 << 20
_NUMBERS = ("num_prompt_tokens", "num_image_tokens", "num_generated_tokens")
_NARROW = ("status", "error_stage", "error_type", "finish_reason", "image_width", "image_height", "warnings")


class Position(NamedTuple):
    """Where a record lies: number of the file in Results.files, and its row in it."""

    file: int
    row: int


@dataclass(frozen=True, slots=True)
class Repeated:
    """An answer that several records give."""

    num_records: int
    position: Position  # of one of them


@dataclass(slots=True)
class Sample:
    """What was looked at, and which records are worth showing. Counts are of the sample."""

    num_records: int = 0
    num_files: int = 0
    num_answers: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    numbers: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)  # by column, of the records that have one
    widths: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0, np.int64))
    heights: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0, np.int64))
    num_distinct: int = 0  # answers
    random: list[Position] = field(default_factory=list)
    longest: list[Position] = field(default_factory=list)
    shortest: list[Position] = field(default_factory=list)
    repeated: list[Repeated] = field(default_factory=list)
    finished: dict[str, list[Position]] = field(default_factory=dict)  # by finish_reason
    errors: dict[str, list[Position]] = field(default_factory=dict)  # by "stage/type", the commonest first
    damaged: list[str] = field(default_factory=list)  # files that could not be read

    @property
    def positions(self) -> set[Position]:
        """Of all records to show."""
        lists = [self.random, self.longest, self.shortest, [one.position for one in self.repeated]]
        return {position for some in (*lists, *self.finished.values(), *self.errors.values()) for position in some}


class _Least:
    """The few records whose keys are the least, each text once."""

    def __init__(self, num_records: int) -> None:
        self._num_records = num_records
        self._held: dict[object, tuple[float, Position]] = {}
        self._worst = float("inf")

    def offer(self, key: float, text: object, position: Position) -> None:
        """text: anything that is equal where the texts are."""
        if key >= self._worst or text in self._held:
            return
        self._held[text] = (key, position)
        if len(self._held) > self._num_records:
            del self._held[max(self._held, key=self._held.__getitem__)]
        if len(self._held) == self._num_records:
            self._worst = max(self._held.values())[0]

    def __len__(self) -> int:
        return len(self._held)

    @property
    def positions(self) -> list[Position]:
        return [position for _, position in sorted(self._held.values())]


def sample_of(results: Results, num_examples: int, errors: Iterable[str]) -> Sample:
    """Look at a run, or at as many of its shards as MOST_RECORDS allows, and choose.

    num_examples: records of each kind; of random ones twice as many.
    errors: classes ("stage/type") that the run has, the commonest first: a rare one is looked for in other shards.
    """
    return _Look(results, num_examples, list(errors)[:_MOST_CLASSES]).sample()


class _Look:
    """One pass over the files of a run, in an order that is random and always the same."""

    def __init__(self, results: Results, num_examples: int, errors: Sequence[str]) -> None:
        self._results, self._num_examples = results, num_examples
        self._chance = random.Random(results.plan.plan_id if results.plan else 0)
        self._found = Sample()
        self._random = _Least(2 * num_examples)
        self._longest, self._shortest = _Least(num_examples), _Least(num_examples)
        self._finished: dict[str, _Least] = defaultdict(lambda: _Least(num_examples))
        self._errors = {kind: _Least(num_examples) for kind in errors}
        self._answers: dict[int, list[Any]] = {}  # hash -> number of records, position of one
        self._arrays: dict[str, list[Any]] = defaultdict(list)
        self._text_bytes = 0

    def sample(self) -> Sample:
        found = self._found
        order = list(range(len(self._results.files)))
        self._chance.shuffle(order)
        read = set()
        for file in order:
            if found.num_records >= MOST_RECORDS or self._text_bytes >= _MOST_TEXT_BYTES:
                break
            read.add(file)
            for first, batch in self._batches(file, (*_NARROW, *_NUMBERS, "response")):
                self._add(file, first, batch)
        found.num_files = len(read)
        self._look_for_errors([file for file in order if file not in read])
        found.numbers = {name: _joined(self._arrays[name]) for name in _NUMBERS}
        found.widths, found.heights = _joined(self._arrays["image_width"]), _joined(self._arrays["image_height"])
        found.num_distinct = len(self._answers)
        found.random, found.longest = self._random.positions, self._longest.positions
        found.shortest = self._shortest.positions
        several = (Repeated(number, position) for number, position in self._answers.values() if number > 1)
        found.repeated = sorted(several, key=lambda one: (-one.num_records, one.position))[: self._num_examples]
        found.finished = {reason: least.positions for reason, least in sorted(self._finished.items())}
        found.errors = {kind: least.positions for kind, least in self._errors.items() if len(least)}
        return found

    def _batches(self, file: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, pa.Array]]]:
        try:
            yield from _batches(self._results, file, columns)
        except (OSError, ValueError, pa.ArrowException) as problem:
            self._found.damaged.append(f"{self._results.files[file]}: {problem}")

    def _add(self, file: int, first: int, batch: Mapping[str, pa.Array]) -> None:
        found, chance = self._found, self._chance.random
        num_rows = len(batch["status"])
        found.num_records += num_rows
        found.finish_reasons.update(filter(None, batch["finish_reason"].to_pylist()))
        for name in _NUMBERS:
            self._arrays[name].append(_numbers(batch[name]))
        for name in ("image_width", "image_height"):
            self._arrays[name].append(_numbers(batch[name].flatten()))
        for warning in batch["warnings"].flatten().to_pylist():
            kind = warning[:_WARNING_CHARACTERS]
            if kind in found.warnings or len(found.warnings) < _MOST_KINDS:
                found.warnings[kind] += 1
        self._text_bytes += batch["response"].nbytes
        narrow = (batch[name].to_pylist() for name in ("status", "error_stage", "error_type", "finish_reason"))
        for row, (status, stage, kind, reason, response) in enumerate(
            zip(*narrow, batch["response"].to_pylist(), strict=True), start=first
        ):
            position = Position(file, row)
            self._random.offer(chance(), position, position)
            if status == "error":
                if (least := self._errors.get(f"{stage}/{kind}")) is not None:
                    least.offer(chance(), position, position)
                continue
            answer = response or ""
            text = hash(answer)
            found.num_answers += 1
            self._longest.offer(-len(answer), text, position)
            self._shortest.offer(len(answer), text, position)
            if reason in ("length", "repetition"):
                self._finished[reason].offer(chance(), position, position)
            if (known := self._answers.get(text)) is not None:
                known[0] += 1
            else:
                self._answers[text] = [1, position]

    def _look_for_errors(self, others: Sequence[int]) -> None:
        """Examples of rare classes, in shards whose footers say that they have some."""
        numbers = list(self._results.summaries)
        for kind, least in self._errors.items():
            num_read = 0
            for file in others:
                if len(least) >= self._num_examples or num_read >= _MOST_SHARDS_OF_A_CLASS:
                    break
                if not self._results.summaries[numbers[file]].errors.get(kind):
                    continue
                num_read += 1
                for first, batch in self._batches(file, ("error_stage", "error_type")):
                    pairs = zip(batch["error_stage"].to_pylist(), batch["error_type"].to_pylist(), strict=True)
                    for row, (stage, name) in enumerate(pairs, start=first):
                        if f"{stage}/{name}" == kind:
                            least.offer(self._chance.random(), (file, row), Position(file, row))


def records_at(
    results: Results, positions: Iterable[Position], most_columns: int = 16
) -> dict[Position, dict[str, Any]]:
    """Whole records, by our names and `input.NAME`; without bytes, and with as many columns of the input at most."""
    kept = [INPUT + name for name in results.input_columns if not _holds_bytes(results.schema.field(name).type)]
    columns = [*results.names, *kept[:most_columns]]
    wanted: dict[int, set[int]] = defaultdict(set)
    for file, row in positions:
        wanted[file].add(row)
    found: dict[Position, dict[str, Any]] = {}
    for file, rows in sorted(wanted.items()):
        last = max(rows)
        for first, batch in _batches(results, file, columns):
            for row in sorted(rows & set(range(first, first + len(batch["id"])))):
                found[Position(file, row)] = {name: array[row - first].as_py() for name, array in batch.items()}
            if first + len(batch["id"]) > last:
                break
    return found


def plain_text(value: Any, most_characters: int) -> str:
    """A value of an input column as text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most_characters else text[:most_characters] + " ..."


def _batches(results: Results, file: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """A few rows after the other: the number of the first, and the columns by the names that were asked for."""
    in_file = [results.in_file(column) for column in columns]
    with (
        open_read(results.files[file]) as source,
        pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as parquet,
    ):
        first = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(in_file)), use_threads=False):
            yield first, {column: batch.column(name) for column, name in zip(columns, in_file, strict=True)}
            first += batch.num_rows


def _numbers(array: pa.Array) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = array.drop_null().to_numpy(zero_copy_only=False).astype(np.int64)
    return values


def _joined(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def _holds_bytes(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    if pa.types.is_nested(type_):
        return any(_holds_bytes(type_.field(number).type) for number in range(type_.num_fields))
    return any(is_kind(type_) for is_kind in kinds)
