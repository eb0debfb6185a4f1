"""JSON lines and CSV: types, faults, random access, odd text."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.base import MARK_EVERY
from pipeline.dataset.jsonl import JsonlConfig
from pipeline.dataset.schema import Seen, conformed
from pipeline.errors import RunFailed, UsageError
from pipeline.records import ImageRef, Row, Stage


def rows_of(config: JsonlConfig) -> list[Row]:
    dataset = config.open(config.scan())
    return list(dataset.rows(0, len(dataset)))


def manifest(path: Path, text: str | bytes) -> JsonlConfig:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return JsonlConfig(path=str(path))


@pytest.mark.parametrize(
    ("values", "type_", "kept"),
    [
        ([None, True], pa.bool_(), [None, True]),
        ([True, 2], pa.int64(), [1, 2]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([1, "1"], pa.string(), ["1", "1"]),
        ([[1, 2.5], []], pa.list_(pa.float64()), [[1.0, 2.5], []]),
        (
            [{"a": 1}, {"b": None}],
            pa.struct([("a", pa.int64()), ("b", pa.null())]),
            [{"a": 1, "b": None}, {"a": None, "b": None}],
        ),
        ([{"a": 1}, [True]], pa.string(), ['{"a": 1}', "[true]"]),
        ([2**63], pa.string(), ["9223372036854775808"]),
        ([2**60, 0.5], pa.string(), ["1152921504606846976", "0.5"]),
        ([{}], pa.string(), ["{}"]),
        ([None], pa.null(), [None]),
    ],
)
def test_a_column_has_one_type_that_holds_all_its_values(
    values: list[Any], type_: pa.DataType, kept: list[Any]
) -> None:
    seen = Seen()
    for value in values:
        seen.add(value)
    assert seen.type() == type_
    assert [conformed(value, type_) for value in values] == kept
    assert pa.array(kept, type_).to_pylist() == kept


def test_mixed_types_are_kept_as_text_and_said(tmp_path: Path) -> None:
    config = manifest(tmp_path / "a.jsonl", '{"image": "a", "x": 1}\n{"image": "b", "x": "one"}\n{"image": "c"}\n')
    assert any("mixed types, kept as text: x" in warning for warning in config.scan().warnings)
    assert [row.columns["x"] for row in rows_of(config)] == ["1", "one", None]


def test_paths_start_from_the_manifest_and_are_kept_as_a_column(tmp_path: Path) -> None:
    manifest(tmp_path / "a/m.jsonl", '{"image": "x.jpg"}\n')
    manifest(tmp_path / "b/m.jsonl", '{"image": ["y.jpg", "z.jpg"]}\n')
    first, second = rows_of(JsonlConfig(path=str(tmp_path)))
    assert first.images == (ImageRef(path=f"{tmp_path}/a/x.jpg"),)
    assert second.images == (ImageRef(path=f"{tmp_path}/b/y.jpg"), ImageRef(path=f"{tmp_path}/b/z.jpg"))
    assert second.columns["image"] == '["y.jpg", "z.jpg"]'


def test_data_uris_are_images_and_no_column(tmp_path: Path) -> None:
    config = manifest(tmp_path / "a.jsonl", '{"image": "a.jpg", "n": 1}\n{"image": "data:;base64,eA==", "n": 2}\n')
    rows = rows_of(config)
    assert rows[1].images == (ImageRef(data=b"x"),)
    assert rows[1].columns == {"n": 2}


@pytest.mark.parametrize(
    "line",
    ['{"image": "a"', "[1]", '"text"', "{'image': 1}", "[" * 100_000, '{"n": ' + "9" * 5000 + "}", "\x00", "a,b"],
)
def test_a_line_that_does_not_parse_is_a_row_with_a_fault_that_names_the_line(tmp_path: Path, line: str) -> None:
    good = '{"image": "a.jpg", "id": "%s"}\n'
    config = manifest(tmp_path / "a.jsonl", good % 1 + "\n" + line + "\n" + good % 2)
    config.id_column = "id"
    rows = rows_of(config)
    assert [row.fault is None for row in rows] == [True, False, True]
    assert [row.id for row in rows] == ["1", "a.jsonl:1", "2"]
    fault = rows[1].fault
    assert fault is not None
    assert fault.stage is Stage.READ
    assert f"{tmp_path}/a.jsonl:3 " in fault.message
    assert rows[1].columns == {"image": None, "id": None}
    assert any("1 lines do not parse" in warning for warning in config.scan().warnings)


def test_a_file_of_which_no_line_parses_is_told_what_was_expected(tmp_path: Path) -> None:
    config = manifest(tmp_path / "a.csv", "image,name\na.jpg,schön\n".encode("latin-1"))
    config.image_column = None
    assert any("no line of" in warning and "expected UTF-8" in warning for warning in config.scan().warnings)


def test_the_line_of_a_fault_does_not_depend_on_where_reading_began(tmp_path: Path) -> None:
    lines = ['{"image": "a"}'] * (3 * MARK_EVERY)
    lines[200] = lines[205] = "torn"
    config = manifest(tmp_path / "a.jsonl", "\n".join(lines))
    dataset = config.open(config.scan())
    everything = list(dataset.rows(0, len(dataset)))
    assert list(dataset.rows(190, 210)) == everything[190:210]
    assert ":206 " in (everything[205].fault.message if everything[205].fault else "")


def test_odd_bytes_are_tolerated(tmp_path: Path) -> None:
    text = '\ufeff{"image": "a.jpg", "t": "\u2028"}\r\n\r\n   \n{"image": "b.jpg", "t": "NUL \\u0000"}'
    rows = rows_of(manifest(tmp_path / "a.jsonl", text))
    assert [row.columns["t"] for row in rows] == ["\u2028", "NUL \0"]
    (row,) = rows_of(manifest(tmp_path / "b.jsonl", b'{"image": "\xff.jpg"}\n'))
    assert row.fault is not None
    assert row.fault.kind == "UnicodeDecodeError"


def test_a_lone_surrogate_is_replaced_and_counted(tmp_path: Path) -> None:
    config = manifest(tmp_path / "a.jsonl", '{"image": "a", "t": "x\\ud800y", "u": "\\ud83d\\ude00"}\n')
    assert rows_of(config)[0].columns == {"image": "a", "t": "x\ufffdy", "u": "\U0001f600"}
    assert any("1 strings had a lone surrogate" in warning for warning in config.scan().warnings)


def test_ids_of_different_types_collide_as_text(tmp_path: Path) -> None:
    """Fault 32: 1 and "1" are the same id, and refused."""
    config = manifest(tmp_path / "a.jsonl", '{"image": "a", "id": 1}\n{"image": "b", "id": "1"}\n')
    config.id_column = "id"
    with pytest.raises(UsageError, match="'1' in rows 0, 1"):
        config.scan()


def test_a_missing_id_is_refused_and_a_missing_image_is_a_fault(tmp_path: Path) -> None:
    config = manifest(tmp_path / "a.jsonl", '{"image": "a", "id": "x"}\n{"n": 1}\n')
    assert [row.fault and row.fault.kind for row in rows_of(config)] == [None, "NullImage"]
    config.id_column = "id"
    with pytest.raises(UsageError, match="row 1"):
        config.scan()


def test_a_conversation_keeps_its_parts_as_they_are(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "Hi"}]
    config = manifest(tmp_path / "a.jsonl", json.dumps({"image": "a", "messages": turns}))
    config.messages_column = "messages"
    (row,) = rows_of(config)
    assert row.messages == tuple(turns)  # the column needs one type, the conversation does not


def test_csv_has_quoted_newlines_empty_fields_and_only_text(tmp_path: Path) -> None:
    text = '\ufeffimage,text,n\r\na.jpg,"one\n\ntwo, ""three""",1\r\n\r\nb.jpg,,2\r\n,x,3\r\n'
    rows = rows_of(manifest(tmp_path / "a.csv", text))
    assert [row.columns["text"] for row in rows] == ['one\n\ntwo, "three"', "", "x"]
    assert [row.columns["n"] for row in rows] == ["1", "2", "3"]
    assert [row.fault and row.fault.kind for row in rows] == [None, None, "NullImage"]
    (row,) = rows_of(manifest(tmp_path / "a.tsv", "image\ttext\nc.jpg\ta, b\n"))
    assert row.columns["text"] == "a, b"


