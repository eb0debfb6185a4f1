"""Batches of Parquet rows: small where a row may be large, and no smaller than they need to be."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.parquet_limits import batch_rows, dictionary_bytes

MIB = 1 << 20


def limit(path: Path, column: str, num_rows: int = 32) -> int:
    def first_bytes(offset: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(32)

    return batch_rows(pq.ParquetFile(path), first_bytes, 0, [column], num_rows)


def header_of(path: Path) -> bytes:
    chunk = pq.read_metadata(path).row_group(0).column(0)
    with open(path, "rb") as file:
        file.seek(chunk.dictionary_page_offset)
        return file.read(32)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 5000, 3 * MIB])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_header_of_a_dictionary_says_how_large_it_is(num_bytes: int, compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    value = os.urandom(num_bytes)
    pq.write_table(pa.table({"x": [value] * 4}), path, compression=compression, dictionary_pagesize_limit=64 * MIB)
    assert dictionary_bytes(header_of(path)) == num_bytes + 4  # the value behind its length


@pytest.mark.parametrize(
    "header", [b"", b"\x15", b"\x15\x04\x15\xff", b"\x15\x00\x15\x02", b"PAR1", b"\x15\x04\x15\x01"]
)
def test_what_is_no_header_is_refused(header: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid, match="no header"):
        dictionary_bytes(header)


def test_texts_that_compress_well_are_read_by_full_batches(tmp_path: Path) -> None:
    """By the footer alone one of their values might be as large as all of them together."""
    path, rng = tmp_path / "a.parquet", random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(500)]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(20_000)]
    pq.write_table(pa.table({"x": texts}), path, compression="zstd")
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert chunk.total_uncompressed_size - chunk.total_compressed_size > 2 * MIB  # more than 1/32 of 64 MiB
    assert limit(path, "x") == 32


def test_a_large_value_that_many_rows_share_is_read_by_few_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([os.urandom(16 * MIB)]))
    pq.write_table(pa.table({"x": column, "y": [1] * 64}), path, dictionary_pagesize_limit=64 * MIB)
    assert limit(path, "x") in (3, 4)  # of 16 MiB each in 64
    assert limit(path, "y") == 32
