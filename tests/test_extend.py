"""resume=extend: what was added to the source becomes new shards; what was planned stays as it was."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import SETTINGS, answer, keys_of, new_ledger, tree

from pipeline.audit import audit
from pipeline.dataset.base import MARK_EVERY, DatasetConfig, Inputs
from pipeline.dataset.images import ImagesConfig
from pipeline.dataset.jsonl import JsonlConfig
from pipeline.dataset.parquet import ParquetConfig
from pipeline.errors import SettingsChanged, UsageError
from pipeline.plan import Plan, read_inputs, read_plan, source_identity
from pipeline.planning import Resume, make_folders, open_plan


def opened(
    output_dir: Path, config: DatasetConfig, resume: Resume = Resume.extend, shard_rows: int = 3, **settings: Any
) -> Plan:
    named = {"dataset.path": config.path, "dataset.max_rows": config.max_rows, "dataset.id_column": config.id_column}
    plan = open_plan(
        output_dir,
        SETTINGS | named | settings,
        scan=config.scan,
        max_rows=config.max_rows,
        shard_rows=shard_rows,
        prompt_names=["default"],
        num_samples=1,
        resume=resume,
    )
    make_folders(output_dir)
    return plan


def finish(output_dir: Path, plan: Plan, config: DatasetConfig) -> None:
    """Every row that is missing is answered."""
    found = read_inputs(output_dir, plan)
    rows = config.open(found).rows(0, plan.num_rows)
    ledger = new_ledger(output_dir, plan, columns=found.columns)
    by_index = {row.index: row for row in rows}
    assert list(by_index) == list(range(plan.num_rows))
    for number in range(plan.num_shards):
        shard = plan.shard(number)
        for key in set(keys_of(plan, shard)) & set(ledger.open(shard)):
            ledger.expect(by_index[key.row_index], [key], shard)
            ledger.record(answer(key, row_id=by_index[key.row_index].id))
    ledger.close()


def photos(folder: Path, *names: str) -> ImagesConfig:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"picture " + name.encode())
    return ImagesConfig(path=str(folder))


def lines(path: Path, first: int, last: int, **more: Any) -> JsonlConfig:
    with open(path, "a") as file:
        for number in range(first, last):
            file.write(json.dumps({"image": f"{number}.jpg", "n": number}) + "\n")
    return JsonlConfig(path=str(path), **more)


def ids(output_dir: Path) -> list[str]:
    files = sorted((output_dir / "data").glob("part-*.parquet"))
    return [name for file in files for name in pq.read_table(file)["id"].to_pylist()]


def test_new_files_become_new_shards_and_no_old_one_is_touched(tmp_path: Path) -> None:
    """Fault 28: new files become new shards; what is answered stays as it is, whatever the order of names."""
    source, out = tmp_path / "in", tmp_path / "out"
    config = photos(source, "b.jpg", "d.jpg", "f.jpg", "h.jpg")
    first = opened(out, config, Resume.auto)
    finish(out, first, config)
    answers = tree(out / "data")
    photos(source, "a.jpg", "z/c.jpg")
    assert opened(out, config, Resume.auto) == first  # nobody asked
    plan = opened(out, config)
    assert (plan.num_rows, plan.extents, plan.num_shards) == (6, (4, 6), 3)
    assert [(plan.shard(n).start, plan.shard(n).stop) for n in range(3)] == [(0, 3), (3, 4), (4, 6)]
    assert (plan.plan_id, plan.fingerprint) == (first.plan_id, first.fingerprint)
    finish(out, plan, config)
    assert {name: content for name, content in tree(out / "data").items() if name in answers} == answers
    assert ids(out) == ["b.jpg", "d.jpg", "f.jpg", "h.jpg", "a.jpg", "z/c.jpg"]
    assert audit(out).passed
    assert opened(out, config, Resume.auto) == plan  # a plain start goes on with the longer plan


def test_a_source_grows_again_and_again(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    config = photos(source, "a.jpg")
    finish(out, opened(out, config), config)
    for number, name in enumerate(("c.jpg", "b.jpg", "d.jpg"), 2):
        photos(source, name)
        plan = opened(out, config)
        assert plan.num_shards == number
        finish(out, plan, config)
        assert audit(out).passed
    assert ids(out) == ["a.jpg", "c.jpg", "b.jpg", "d.jpg"]
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    again = opened(out, ImagesConfig(path=str(moved)), Resume.auto)  # its identity is that of what a scan finds
    assert again.plan_id == plan.plan_id


def test_where_nothing_is_new_nothing_changes(tmp_path: Path) -> None:
    config = photos(tmp_path / "in", "a.jpg", "b.jpg")
    plan = opened(tmp_path / "out", config, Resume.auto)
    before = tree(tmp_path / "out")
    assert opened(tmp_path / "out", config) == plan
    after = tree(tmp_path / "out")
    after.pop("plan/.lock")
    assert after == before


def test_a_limit_may_be_raised_and_not_lowered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = tmp_path / "in"
    photos(source, *(f"{number}.jpg" for number in range(9)))
    configs = {limit: ImagesConfig(path=str(source), max_rows=limit) for limit in (2, 4, 7, 100, None)}
    finish(out, opened(out, configs[4]), configs[4])
    plan = opened(out, configs[7])
    assert plan.extents == (4, 7)
    finish(out, plan, configs[7])
    assert opened(out, configs[7], Resume.auto) == plan
    with pytest.raises(SettingsChanged, match=r"dataset.max_rows +was 7, now 2"):
        opened(out, configs[2])
    plan = opened(out, configs[None])
    assert plan.extents == (4, 7, 9)
    limited = opened(out, configs[100])  # says no less
    assert limited.extents == (4, 7, 9)
    assert limited.settings["dataset.max_rows"] == 100
    finish(out, limited, configs[100])
    assert ids(out) == [f"{number}.jpg" for number in range(9)]


def test_lines_behind_those_of_a_manifest_are_new_rows(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "rows.jsonl"
    config = lines(path, 0, 300)
    finish(out, opened(out, config, shard_rows=100), config)
    answers = tree(out / "data")
    lines(path, 300, 301)
    lines(tmp_path / "other.jsonl", 0, 1)
    plan = opened(out, config)
    assert plan.extents == (300, 301)
    finish(out, plan, config)
    lines(path, 301, 700)
    plan = opened(out, config)
    assert plan.extents == (300, 301, 700)
    finish(out, plan, config)
    found = config.open(read_inputs(out, plan))
    for start, stop in ((0, 700), (299, 303), (301, 302), (650, 700), (MARK_EVERY * 3 - 1, MARK_EVERY * 3 + 2)):
        assert [row.columns["n"] for row in found.rows(start, stop)] == list(range(start, stop))
    assert audit(out).passed
    assert {name: content for name, content in tree(out / "data").items() if name in answers} == answers
    assert source_identity(read_inputs(out, plan), None) == source_identity(config.scan(), None)


def test_lines_behind_one_of_several_manifests_and_a_new_manifest(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "in"
    folder.mkdir()
    lines(folder / "b.jsonl", 0, 2)
    lines(folder / "c.jsonl", 10, 12)
    config = JsonlConfig(path=str(folder))
    finish(out, opened(out, config), config)
    lines(folder / "b.jsonl", 2, 3)
    lines(folder / "a.jsonl", 20, 21)
    plan = opened(out, config)
    finish(out, plan, config)
    rows = list(config.open(read_inputs(out, plan)).rows(0, 6))
    assert [row.columns["n"] for row in rows] == [0, 1, 10, 11, 2, 20]


@pytest.mark.parametrize(
    ("name", "old", "new", "numbers"),
    [
        ("a.jsonl", b'{"n": 1}', b'{"n": 1}\n{"n": 2}', [1, 2]),
        ("a.jsonl", b'{"n": 1}\n\n', b'{"n": 1}\n\n\n{"n": 2}\n', [1, 2]),
        ("a.jsonl", b'\xef\xbb\xbf{"n": 1}\r\n', b'\xef\xbb\xbf{"n": 1}\r\n{"n": 2}\r\n', [1, 2]),
        ("a.jsonl", b"", b'{"n": 2}\n', None),  # a column that was not there
        ("a.jsonl", b'{"n": 1}', b'{"n": 1}{"n": 2}', None),
        ("a.jsonl", b'{"n": 1', b'{"n": 1}\n{"n": 2}', None),
        ("a.jsonl", b'{"n": 1}\n{"n', b'{"n": 1}\n{"n": 2}\n{"n": 3}\n', None),
        ("a.jsonl", b'{"n": 1}\n', b'{"n": 2}\n{"n": 3}\n', None),
        ("a.jsonl", b'{"n": 1}\n{"n": 2}\n', b'{"n": 1}\n', None),
        ("a.csv", b"n\n1\n", b"n\n1\n2\n", ["1", "2"]),
        ("a.csv", b"n\n1", b"n\n12", None),
        ("a.csv", b'n\n1\n"2\n', b'n\n1\n"2\n3"\n4\n', None),
        ("a.csv", b'n\n"1\n2"\n', b'n\n"1\n2"\n3\n', ["1\n2", "3"]),
    ],
)
def test_a_manifest_has_grown_if_its_old_rows_read_the_same(
    tmp_path: Path, name: str, old: bytes, new: bytes, numbers: list[Any] | None
) -> None:
    """Fault 28: lines behind a manifest are taken in if its old rows read the same, and refused otherwise."""
    out, path = tmp_path / "out", tmp_path / name
    path.write_bytes(old)
    config = JsonlConfig(path=str(path), image_column=None)
    plan = opened(out, config)
    path.write_bytes(new)
    if numbers is None:
        before = tree(out)
        with pytest.raises(UsageError, match=r"resume=extend.*(have changed otherwise: a\.|has the columns)"):
            opened(out, config)
        assert tree(out).items() - before.items() <= {("plan/.lock", tree(out)["plan/.lock"])}
        return
    plan = opened(out, config)
    assert [row.columns["n"] for row in config.open(read_inputs(out, plan)).rows(0, plan.num_rows)] == numbers


def test_files_that_changed_otherwise_are_named(tmp_path: Path) -> None:
    """Fault 27, 28: planned files with other contents are named, and the input is not extended."""
    config = photos(tmp_path / "in", *"abcde")
    config.pattern = "*"
    opened(tmp_path / "out", config)
    for name in "abcd":
        (tmp_path / "in" / name).write_bytes(b"another")
    photos(tmp_path / "in", "new")
    with pytest.raises(UsageError, match=r"4 files of the plan have changed otherwise: a, b, c \.\.\.\."):
        opened(tmp_path / "out", config)


def test_a_parquet_file_that_grew_is_no_old_part_with_more_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "in" / "rows.parquet"
    path.parent.mkdir()
    config = ParquetConfig(path=str(path), image_column=None)
    pq.write_table(pa.table({"n": [1]}), path)
    opened(tmp_path / "out", config)
    pq.write_table(pa.table({"n": [1, 2]}), path)
    with pytest.raises(UsageError, match=r"have changed otherwise: rows\.parquet"):
        opened(tmp_path / "out", config)


def test_other_changed_settings_and_columns_are_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    config = lines(path, 0, 2)
    opened(out, config)
    lines(path, 2, 3)
    with pytest.raises(SettingsChanged, match=r"prompt.user"):
        opened(out, config, **{"prompt.user": "Why?"})
    path.write_text(path.read_text() + '{"image": "3.jpg", "n": 3, "more": 1}\n')
    with pytest.raises(UsageError, match=r"has the columns image: string, n: int64, more: int64, and was planned with"):
        opened(out, config)


def test_files_that_are_gone_stay_in_the_plan_unless_their_ids_are_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 28: files that were removed are reported; answers about them stay."""
    source, out = tmp_path / "in", tmp_path / "out"
    config = photos(source, "a.jpg", "b.jpg")
    finish(out, opened(out, config), config)
    (source / "a.jpg").unlink()
    photos(source, "c.jpg")
    with caplog.at_level(logging.WARNING):
        plan = opened(out, config)
    assert "files of the plan are gone" in caplog.text
    assert plan.extents == (2, 3)
    folder, other = tmp_path / "rows", tmp_path / "other"
    folder.mkdir()
    lines(folder / "a.jsonl", 0, 2)
    named = JsonlConfig(path=str(folder), id_column="n")
    opened(other, named)
    (folder / "a.jsonl").rename(tmp_path / "a.jsonl")
    lines(folder / "b.jsonl", 1, 3)
    with pytest.raises(UsageError, match=r"ids \(dataset.id_column\) cannot be compared"):
        opened(other, named)
    shutil.move(tmp_path / "a.jsonl", folder)
    with pytest.raises(UsageError, match=r"id_column=n.*1"):
        opened(other, named)  # an id of the old part again


def test_of_several_starts_one_extends_and_all_obey(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    config = photos(source, "a.jpg", "b.jpg")
    finish(out, opened(out, config), config)
    photos(source, "c.jpg", "d.jpg")
    plans: list[Plan] = []
    threads = [threading.Thread(target=lambda: plans.append(opened(out, config))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 8
    assert {plan.extents for plan in plans} == {(2, 4)}
    assert read_plan(out) == plans[0]


def test_a_start_that_was_overtaken_while_it_scanned_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    config = photos(source, "a.jpg")
    opened(out, config)
    photos(source, "b.jpg")
    scan = ImagesConfig.scan

    def slow_scan(self: ImagesConfig) -> Inputs:
        found = scan(self)
        monkeypatch.undo()
        photos(source, "c.jpg")
        assert opened(out, config).extents == (1, 3)
        return found

    monkeypatch.setattr(ImagesConfig, "scan", slow_scan)
    assert opened(out, config).extents == (1, 3)