@pytest.mark.parametrize(
    ("line", "reason"),
    [("a.jpg", "expected 2 fields, found 1"), ("a,b,c", "found 3"), ('"a"b,c', "expected after"), (b"\xff,x", "utf-8")],
)
def test_a_csv_line_that_does_not_fit_the_header_is_a_fault(tmp_path: Path, line: str | bytes, reason: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    rows = rows_of(manifest(tmp_path / "a.csv", b"image,text\nx.jpg,x\n" + line + b"\ny.jpg,y\n"))
    assert [row.fault is None for row in rows] == [True, False, True]
    fault = rows[1].fault
    assert fault is not None
    assert "a.csv:3 " in fault.message
    assert reason in fault.message


def test_a_quote_that_is_never_closed_does_not_lose_the_rest_in_silence(tmp_path: Path) -> None:
    rows = rows_of(manifest(tmp_path / "a.csv", 'image,text\na.jpg,a\nb.jpg,"b\nc.jpg,c\nd.jpg,d\n'))
    assert [row.fault is None for row in rows] == [True, False]
    assert "bytes passed over" in (rows[1].fault.message if rows[1].fault else "")


def test_a_field_may_be_longer_than_the_csv_modules_default(tmp_path: Path) -> None:
    (row,) = rows_of(manifest(tmp_path / "a.csv", "image,text\na.jpg," + "x" * 300_000 + "\n"))
    assert len(row.columns["text"]) == 300_000


def test_a_column_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="occurs twice"):
        manifest(tmp_path / "a.csv", "image,text,text\n1,2,3\n").scan()


def test_empty_files_are_no_rows(tmp_path: Path) -> None:
    manifest(tmp_path / "a.jsonl", "")
    manifest(tmp_path / "b.csv", "")
    manifest(tmp_path / "c.csv", "image,text\n")
    assert rows_of(JsonlConfig(path=str(tmp_path))) == []


def test_a_name_without_a_known_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.jsonl"):
        manifest(tmp_path / "a.json", "[]").scan()


def test_a_manifest_cut_in_place_ends_the_run(tmp_path: Path) -> None:
    config = manifest(tmp_path / "a.jsonl", '{"image": "a"}\n{"image": "b"}\n')
    inputs = config.scan()
    manifest(tmp_path / "a.jsonl", '{"image": "a"}\n' + " " * 15)
    with pytest.raises(RunFailed, match="fewer rows"):
        list(config.open(inputs).rows(0, 2))
