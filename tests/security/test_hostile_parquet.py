"""Parquet files that are damaged, lie about their size, or carry code: the run goes on, and says which file it was."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_run import SHARED, TESTS, parquet_at, png, records, start

from pipeline.dataset.hub import HubConfig
from pipeline.dataset.parquet import ParquetConfig
from pipeline.errors import UsageError
from pipeline.records import Row

PARQUET = SHARED / "parquet"
needs_shared = pytest.mark.skipif(not PARQUET.is_dir(), reason=f"no test data at {PARQUET}")
MIB = 1 << 20


def rows_of(path: Path, image_column: str | None = None) -> list[Row]:
    config = ParquetConfig(path=str(path), image_column=image_column)
    dataset = config.open(config.scan())
    return list(dataset.rows(0, len(dataset)))


@needs_shared
def test_every_malformed_file_is_an_error_that_names_it() -> None:
    """Fault P-1: each malformed file of the public collection is refused, or its rows name the damaged row group."""
    files = sorted((PARQUET / "bad_data").glob("*.parquet"))
    assert len(files) >= 4
    outcomes = {}
    for path in files:
        try:
            rows = rows_of(path)
        except UsageError as problem:
            outcomes[path.stem] = "refused" if path.name in str(problem) else f"not named: {problem}"
            continue
        faults = [row.fault.message for row in rows if row.fault]
        assert all(path.name in message and "row group" in message for message in faults)
        outcomes[path.stem] = "faults" if faults else f"{len(rows)} rows"
    assert outcomes == {
        "PARQUET-1481": "refused",
        "ARROW-GH-41317": "faults",
        "ARROW-RS-GH-6229-LEVELS": "faults",
        "ARROW-GH-43605": "21186 rows",  # malformed only for readers that trust its index
    }


@needs_shared
def test_the_one_malformed_file_that_can_be_read_is_read_right() -> None:
    """Fault P-1: the values of ARROW-GH-43605 come as another reader has them, and those of any range the same."""
    path = PARQUET / "bad_data" / "ARROW-GH-43605.parquet"
    duckdb = pytest.importorskip("duckdb")
    names = pq.read_schema(path).names
    expected = duckdb.execute(f"select * from read_parquet('{path}')").fetchall()
    rows = rows_of(path)
    assert [tuple(row.columns[name] for name in names) for row in rows] == expected
    config = ParquetConfig(path=str(path), image_column=None)
    assert list(config.open(config.scan()).rows(21_000, 21_030)) == rows[21_000:21_030]


@pytest.mark.slow
@needs_shared
def test_a_run_over_a_damaged_file_has_an_error_record_for_each_of_its_rows(tmp_path: Path) -> None:
    """Fault P-1, P-2: a file whose checksums do not fit costs its own rows; a good file beside it is answered."""
    damaged = pq.ParquetFile(PARQUET / "data" / "datapage_v1-corrupt-checksum.parquet")
    parquet_at(tmp_path / "a.parquet", {name: pa.array([1], damaged.schema_arrow.field(name).type)
                                        for name in damaged.schema_arrow.names})  # fmt: skip
    (tmp_path / "b.parquet").symlink_to(PARQUET / "data" / "datapage_v1-corrupt-checksum.parquet")
    start(tmp_path, "dataset=parquet", f"dataset.path={tmp_path}/*.parquet", "dataset.image_column=null")
    rows = records(tmp_path)
    assert len(rows) == 5121
    assert rows[0]["status"] == "ok"
    for row in rows[1:]:
        assert (row["status"], row["error_stage"]) == ("error", "read")
        assert "b.parquet row group 0" in row["error_message"]
        assert "CRC" in row["error_message"]


@needs_shared
def test_damaged_pages_are_not_read_as_other_values() -> None:
    """Fault P-2: pages whose checksums do not fit are refused, not read as the values that they happen to hold."""
    path = PARQUET / "data" / "datapage_v1-corrupt-checksum.parquet"
    assert pq.read_table(path).num_rows == 5120, "without verification they would be read"
    rows = rows_of(path)
    assert len(rows) == 5120
    assert all(row.fault is not None and "CRC" in row.fault.message for row in rows)


def claimed_in_footer(path: Path) -> int:
    """Zeros that the footer adds up: four rows of 128 MiB, all of them the same memory."""
    column = pa.chunked_array([pa.array([bytes(128 * MIB)])] * 4)
    parquet_at(path, {"image": column}, compression="zstd", use_dictionary=False, row_group_size=4)
    return 4


def hidden_in_a_dictionary(path: Path) -> int:
    """One value of 64 MiB, and 33 rows that say "this one": the footer knows of 64 MiB, the rows have 2 GiB."""
    dictionary_at(path, pa.array([0] * 33, pa.int32()), 64 * MIB)
    return 33


def many_rows_of_one_value(path: Path) -> int:
    """The same with 2,048 rows of 1 MiB."""
    dictionary_at(path, pa.array([0] * 2048, pa.int32()), MIB)
    return 2048


def hidden_in_a_list(path: Path) -> int:
    """One row, which has the value 33 times."""
    dictionary_at(path, pa.ListArray.from_arrays([0, 33], pa.array([0] * 33, pa.int32())), 64 * MIB)
    return 1


def dictionary_at(path: Path, indices: pa.Array, num_bytes: int) -> None:
    values = pa.array([bytes(num_bytes)])
    if pa.types.is_list(indices.type):
        cells = pa.DictionaryArray.from_arrays(indices.values, values)
        column = pa.ListArray.from_arrays(indices.offsets, cells)
    else:
        column = pa.DictionaryArray.from_arrays(indices, values)
    parquet_at(path, {"image": column}, compression="brotli", dictionary_pagesize_limit=1 << 30, store_schema=False)


# Reads as a run does, one row after the other; what it needs at most besides what it had before.
READER = """
import sys
from pipeline.dataset.parquet import ParquetConfig
def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
config = ParquetConfig(path=sys.argv[1])
before, num_rows, faults = peak_kib(), 0, set()
for row in config.open(config.scan()).rows(0, int(sys.argv[2])):
    num_rows += 1
    faults |= {row.fault.message if row.fault else None}
