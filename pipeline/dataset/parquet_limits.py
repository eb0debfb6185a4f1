"""How many rows of a row group may be unpacked at once: a few kilobytes of Parquet can hold gigabytes.

Compressed pages of one repeated byte are told by what the footer claims. A dictionary of one large value costs each row
that points at it nothing in the file and all of the value in memory; its size is in the header of its page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FirstBytes = Callable[[int], bytes]  # the next few dozen bytes of the file from an offset on

_BOMB_BYTES, _BOMB_RATIO = 1 << 28, 1000  # a row group that claims more than both is not unpacked
_BATCH_BYTES = 1 << 26  # what a batch may have when each of its rows holds the largest value of a dictionary
_HONEST_RATIO = 20  # texts compress so well at most
_NEXT_FIELD_IS_I32, _DICTIONARY_PAGE = 0x15, 2  # in the header of a page


def batch_rows(file: pq.ParquetFile, first_bytes: FirstBytes, group: int, columns: list[str], num_rows: int) -> int:
    """So many rows of a row group, or fewer.

    Raises:
        pa.ArrowInvalid: the columns are not to be unpacked at all, or what says how large they are is damaged.
    """
    chunks = file.metadata.row_group(group)
    for number in range(chunks.num_columns):
        chunk = chunks.column(number)
        if chunk.path_in_schema.split(".")[0] not in columns:
            continue
        claimed, stored = chunk.total_uncompressed_size, max(chunk.total_compressed_size, 1)
        value_bytes = _largest_value_bytes(chunk)
        if value_bytes * num_rows > _BATCH_BYTES and claimed <= _HONEST_RATIO * stored:
            value_bytes = min(value_bytes, dictionary_bytes(first_bytes(chunk.dictionary_page_offset)))
        in_lists = file.schema.column(number).max_repetition_level > 0
        if in_lists and value_bytes > _BATCH_BYTES >> 4 and claimed > _BOMB_RATIO // 10 * stored:
            claimed = max(claimed, value_bytes * chunk.num_values)  # one row may hold it so often
        if claimed > max(_BOMB_BYTES, _BOMB_RATIO * stored):
            raise pa.ArrowInvalid(f"column {chunk.path_in_schema} claims {claimed} bytes in {stored}")
        num_rows = max(1, min(num_rows, _BATCH_BYTES // max(value_bytes, 1)))
    return num_rows


def _largest_value_bytes(chunk: Any) -> int:
    """What a value of a dictionary may have at most, by the footer: rows that repeat it cost nothing in the file.

    The dictionary is what the chunk has unpacked besides its data pages, which have at least what is stored of them:
    far too much where data pages compress well, as texts do.
    """
    if not chunk.has_dictionary_page:
        return 0
    stored_dictionary = chunk.data_page_offset - (chunk.dictionary_page_offset or 0)
    stored_pages = chunk.total_compressed_size - stored_dictionary
    return int(chunk.total_uncompressed_size - max(stored_pages, 0))


def dictionary_bytes(header: bytes) -> int:
    """The size that a dictionary page unpacks to, from the first bytes of its header: Thrift's compact protocol.

    Raises:
        pa.ArrowInvalid: they are no header of a dictionary page.
    """
    try:
        kind, place = _integer(header, 0)
        num_bytes, _ = _integer(header, place)
    except IndexError:
        kind = num_bytes = -1
    if kind != _DICTIONARY_PAGE or num_bytes < 0:
        raise pa.ArrowInvalid("a dictionary page has no header")
    return num_bytes


def _integer(header: bytes, place: int) -> tuple[int, int]:
    """The next field, a zigzag varint behind the byte that says so, and the place behind it."""
    if header[place] != _NEXT_FIELD_IS_I32:
        raise IndexError(place)
    value = shift = 0
    while True:
        place += 1
        value |= (header[place] & 0x7F) << shift
        shift += 7
        if header[place] < 0x80:
            return (value >> 1) ^ -(value & 1), place + 1
