"""format=jsonl, csv, parquet, arrow: what others read is what the run holds."""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answered_run import FAULT, answered_run, manifest, picture, pictures
from command_line import CHECKOUT
from small_run import tree

from pipeline.errors import RunFailed, UsageError
from pipeline.export.formats import exported
from pipeline.export.options import Errors, Exists, ExportOptions, Format
from pipeline.export.selection import Selection
from pipeline.results import results_of_run
from pipeline.write.file import place
from pipeline.write.schema import WriteConfig

FORMULAS = ["=cmd|'/c calc'!A1", "+1+cmd", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1"]
ODD = [
    'say "hi", he said',
    "a\nb\r\nc",
    "\u2028\x85",
    "\x1b[2J",
    "'quoted",
    "ü,😀;",
    "",
    " blank ",
    "\x00",
    "NULL",
    "1e5",
]


def export(output_dir: Path, format: Format, **words: Any) -> Selection:
    return exported(output_dir, ExportOptions(format=format, **words))[0]


def records(output_dir: Path) -> list[dict[str, Any]]:
    names = results_of_run(output_dir).schema.names
    return [row for path in results_of_run(output_dir).files for row in pq.read_table(path, columns=names).to_pylist()]


@pytest.fixture
def odd_run(tmp_path: Path) -> Path:
    """Seven files of records with odd words, an error among them, under names of the user's choice."""
    rows = [{"name": text, "score": float(number), "tags": [text]} for number, text in enumerate([*FORMULAS, *ODD])]
    answered_run(
        tmp_path / "run",
        manifest(tmp_path / "source", rows),
        lambda row, key: FAULT if row.index == 5 else str(row.columns["name"]),
        write=WriteConfig(prefix="vlm_", response_column="caption"),
    )
    return tmp_path / "run"


def test_jsonl_holds_what_the_files_hold(odd_run: Path, tmp_path: Path) -> None:
    done = export(odd_run, Format.jsonl)
    content = (odd_run / "export/answers.jsonl").read_bytes()
    assert [json.loads(line) for line in content.decode().split("\n")[:-1]] == records(odd_run)
    assert content.decode().splitlines() == content.decode().split("\n")[:-1]  # no other line break in it
    assert done.num_written == 19 and not done.left_out and b"\r" not in content
    loaded = datasets.load_dataset(
        "json", data_files=str(odd_run / "export/answers.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["vlm_caption"][:3] == FORMULAS[:3] and loaded.column_names[:4] == ["vlm_id", "name", "score", "tags"]


def test_columns_and_errors_are_chosen(odd_run: Path, tmp_path: Path) -> None:
    done = export(odd_run, Format.jsonl, columns=["vlm_caption", "score"], errors=Errors.skip, to=str(tmp_path / "x"))
    lines = [json.loads(line) for line in (tmp_path / "x").read_text().split("\n")[:-1]]
    assert len(lines) == 18 and lines[0] == {"vlm_caption": FORMULAS[0], "score": 0.0}
    assert done.left_out == {"error decode/UnidentifiedImageError": 1}
    with pytest.raises(UsageError, match="has no column 'response'; its columns are vlm_id, name"):
        export(odd_run, Format.jsonl, columns=["response"])
    with pytest.raises(UsageError, match="names 'score' twice"):
        export(odd_run, Format.jsonl, columns=["score", "name", "score"])
    assert not (odd_run / "export").exists()


def test_values_that_json_has_not(tmp_path: Path) -> None:
    from pipeline.export.jsonl import line

    value = {"nan": [float("nan"), 1.0], "day": datetime.date(2026, 1, 2), "at": datetime.datetime(2026, 1, 2, 3)}
    assert line(value) == b'{"nan": [null, 1.0], "day": "2026-01-02", "at": "2026-01-02T03:00:00"}\n'
    assert line({"wait": datetime.timedelta(seconds=90)}) == b'{"wait": "0:01:30"}\n'


def test_csv_is_read_back_and_has_no_formula(odd_run: Path) -> None:
    export(odd_run, Format.csv, errors=Errors.skip)
    path = odd_run / "export/answers.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    said = [text for number, text in enumerate([*FORMULAS, *ODD]) if number != 5]
    assert [row["vlm_caption"] for row in rows] == [f"'{text}" if text in FORMULAS else text for text in said]
    assert [json.loads(row["tags"]) for row in rows] == [[text] for text in said]  # [ begins no formula
    assert [float(row["score"]) for row in rows] == [float(n) for n in range(19) if n != 5]
    cells = [cell for row in rows for cell in row.values()]
    assert not [cell for cell in cells if cell[:1] in "=+-@\t\r\n" and cell]
    assert path.read_bytes().startswith(b'"vlm_id","name","score"')
    frame = pandas.read_csv(path, keep_default_na=False)
    assert frame["vlm_caption"].tolist()[-1] == "1e5" and len(frame) == 18


def test_csv_as_it_is_and_with_a_mark_for_excel(odd_run: Path) -> None:
    export(odd_run, Format.csv, escape_formulas=False, bom=True)
    content = (odd_run / "export/answers.csv").read_bytes()
    assert content.startswith(b'\xef\xbb\xbf"vlm_id",')
    with (odd_run / "export/answers.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [row["vlm_caption"] for row in rows[:5]] == FORMULAS[:5]
    assert rows[5]["vlm_caption"] == "" and rows[5]["vlm_error_type"] == "UnidentifiedImageError"
    null, empty = (f",{value},".encode() for value in ("", '""'))
    lines = content.split(b"\n")
    assert null in lines[6] and empty in next(line for line in lines if line.startswith(b'"14"'))


def test_a_name_of_a_column_is_no_formula_either(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", manifest(tmp_path / "source", [{"=1+1": "x", "when": "2026-01-02"}]))
    export(tmp_path / "run", Format.csv, to=str(tmp_path / "x.csv"))
    assert (tmp_path / "x.csv").read_text().startswith('"id","\'=1+1","when"')


def test_one_parquet_file_is_what_all_were(odd_run: Path, tmp_path: Path) -> None:
    export(odd_run, Format.parquet)
    path = odd_run / "export/answers.parquet"
    whole = records(odd_run)
    assert pq.read_table(path).to_pylist() == whole
    assert polars.read_parquet(path).to_dicts() == whole
    assert len(pandas.read_parquet(path)) == 19
    assert duckdb.sql(f"select vlm_caption from '{path}' where vlm_status = 'ok'").fetchall() == [
        (row["vlm_caption"],) for row in whole if row["vlm_status"] == "ok"
    ]
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == whole


def test_one_arrow_file_is_what_all_were(odd_run: Path, tmp_path: Path) -> None:
    export(odd_run, Format.arrow, to=str(tmp_path) + "/")
    path = tmp_path / "answers.arrow"
    whole = records(odd_run)
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        assert reader.read_all().to_pylist() == whole
    assert polars.read_ipc(path).to_dicts() == whole
    assert len(pandas.read_feather(path)) == 19
    loaded = datasets.load_dataset("arrow", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == whole


def test_kept_images_go_where_bytes_can(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", "a.png", "b.png")
    answered_run(tmp_path / "run", source, write=WriteConfig(keep_images=True))
    export(tmp_path / "run", Format.parquet, to=str(tmp_path / "x.parquet"))
    images = pq.read_table(tmp_path / "x.parquet")["image"].to_pylist()
    assert [image[0]["bytes"] for image in images] == [picture(0), picture(1)]
    export(tmp_path / "run", Format.jsonl, to=str(tmp_path / "x.jsonl"))
    assert "image" not in json.loads((tmp_path / "x.jsonl").read_text().split("\n")[0])
    with pytest.raises(UsageError, match="holds bytes; parquet and arrow take those"):
        export(tmp_path / "run", Format.csv, columns=["image"])


def test_kept_images_are_read_a_hundred_records_at_a_time(tmp_path: Path) -> None:
    """And nothing is lost where one part ends and the next begins."""
    source = pictures(tmp_path / "pictures", *(f"{number:03d}.png" for number in range(120)))
    answered_run(
        tmp_path / "run",
        source,
        lambda row, key: FAULT if row.index in (99, 100) else row.id,
        write=WriteConfig(keep_images=True),
        shard_rows=120,
    )
    done = export(tmp_path / "run", Format.parquet, errors=Errors.skip)
    with pq.ParquetFile(tmp_path / "run/export/answers.parquet") as file:
        assert [file.metadata.row_group(number).num_rows for number in range(2)] == [99, 19]
        rows = file.read().to_pylist()
    assert rows == [row for row in records(tmp_path / "run") if row["status"] == "ok"]
    assert done.left_out == {"error decode/UnidentifiedImageError": 2} and done.num_written == 118
    (shard,) = (tmp_path / "run/data").iterdir()
    group = pq.read_metadata(shard).row_group(0)
    chunks = (group.column(number) for number in range(group.num_columns))
    [images] = [chunk for chunk in chunks if chunk.path_in_schema.endswith("bytes")]
    content = bytearray(shard.read_bytes())
    content[images.data_page_offset + images.total_compressed_size // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(RunFailed, match=r"part-00000\.parquet is damaged"):
        export(tmp_path / "run", Format.arrow)
    assert [path.name for path in (tmp_path / "run/export").iterdir()] == ["answers.parquet"]


def test_what_is_there_stays_unless_told_otherwise(odd_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")
    for format in (Format.jsonl, Format.csv, Format.parquet, Format.arrow, Format.openai):
        with pytest.raises(UsageError, match=r"is there already\. exists=overwrite"):
            export(odd_run, format, to=str(path))
        with pytest.raises(UsageError, match="exists=append is for txt and caption"):
            export(odd_run, format, to=str(path), exists=Exists.append)
    assert path.read_text() == "mine"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UsageError, match="is there already"):
        export(odd_run, Format.jsonl, to=str(tmp_path / "link"))
    export(odd_run, Format.jsonl, to=str(tmp_path / "link"), exists=Exists.overwrite)  # the link, not what it leads to
    assert path.read_text() == "mine" and not (tmp_path / "link").is_symlink()
    export(odd_run, Format.jsonl, to=str(path), exists=Exists.overwrite)
    assert path.read_text().count("\n") == 19


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_kill_leaves_nothing_under_the_name(format: str, odd_run: Path, tmp_path: Path) -> None:
    """Killed after the second of seven files, over an earlier export: that one is there, whole."""
    export(odd_run, Format(format), to=str(tmp_path / "x"))
    before = (tmp_path / "x").read_bytes()
    script = f"""
import os, signal
from pathlib import Path
from pipeline.results import Results
tables, files = Results.tables, []
def two(self, columns):
    files.append(self.files)
    if len(files) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return tables(self, columns)
Results.tables = two
from pipeline.export.formats import exported
from pipeline.export.options import Exists, ExportOptions, Format
options = ExportOptions(format=Format.{format}, to={str(tmp_path / "x")!r}, exists=Exists.overwrite)
exported(Path({str(odd_run)!r}), options)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, timeout=60)
    assert killed.returncode == -9
    assert (tmp_path / "x").read_bytes() == before


@pytest.mark.parametrize("format", [Format.jsonl, Format.csv, Format.parquet, Format.arrow, Format.openai])
def test_a_damaged_shard_leaves_nothing(format: Format, odd_run: Path, tmp_path: Path) -> None:
    shard = odd_run / "data/part-00003.parquet"
    content = bytearray(shard.read_bytes())
    content[40:60] = bytes(20)
    shard.write_bytes(bytes(content))
    with pytest.raises(RunFailed, match=r"part-00003\.parquet is damaged"):
        export(odd_run, format, to=str(tmp_path / "out" / "x"))
    assert list((tmp_path / "out").iterdir()) == []


def test_files_in_an_object_store(odd_run: Path, tmp_path: Path) -> None:
    import fsspec

    to = f"memory://{tmp_path.name}/deep/x.parquet"
    export(odd_run, Format.parquet, to=to)
    with fsspec.open(to) as file:
        assert pq.read_table(file).to_pylist() == records(odd_run)
    with pytest.raises(UsageError, match="is there already"):
        export(odd_run, Format.parquet, to=to)
    export(odd_run, Format.csv, to=to, exists=Exists.overwrite)
    with fsspec.open(to) as file:
        assert file.read(8) == b'"vlm_id"'


def test_a_run_in_an_object_store(odd_run: Path, tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(str(odd_run) + "/", f"/{tmp_path.name}-run", recursive=True)
    output_dir = place(f"memory://{tmp_path.name}-run")
    done, where = exported(output_dir, ExportOptions(format=Format.jsonl))
    assert done.num_written == 19 and where == f"in memory://{tmp_path.name}-run/export/answers.jsonl"
    lines = files.cat_file(f"/{tmp_path.name}-run/export/answers.jsonl").decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == records(odd_run)
    with pytest.raises(UsageError, match="lies among the files of the run"):
        exported(output_dir, ExportOptions(format=Format.jsonl, to=f"memory://{tmp_path.name}-run/data/x"))


def test_an_unfinished_run_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    source = manifest(tmp_path / "source", [{"a": number} for number in range(7)])
    answered_run(tmp_path / "run", source, only_shards=[0, 2])
    with pytest.raises(UsageError, match=r"4 of 7 records are published.*partial=true"):
        export(tmp_path / "run", Format.jsonl)
    done = export(tmp_path / "run", Format.jsonl, partial=True, to=str(tmp_path / "x"))
    assert [json.loads(line)["id"] for line in (tmp_path / "x").read_text().split("\n")[:-1]] == ["0", "1", "2", "6"]
    assert done.num_written == 4


def test_an_export_changes_nothing_of_the_run(odd_run: Path) -> None:
    before = tree(odd_run)
    for format in (Format.jsonl, Format.csv, Format.parquet, Format.arrow, Format.openai):
        export(odd_run, format)
    after = tree(odd_run)
    assert {name: content for name, content in after.items() if not name.startswith("export/")} == before
    assert sorted(after.keys() - before.keys()) == [
        "export/answers.arrow", "export/answers.csv", "export/answers.jsonl", "export/answers.parquet",
        "export/openai.jsonl",
    ]  # fmt: skip