print(num_rows, (peak_kib() - before) // 1024, *faults)
"""


@pytest.mark.parametrize(
    ("made", "is_refused"),
    [
        (claimed_in_footer, True),
        (hidden_in_a_dictionary, False),
        (many_rows_of_one_value, False),
        (hidden_in_a_list, True),
    ],
)
def test_a_small_file_does_not_become_gigabytes(made: Callable[[Path], int], is_refused: bool, tmp_path: Path) -> None:
    """Fault P-3: a few KB that unpack to gigabytes are refused by the footer, or read within 512 MiB of memory."""
    path = tmp_path / "small.parquet"
    num_rows = made(path)
    assert path.stat().st_size < 20_000
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path), str(num_rows)], cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, peak_mib, fault = done.stdout.split(maxsplit=2)
    assert int(found) == num_rows
    assert int(peak_mib) < 512, done.stdout
    assert ("row group 0 cannot be read: column image" in fault and "claims" in fault) == is_refused, fault


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


# Names under which libraries have unpickled the metadata of a type: pyarrow (CVE-2023-47248), Ray (CVE-2026-41486).
EXTENSIONS = [
    "arrow.py_extension_type", "ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_pickled_object",
    "ray.data.arrow_variable_shaped_tensor", "datasets.features.features.Array2DExtensionType", "unknown.type",
]  # fmt: skip


def extended(column: pa.Array, name: str, canary: Path) -> pa.Table:
    """A table whose column says that it is of an extension type with a pickle in its metadata."""
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Canary(canary))}
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("mine", column.type, metadata=metadata)])
    return pa.Table.from_arrays([pa.array([png()] * len(column)), column], schema=schema)


def reads_plain_values(folder: Path) -> None:
    """In a process of its own: once another test has imported datasets, pyarrow knows its extension types."""
    assert "datasets" not in sys.modules
    for number, name in enumerate(EXTENSIONS):
        place, canary = folder / str(number), folder / "touched"
        (place / "saved").mkdir(parents=True)
        table = extended(pa.array([7, 8]), name, canary)
        pq.write_table(table, place / "a.parquet", write_page_checksum=True)
        schema = base64.b64decode(pq.read_metadata(place / "a.parquet").metadata[b"ARROW:schema"])
        assert pickle.dumps(Canary(canary)) in schema
        assert [row.columns["mine"] for row in rows_of(place / "a.parquet", "image")] == [7, 8]
        # The same in the Arrow files of a datasets folder.
        with pa.OSFile(str(place / "saved" / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        (place / "saved" / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
        config = HubConfig(path=str(place / "saved"))
        assert [row.columns["mine"] for row in config.open(config.scan()).rows(0, 2)] == [7, 8]
        assert not canary.exists()


def test_a_pickle_in_the_metadata_of_a_type_is_not_read(tmp_path: Path) -> None:
    """Fault P-4: a column of an extension type whose metadata holds a pickle is read as what it is stored as."""
    code = "import sys, pathlib, test_hostile_parquet as t; t.reads_plain_values(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join(map(str, (TESTS / "security", TESTS / "torture", TESTS, TESTS.parent)))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == len(EXTENSIONS)


def test_a_run_over_such_a_column_answers_and_keeps_plain_values(tmp_path: Path) -> None:
    """Fault P-4: through the whole program, worker processes included; the output has no such type either."""
    (tmp_path / "in").mkdir()
    table = extended(pa.array(["a", "b"]), "arrow.py_extension_type", tmp_path / "touched")
    pq.write_table(table, tmp_path / "in" / "a.parquet", write_page_checksum=True)
    start(tmp_path, "dataset=parquet", "dataset.path=in")
    assert [(row["status"], row["mine"]) for row in records(tmp_path)] == [("ok", "a"), ("ok", "b")]
    for path in (tmp_path / "out").rglob("*.parquet"):
        assert b"py_extension_type" not in path.read_bytes()
    assert not (tmp_path / "touched").exists()
