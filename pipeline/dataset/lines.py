"""The records of a JSONL or CSV file, each with the byte where it starts.

A record that cannot be parsed is an exception in the place of its values; the next record is read all the same.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

DELIMITERS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (".jsonl", ".ndjson", *DELIMITERS)
MAX_LINE_BYTES = 1 << 28  # a line beyond this is no record but a mistake


class Record(NamedTuple):
    offset: int
    values: dict[str, Any] | ValueError
    num_cleaned: int = 0  # strings with a lone surrogate, which no UTF-8 file can hold


def records(handle: IO[bytes], path: str, offset: int = 0) -> Iterator[Record]:
    """The records from byte `offset` on, which is 0 or the offset of a record. Blank lines are no records."""
    delimiter = delimiter_of(path)
    if delimiter is None:
        yield from _json_records(handle, offset)
        return
    names = header(handle, delimiter)
    if names is not None:
        yield from _csv_records(handle, delimiter, names, offset)


def delimiter_of(path: str) -> str | None:
    """What separates the fields of a CSV or TSV file; None for JSON lines."""
    return next((sign for ending, sign in DELIMITERS.items() if path.lower().endswith(ending)), None)


def header(handle: IO[bytes], delimiter: str) -> list[str] | None:
    """The column names of a CSV file, or None if it is empty; leaves the handle behind them.

    Raises:
        ValueError: the first line is no header.
    """
    handle.seek(0)
    lines = _Lines(handle, 0)
    names = next((fields for fields in _reader(lines, delimiter) if fields), None)
    if lines.error:
        raise lines.error
    if names and len(set(names)) < len(names):
        raise ValueError(f"a column name occurs twice in {names}")
    handle.seek(lines.offset)
    return names


def line_number(handle: IO[bytes], offset: int, known: tuple[int, int] = (0, 1)) -> int:
    """The line, counted from 1, that starts at a byte. Reads all from a `known` byte and line: for messages only."""
    position, count = known
    handle.seek(position)
    while position < offset:
        block = handle.read(min(offset - position, 1 << 20))
        if not block:
            break
        position += len(block)
        count += block.count(b"\n")
    return count


def _json_records(handle: IO[bytes], offset: int) -> Iterator[Record]:
    handle.seek(offset)
    while line := handle.readline(MAX_LINE_BYTES):
        start, offset = offset, offset + len(line)
        too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
        if too_long:
            while (rest := handle.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                offset += len(rest)
            offset += len(rest)
            yield Record(start, ValueError(f"a line of {offset - start} bytes"))
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
        if not line.strip():
            continue
        yield _json_record(start, line)


def _json_record(offset: int, line: bytes) -> Record:
    try:
        values = json.loads(line.decode())
    except RecursionError:
        return Record(offset, ValueError("JSON nested too deeply"))
    except ValueError as error:
        return Record(offset, error)
    if not isinstance(values, dict):
        return Record(offset, ValueError(f"expected a JSON object, found a {type(values).__name__}"))
    if b"\\ud" in line or b"\\uD" in line:
        values, num_cleaned = _cleaned(values)
        return Record(offset, values, num_cleaned)
    return Record(offset, values)


def _cleaned(value: Any) -> tuple[Any, int]:
    """The value with lone surrogates replaced, and in how many strings."""
    if isinstance(value, str):
        clean = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return clean, int(clean != value)
    if isinstance(value, list):
        pairs = [_cleaned(item) for item in value]
        return [item for item, _ in pairs], sum(number for _, number in pairs)
    if isinstance(value, dict):
        parts = [(_cleaned(name), _cleaned(item)) for name, item in value.items()]
        return {name[0]: item[0] for name, item in parts}, sum(name[1] + item[1] for name, item in parts)
    return value, 0


class _Lines:
    """Text lines for csv.reader, which takes as many as a record needs; `offset` is where the next one starts."""

    def __init__(self, handle: IO[bytes], offset: int) -> None:
        self.handle = handle
        self.offset = offset
        self.error: ValueError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.handle.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        start, self.offset = self.offset, self.offset + len(line)
        line = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.error = error
            return line.decode(errors="replace")


def _reader(lines: _Lines, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the default of 128 KB is less than a picture as text
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _csv_records(handle: IO[bytes], delimiter: str, names: list[str], offset: int) -> Iterator[Record]:
    lines = _Lines(handle, offset or handle.tell())
    handle.seek(lines.offset)
    reader = _reader(lines, delimiter)
    while True:
        start = lines.offset
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as reason:
            lines.error = None
            yield Record(start, ValueError(f"{reason}; {lines.offset - start} bytes passed over"))
            continue
        error, lines.error = lines.error, None
        if error is not None:
            yield Record(start, error)
        elif fields and len(fields) != len(names):
            yield Record(start, ValueError(f"expected {len(names)} fields, found {len(fields)}"))
        elif fields:
            yield Record(start, dict(zip(names, fields, strict=True)))
