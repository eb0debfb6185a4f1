"""What every reader promises, whatever it reads. Pictures are garbage bytes: no reader may open one."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import demo
from pipeline.dataset.base import FILES_SCHEMA, MARK_EVERY, DatasetConfig, Inputs
from pipeline.dataset.demo import DemoConfig
from pipeline.dataset.hub import HubConfig
from pipeline.dataset.images import ImagesConfig
from pipeline.dataset.jsonl import JsonlConfig
from pipeline.dataset.parquet import ParquetConfig
from pipeline.dataset.webdataset import WebdatasetConfig
from pipeline.records import ImageRef

NUM_ROWS = 2 * MARK_EVERY + 44  # two marks and a rest in one file, for formats with marks


def written(folder: str, files: dict[str, bytes], backwards: bool) -> str:
    for name in sorted(files, reverse=backwards):
        with fsspec.open(f"{folder}/{name}", "wb", auto_mkdir=True) as handle:
            handle.write(files[name])
    return folder


def picture(number: int) -> bytes:
    return f"no picture {number}".encode()


def parquet_bytes(numbers: range, images: str = "image") -> bytes:
    rows = [{"bytes": picture(number), "path": None} for number in numbers]
    cells = rows if images == "image" else [[row, row] for row in rows]
    table = pa.table({"id": [f"r{n}" for n in numbers], images: cells, "question": [f"q{n}" for n in numbers]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=50, write_page_checksum=True)
    return sink.getvalue()


def tar_bytes(numbers: range, mode: str) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for number in numbers:
            for extension, data in (("jpg", picture(number)), ("json", json.dumps({"n": number}).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def images(folder: str, backwards: bool) -> DatasetConfig:
    files = {f"{n % 3}/img{n}.jpg": picture(n) for n in range(NUM_ROWS)}
    return ImagesConfig(path=written(folder, files, backwards))


def parquet(folder: str, backwards: bool) -> DatasetConfig:
    files = {"part-2.parquet": parquet_bytes(range(200)), "part-10.parquet": parquet_bytes(range(200, NUM_ROWS))}
    return ParquetConfig(path=written(folder, files, backwards), id_column="id")


def jsonl(folder: str, backwards: bool) -> DatasetConfig:
    lines = [json.dumps({"image": f"{n}.jpg", "n": n, "box": [n, 0.5]}) + "\n" for n in range(NUM_ROWS)]
    files = {"a2.jsonl": "".join(lines[:290]).encode(), "a10.jsonl": "\n".join(lines[290:]).encode(), "b.jsonl": b""}
    return JsonlConfig(path=written(folder, files, backwards), id_column="n")


def csv(folder: str, backwards: bool) -> DatasetConfig:
    lines = [f'{n}.jpg,"first line\nsecond, {n}"\r\n' for n in range(NUM_ROWS)]
    return JsonlConfig(path=written(folder, {"a.csv": ("image,text\r\n" + "".join(lines)).encode()}, backwards))


def webdataset(folder: str, backwards: bool) -> DatasetConfig:
    files = {"000.tar": tar_bytes(range(290), "w"), "001.tar": tar_bytes(range(NUM_ROWS - 290), "w")}
    return WebdatasetConfig(path=written(folder, files, backwards))


def webdataset_gz(folder: str, backwards: bool) -> DatasetConfig:
    return WebdatasetConfig(path=written(folder, {"000.tgz": tar_bytes(range(NUM_ROWS), "w:gz")}, backwards))


def saved(folder: str, backwards: bool) -> DatasetConfig:
    files = {"state.json": b'{"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]}'}
    for name, numbers in (("data-1.arrow", range(200)), ("data-0.arrow", range(200, NUM_ROWS))):
        table = pq.read_table(io.BytesIO(parquet_bytes(numbers)))
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=70)
        files[name] = sink.getvalue()
    return HubConfig(path=written(folder, files, backwards), id_column="id")


def packaged(folder: str, backwards: bool) -> DatasetConfig:
    written(folder, {"demo.parquet": parquet_bytes(range(NUM_ROWS), "images")}, backwards)
    return DemoConfig()


KINDS: dict[str, Callable[[str, bool], DatasetConfig]] = {
    "images": images,
    "memory images": images,
    "parquet": parquet,
    "memory parquet": parquet,
    "jsonl": jsonl,
    "memory jsonl": jsonl,
    "csv": csv,
    "webdataset": webdataset,
    "memory webdataset": webdataset,
    "webdataset gz": webdataset_gz,
    "hub save_to_disk": saved,
    "demo": packaged,
}


@pytest.fixture(params=KINDS)
def source(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DatasetConfig]:
    def build(name: str = "source", backwards: bool = False) -> DatasetConfig:
        monkeypatch.setattr(demo, "DEMO_FILE", tmp_path / name / "demo.parquet")
        folder = f"{tmp_path}/{name}"
        return KINDS[request.param](f"memory:/{folder}" if "memory" in request.param else folder, backwards)

    return build


def test_all_rows_are_there_in_order_with_unique_ids_and_an_unopened_image(
    source: Callable[..., DatasetConfig],
) -> None:
    config = source()
    inputs = config.scan()
    rows = list(config.open(inputs).rows(0, NUM_ROWS))
    assert len(config.open(inputs)) == NUM_ROWS == sum(inputs.files["num_rows"].to_pylist())
    assert [row.index for row in rows] == list(range(NUM_ROWS))
    assert len({row.id for row in rows}) == NUM_ROWS
    assert [row.fault for row in rows] == [None] * NUM_ROWS
    for row in rows:
        assert len(row.images) == (2 if isinstance(config, DemoConfig) else 1)
        assert all(isinstance(image, ImageRef) and (image.data is None) != (image.path is None) for image in row.images)
        assert list(row.columns) == inputs.columns.names
        assert not any(isinstance(value, bytes) for value in row.columns.values())


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (127, 129), (199, 260), (NUM_ROWS - 1, NUM_ROWS)])
def test_a_range_is_the_slice_of_all_rows(source: Callable[..., DatasetConfig], start: int, stop: int) -> None:
    config = source()
    dataset = config.open(config.scan())
    assert list(dataset.rows(start, stop)) == list(dataset.rows(0, NUM_ROWS))[start:stop]


def test_two_ranges_may_be_read_side_by_side(source: Callable[..., DatasetConfig]) -> None:
    config = source()
    dataset = config.open(config.scan())
    pairs = list(zip(dataset.rows(0, 60), dataset.rows(NUM_ROWS - 60, NUM_ROWS), strict=True))
    everything = list(dataset.rows(0, NUM_ROWS))
    assert pairs == list(zip(everything[:60], everything[-60:], strict=True))


def test_a_range_outside_the_dataset_is_refused(source: Callable[..., DatasetConfig]) -> None:
    config = source()
    with pytest.raises(ValueError, match=f"{NUM_ROWS} rows"):
        list(config.open(config.scan()).rows(0, NUM_ROWS + 1))


def test_the_order_in_which_files_were_made_does_not_matter(source: Callable[..., DatasetConfig]) -> None:
    first, again, other = source().scan(), source().scan(), source("other", backwards=True).scan()
    assert first.files.schema == FILES_SCHEMA
    assert first.files.equals(again.files)
    assert first.files.equals(other.files)
    assert first.columns == other.columns


def test_a_plan_read_back_from_parquet_gives_the_same_rows(
    source: Callable[..., DatasetConfig], tmp_path: Path
) -> None:
    config = source()
    inputs = config.scan()
    pq.write_table(inputs.files, tmp_path / "inputs.parquet")
    pq.write_metadata(inputs.columns, tmp_path / "columns.parquet")
    files, columns = pq.read_table(tmp_path / "inputs.parquet"), pq.read_schema(tmp_path / "columns.parquet")
    reopened = config.open(Inputs(inputs.root, files, columns))
    assert list(reopened.rows(100, 220)) == list(config.open(inputs).rows(100, 220))


def test_values_fit_the_columns_that_the_scan_promises(source: Callable[..., DatasetConfig]) -> None:
    config = source()
    inputs = config.scan()
    values = [dict(row.columns) for row in config.open(inputs).rows(0, NUM_ROWS)]
    assert pa.Table.from_pylist(values, schema=inputs.columns).to_pylist() == values
