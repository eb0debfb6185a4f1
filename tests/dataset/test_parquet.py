"""Parquet: kinds of image columns, agreement of files, ids, and damage."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.demo import DemoConfig
from pipeline.dataset.parquet import ParquetConfig
from pipeline.errors import RunFailed, UsageError
from pipeline.records import ImageRef, Row, Stage

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "parquet"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no test data at {SHARED}")


def table_at(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **{"write_page_checksum": True, **options})
    return path


def rows_of(config: ParquetConfig) -> list[Row]:
    dataset = config.open(config.scan())
    return list(dataset.rows(0, len(dataset)))


@pytest.mark.parametrize(
    ("cells", "image", "is_kept"),
    [
        (pa.array([b"x"]), ImageRef(data=b"x"), False),
        (pa.array([b"x"], pa.large_binary()), ImageRef(data=b"x"), False),
        ([{"bytes": b"x", "path": "a.jpg"}], ImageRef(data=b"x"), False),
        (["data:image/png;base64,eA=="], ImageRef(data=b"x"), False),
        (["sub/a.jpg"], ImageRef(path="{folder}/sub/a.jpg"), True),
        (pa.array(["a.jpg"]).dictionary_encode(), ImageRef(path="{folder}/a.jpg"), True),
    ],
)
@pytest.mark.parametrize("in_list", [False, True])
def test_an_image_is_bytes_a_struct_a_data_uri_a_path_or_a_list_of_these(
    tmp_path: Path, cells: Any, image: ImageRef, is_kept: bool, in_list: bool
) -> None:
    """Fault 45: an image as bytes, struct, data URI, path, or in a list: the same image."""
    array = cells if isinstance(cells, pa.Array) else pa.array(cells)
    if in_list:
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        array = pa.ListArray.from_arrays([0, 1], array)
    config = ParquetConfig(path=str(table_at(tmp_path / "a.parquet", {"image": array, "n": [7]})))
    (row,) = rows_of(config)
    path = image.path and image.path.format(folder=tmp_path)
    assert row.images == (ImageRef(data=image.data, path=path),)
    assert ("image" in row.columns) == is_kept
    assert row.columns["n"] == 7


def test_paths_start_from_root_where_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    file = table_at(tmp_path / "a.parquet", {"image": ["a.jpg", "../a.jpg", None]})
    inside, outside, null = rows_of(ParquetConfig(path=str(file), root=str(tmp_path / "pictures")))
    assert inside.images == (ImageRef(path=str((tmp_path / "pictures/a.jpg").resolve())),)
    assert [row.fault and row.fault.kind for row in (outside, null)] == ["PathOutsideRoot", "NullImage"]
    assert outside.columns == {"image": "../a.jpg"}
    assert "row 1" in (outside.fault.message if outside.fault else "")


def test_columns_of_bytes_are_left_out_with_a_warning(tmp_path: Path) -> None:
    cells = {"image": [b"x"], "mask": [b"x"], "other": [{"bytes": b"x", "path": "a"}], "n": [1]}
    config = ParquetConfig(path=str(table_at(tmp_path / "a.parquet", cells)))
    inputs = config.scan()
    assert inputs.columns.names == ["n"]
    assert any("mask, other" in warning for warning in inputs.warnings)
    with pytest.raises(UsageError, match="holds bytes"):
        ParquetConfig(path=config.path, columns=["n", "mask"]).scan()


def test_image_column_null_reads_no_image_column(tmp_path: Path) -> None:
    file = table_at(tmp_path / "a.parquet", {"question": ["Why?", "How?"]})
    assert [row.columns["question"] for row in rows_of(ParquetConfig(path=str(file), image_column=None))] == [
        "Why?",
        "How?",
    ]
    with pytest.raises(UsageError, match=r"image_column=image.*\['question'\].*image_column=null"):
        ParquetConfig(path=str(file)).scan()


@pytest.mark.parametrize("option", ["id_column", "messages_column", "image_column"])
def test_an_absent_column_is_refused_with_all_columns_and_the_nearest(tmp_path: Path, option: str) -> None:
    file = table_at(tmp_path / "a.parquet", {"image": ["a"], "imaeg": ["b"]})
    with pytest.raises(UsageError, match=r"imagee.*Did you mean 'image'"):
        ParquetConfig(path=str(file), **{option: "imagee"}).scan()
    with pytest.raises(UsageError, match=r"dataset\.columns=nothing"):
        ParquetConfig(path=str(file), columns=["image", "nothing"]).scan()


def test_a_number_is_no_image_column(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is of type int64"):
        ParquetConfig(path=str(table_at(tmp_path / "a.parquet", {"image": [1]}))).scan()


def test_files_must_agree_on_columns_up_to_nulls_and_kinds_of_text(tmp_path: Path) -> None:
    table_at(tmp_path / "1.parquet", {"image": ["a"], "n": pa.nulls(1)})
    table_at(tmp_path / "2.parquet", {"image": pa.array(["b"], pa.large_string()), "n": [2], "more": [1]})
    inputs = ParquetConfig(path=str(tmp_path)).scan()
    assert inputs.columns == pa.schema([("image", pa.string()), ("n", pa.int64())])
    assert any("'more' of 2.parquet" in warning for warning in inputs.warnings)
    assert [row.columns["n"] for row in rows_of(ParquetConfig(path=str(tmp_path)))] == [None, 2]
    table_at(tmp_path / "3.parquet", {"image": ["c"], "n": ["text"]})
    with pytest.raises(UsageError, match=r"'n' is int64 in 2\.parquet but string in 3\.parquet"):
        ParquetConfig(path=str(tmp_path)).scan()
    table_at(tmp_path / "3.parquet", {"image": ["c"]})
    with pytest.raises(UsageError, match=r"3\.parquet has no column 'n'"):
        ParquetConfig(path=str(tmp_path)).scan()


def test_no_rows_and_no_files_are_valid(tmp_path: Path) -> None:
    assert rows_of(ParquetConfig(path=str(tmp_path))) == []
    table_at(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})
    assert rows_of(ParquetConfig(path=str(tmp_path), id_column=None)) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], r"'a' in rows 0, 2"),
        (["a", None, "b"], r"row 1"),
        ([1.5, float("nan"), 2.0], r"row 1"),
        ([[1], [2], [3]], r"3 rows have no id"),
    ],
)
def test_ids_that_are_null_or_repeated_are_refused_with_examples(tmp_path: Path, ids: list[Any], message: str) -> None:
    """Fault 32: ids that are null or occur twice are refused before the start, with rows as examples."""
    file = table_at(tmp_path / "a.parquet", {"image": ["x"] * 3, "id": ids}, row_group_size=1)
    with pytest.raises(UsageError, match=message):
        ParquetConfig(path=str(file), id_column="id").scan()


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        ([1, 2], ["1", "2"]),
        ([1.0, 2.5], ["1.0", "2.5"]),
        ([True, False], ["True", "False"]),
        ([datetime.date(2024, 1, 2), datetime.date(2024, 1, 3)], ["2024-01-02", "2024-01-03"]),
        (["a\nb", "/\0"], ["a\nb", "/\0"]),
    ],
)
def test_an_id_is_the_text_of_its_value(tmp_path: Path, ids: list[Any], texts: list[str]) -> None:
    """Fault 32: ids of floats, dates, with line breaks, slashes and NUL: the text of the value."""
    file = table_at(tmp_path / "a.parquet", {"image": ["x"] * 2, "id": ids})
    assert [row.id for row in rows_of(ParquetConfig(path=str(file), id_column="id"))] == texts


def test_a_conversation_column_gives_messages_and_stays_a_column(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    file = table_at(tmp_path / "a.parquet", {"image": ["x", "y"], "messages": [turns, None]})
    good, bad = rows_of(ParquetConfig(path=str(file), messages_column="messages"))
    assert good.messages == tuple(turns)
    assert good.columns["messages"] == turns
    assert bad.fault is not None
    assert bad.fault.kind == "NullMessages"


def test_only_the_row_groups_of_the_range_are_read(tmp_path: Path) -> None:
    file = table_at(tmp_path / "a.parquet", {"image": [b"x" * 1000 + bytes([n]) for n in range(90)]}, row_group_size=30)
    config = ParquetConfig(path=str(file))
    dataset = config.open(config.scan())
    damaged(file, group=0)
    damaged(file, group=2)
    assert [row.fault for row in dataset.rows(30, 60)] == [None] * 30


def damaged(file: Path, group: int, column: int = 0) -> None:
    """Flips one bit in the middle of a column chunk."""
    chunk = pq.ParquetFile(file).metadata.row_group(group).column(column)
    data = bytearray(file.read_bytes())
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_row_group_costs_its_own_rows_and_keeps_their_ids(tmp_path: Path) -> None:
    cells = {"image": [bytes([n]) * 50 for n in range(90)], "id": [f"r{n}" for n in range(90)]}
    file = table_at(tmp_path / "a.parquet", cells, row_group_size=30, use_dictionary=False, compression="none")
    damaged(file, group=1)
    rows = rows_of(ParquetConfig(path=str(file), id_column="id"))
    assert [row.id for row in rows] == cells["id"]
    assert [row.index for row in rows if row.fault] == list(range(30, 60))
    fault = rows[30].fault
    assert fault is not None
    assert fault.stage is Stage.READ
    assert f"{file} row group 1" in fault.message
    assert rows[30].columns == {"id": None}


def test_a_damaged_id_column_gives_stand_ins_that_do_not_depend_on_the_range(tmp_path: Path) -> None:
    cells = {"image": ["x"] * 60, "id": [f"r{n}" for n in range(60)]}
    file = table_at(tmp_path / "a.parquet", cells, row_group_size=30, use_dictionary=False, compression="none")
    damaged(file, group=1, column=1)
    config = ParquetConfig(path=str(file), id_column="id")
    dataset = config.open(config.scan())
    rows = list(dataset.rows(0, 60))
    assert [row.id for row in rows[30:32]] == ["a.parquet:30", "a.parquet:31"]
    assert list(dataset.rows(41, 50)) == rows[41:50]


def test_a_file_that_changed_or_vanished_after_the_plan_ends_the_run(tmp_path: Path) -> None:
    file = table_at(tmp_path / "a.parquet", {"image": ["x"]})
    config = ParquetConfig(path=str(file))
    inputs = config.scan()
    table_at(file, {"image": ["x", "y" * 100]})
    with pytest.raises(RunFailed, match="when it was listed"):
        list(config.open(inputs).rows(0, 1))
    file.unlink()
    with pytest.raises(RunFailed, match="cannot be opened"):
        list(config.open(inputs).rows(0, 1))


def test_what_is_no_parquet_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b"", b"PAR1", b"text" * 100):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.parquet is no readable Parquet file"):
            ParquetConfig(path=str(tmp_path)).scan()


def test_times_have_microseconds_and_a_value_python_cannot_hold_costs_one_row(tmp_path: Path) -> None:
    times = pa.array([1_700_000_000_123_456_789, 0], pa.timestamp("ns"))
    days = pa.array([0, 10_000_000], pa.date32())  # the second lies after the year 9999
    file = table_at(tmp_path / "a.parquet", {"image": ["x", "y"], "at": times, "day": days})
    config = ParquetConfig(path=str(file))
    assert config.scan().columns.field("at").type == pa.timestamp("us")
    good, bad = rows_of(config)
    assert good.columns["at"] == datetime.datetime(2023, 11, 14, 22, 13, 20, 123456)
    assert bad.fault is not None
    assert "no Python form" in bad.fault.message


def test_a_row_group_that_claims_far_more_than_it_stores_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = table_at(tmp_path / "a.parquet", {"image": [b"\0" * 4_000_000]}, compression="zstd", use_dictionary=False)
    monkeypatch.setattr("pipeline.dataset.parquet_limits._BOMB_BYTES", 1 << 20)
    (row,) = rows_of(ParquetConfig(path=str(file)))
    assert row.fault is not None
    assert "claims" in row.fault.message


@needs_shared
def test_a_checksum_that_does_not_fit_is_noticed() -> None:
    rows = rows_of(ParquetConfig(path=str(SHARED / "data/datapage_v1-corrupt-checksum.parquet"), image_column=None))
    assert len(rows) == 5120
    assert all(row.fault is not None and "CRC" in row.fault.message for row in rows)


@needs_shared
def test_a_malformed_footer_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="PARQUET-1481"):
        ParquetConfig(path=str(SHARED / "bad_data/PARQUET-1481.parquet"), image_column=None).scan()


@needs_shared
@pytest.mark.parametrize("name", ["ARROW-RS-GH-6229-LEVELS", "ARROW-GH-41317"])
def test_malformed_pages_become_faults_that_name_file_and_row_group(name: str) -> None:
    rows = rows_of(ParquetConfig(path=str(SHARED / f"bad_data/{name}.parquet"), image_column=None))
    assert any(row.fault is not None for row in rows)
    assert all(name in row.fault.message and "row group" in row.fault.message for row in rows if row.fault)


@needs_shared
def test_valid_but_unusual_files_are_read() -> None:
    for name, image_column, num_rows in (
        ("alltypes_plain", "string_col", 8),
        ("binary", "foo", 12),
        ("list_columns", "utf8_list", 3),
    ):
        rows = rows_of(ParquetConfig(path=str(SHARED / f"data/{name}.parquet"), image_column=image_column))
        assert len(rows) == num_rows
    (*_, last) = rows_of(ParquetConfig(path=str(SHARED / "bad_data/ARROW-GH-43605.parquet"), image_column=None))
    assert last.index == 21185
    assert last.fault is None


@needs_shared
def test_a_url_table_keeps_its_urls_and_refuses_to_fetch_them() -> None:
    rows = rows_of(ParquetConfig(path=str(SHARED / "url_caption/test_1000.parquet"), image_column="URL"))
    assert {row.fault.kind for row in rows if row.fault} == {"UrlsNotAllowed"}
    assert rows[0].columns["URL"].startswith("http")


def test_the_packaged_demo_is_read_without_a_path_and_refuses_one() -> None:
    rows = rows_of(DemoConfig())
    assert rows
    assert all(row.images and row.fault is None for row in rows)
    assert {"id", "question", "answer", "task"} <= set(rows[0].columns)
    with pytest.raises(UsageError, match="dataset=parquet"):
        DemoConfig(path="my.parquet").scan()


def test_a_table_of_which_no_column_is_read_still_has_its_rows(tmp_path: Path) -> None:
    file = table_at(tmp_path / "a.parquet", {"mask": [b"x"] * 70}, row_group_size=50)
    rows = rows_of(ParquetConfig(path=str(file), image_column=None))
    assert [(row.index, row.columns, row.fault) for row in rows] == [(n, {}, None) for n in range(70)]
