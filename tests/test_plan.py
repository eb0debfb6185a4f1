"""The plan: fixed by the first start, compared by every later one, and never half there."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_run import SETTINGS, finished_run, inputs, new_plan, tree

import pipeline.draft
from pipeline.dataset.base import Inputs
from pipeline.dataset.files import files_table
from pipeline.errors import RunFailed, SettingsChanged, UsageError
from pipeline.plan import Plan, read_inputs, read_plan
from pipeline.planning import make_folders, open_plan


def start(output_dir: Path, found: Inputs | None = None, *, shard_rows: int = 3, **settings: Any) -> Plan:
    """What a start of the program does with the plan. `found` is what a scan would find; None: no scan may happen."""

    def scan() -> Inputs:
        assert found is not None, "the source was scanned"
        return found

    return open_plan(
        output_dir,
        dict(SETTINGS) | {name.replace("__", "."): value for name, value in settings.items()},
        scan=scan,
        max_rows=None,
        shard_rows=shard_rows,
        prompt_names=["default"],
        num_samples=1,
    )


def test_rows_are_cut_into_shards_that_cover_them_all(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 8, shard_rows=3, prompt_names=("a", "b"), num_samples=2)
    assert [(s.name, s.start, s.stop) for s in map(plan.shard, range(plan.num_shards))] == [
        ("part-00000", 0, 3),
        ("part-00001", 3, 6),
        ("part-00002", 6, 8),
    ]
    assert plan.num_records == 8 * 2 * 2


def test_a_plan_is_read_back_as_it_was_made(tmp_path: Path) -> None:
    plan = new_plan(tmp_path)
    assert read_plan(tmp_path) == plan
    found = read_inputs(tmp_path, plan)
    assert found.files.equals(inputs(6).files)
    assert (found.root, found.columns) == ("/", inputs(6).columns)
    assert list((tmp_path / "work").iterdir()) == []


def test_an_empty_source_has_no_shards(tmp_path: Path) -> None:
    assert new_plan(tmp_path, 0).num_shards == 0


def test_max_rows_cuts_the_plan(tmp_path: Path) -> None:
    plan = open_plan(
        tmp_path, SETTINGS, scan=lambda: inputs(9), max_rows=4, shard_rows=3, prompt_names=["x"], num_samples=1
    )
    assert (plan.num_rows, plan.num_shards) == (4, 2)


def test_the_same_settings_resume_without_a_look_at_the_source(tmp_path: Path) -> None:
    plan = start(tmp_path, inputs(6))
    before = tree(tmp_path)
    assert start(tmp_path, None) == plan
    assert tree(tmp_path) == before


def test_shard_rows_is_the_plans(tmp_path: Path) -> None:
    start(tmp_path, inputs(6), shard_rows=3)
    assert start(tmp_path, None, shard_rows=5).shard_rows == 3


def test_the_way_out_of_changed_settings_says_whether_answers_are_at_stake(tmp_path: Path) -> None:
    plan = new_plan(tmp_path)
    other = SETTINGS | {"prompt.user": "Why?"}
    with pytest.raises(SettingsChanged, match=r"It holds no answer yet: remove the folder"):
        new_plan(tmp_path, settings=other)
    (tmp_path / "work" / "part-00000.a.journal").write_bytes(b"some")
    with pytest.raises(SettingsChanged, match=r"or start with the old ones to go on"):
        new_plan(tmp_path, settings=other)
    assert new_plan(tmp_path).plan_id == plan.plan_id


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"prompt__user": "Where is it?"}, 'prompt.user  was "What is it?", now "Where is it?"'),
        ({"generation__max_new_tokens": 9}, "generation.max_new_tokens  was 8, now 9"),
        ({"model.sha256": "b"}, 'model.sha256  was null, now "b"'),
        ({"vlm.revision": "b", "model.sha256": "b"}, 'vlm.revision  was null, now "b"'),
    ],
)
def test_changed_settings_are_refused_field_by_field_and_touch_nothing(
    tmp_path: Path, changed: dict[str, Any], line: str
) -> None:
    """Fault 26: prompt, generation, model or revision changed: refused field by field, and nothing is touched."""
    finished_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(SettingsChanged) as refusal:
        start(tmp_path, None, **changed)
    assert line in " ".join(str(refusal.value).split(" ")).replace("   ", "  ")
    assert "output_dir" in str(refusal.value)
    assert tree(tmp_path) == before


def test_a_difference_at_the_end_of_a_long_prompt_is_shown(tmp_path: Path) -> None:
    """Fault 26: a difference at the end of a long prompt is shown."""
    start(tmp_path, inputs(1), prompt__user="word " * 100 + "Answer in German.")
    with pytest.raises(SettingsChanged, match=r'Answer in German\.", now "?\.\.\..*Answer in French\.'):
        start(tmp_path, None, prompt__user="word " * 100 + "Answer in French.")


def test_where_source_and_model_lie_is_no_setting(tmp_path: Path) -> None:
    plan = start(tmp_path, inputs(6), vlm__path="/models/a")
    assert start(tmp_path, None, vlm__path="/mnt/models/a").plan_id == plan.plan_id


def test_a_source_that_moved_is_read_where_it_lies_now(tmp_path: Path) -> None:
    plan = start(tmp_path, inputs(6))
    moved = start(tmp_path, inputs(6, root=str(tmp_path)), dataset__path="/mnt/photos")
    assert moved.plan_id == plan.plan_id
    assert read_inputs(tmp_path, moved).root == str(tmp_path)
    assert read_inputs(tmp_path, plan).root == "/"


def test_another_source_is_refused(tmp_path: Path) -> None:
    """Fault 26, 28: a source with other rows is refused, and nothing is touched."""
    start(tmp_path, inputs(6))
    before = tree(tmp_path)
    with pytest.raises(SettingsChanged, match=r"dataset\.num_rows +was 6, now 7"):
        start(tmp_path, inputs(7), dataset__path="/mnt/photos")
    assert tree(tmp_path) == before


def test_a_project_folder_that_moved_as_a_whole_finds_its_relative_source_again(tmp_path: Path) -> None:
    """dataset.path=photos is the same word in another folder; what it meant is not there any more."""
    start(tmp_path, inputs(6, root=str(tmp_path / "old")))
    assert start(tmp_path, inputs(6, root=str(tmp_path))).root == str(tmp_path)


def test_a_finished_run_needs_no_source(tmp_path: Path) -> None:
    finished_run(tmp_path)
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(plan_file.read_text().replace('"root": "/"', '"root": "/gone"'))
    assert start(tmp_path, None).root == "/gone"


def first_start(output_dir: Path, num_rows: int, barrier: Any, results: Any) -> None:
    barrier.wait(60)
    try:
        results.append(("plan", start(output_dir, inputs(num_rows), dataset__path=f"/photos{num_rows}").plan_id))
    except SettingsChanged as refusal:
        results.append(("refused", str(refusal)))


@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 7, 6)], ids=["same job", "different jobs"])
def test_of_several_first_starts_one_plan_holds(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Fault 14: first starts of one job or of two at once: one plan holds, another job is refused and harms nothing."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results, barrier = manager.list(), context.Barrier(len(sizes))
        processes = [context.Process(target=first_start, args=(tmp_path, n, barrier, results)) for n in sizes]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        outcomes = list(results)
    plan = read_plan(tmp_path)
    assert plan is not None
    assert len(outcomes) == len(sizes)
    obeyed = [text for kind, text in outcomes if kind == "plan"]
    assert set(obeyed) == {plan.plan_id}
    assert len(obeyed) == sizes.count(plan.num_rows)
    assert all("dataset.num_rows" in text for kind, text in outcomes if kind == "refused")
    assert len(read_inputs(tmp_path, plan).files) == plan.num_rows
    assert list((tmp_path / "work").iterdir()) == []


def test_plans_of_the_same_second_have_different_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 1, 0, 0, 0, 3, 1, 0)))
    plans = [start(tmp_path / str(number), inputs(1)) for number in range(20)]
    assert len({plan.plan_id for plan in plans}) == 20
    assert len({plan.created for plan in plans}) == 1


def test_inputs_that_a_killed_first_start_left_out_are_scanned_again(tmp_path: Path) -> None:
    plan = start(tmp_path, inputs(6))
    (tmp_path / "plan/inputs.parquet").unlink()
    with pytest.raises(RunFailed, match=r"inputs\.parquet is missing"):
        read_inputs(tmp_path, plan)
    assert start(tmp_path, inputs(6)) == plan
    assert len(read_inputs(tmp_path, plan).files) == 6


def test_inputs_of_another_plan_are_refused(tmp_path: Path) -> None:
    plan = start(tmp_path / "a", inputs(6))
    start(tmp_path / "b", inputs(7))
    os.replace(tmp_path / "b/plan/inputs.parquet", tmp_path / "a/plan/inputs.parquet")
    assert start(tmp_path / "a", None) == plan
    with pytest.raises(RunFailed, match=r"does not belong to .*plan\.json"):
        read_inputs(tmp_path / "a", plan)


def test_a_changed_source_does_not_fill_in_for_missing_inputs(tmp_path: Path) -> None:
    plan = start(tmp_path, inputs(6))
    (tmp_path / "plan/inputs.parquet").unlink()
    start(tmp_path, inputs(7))
    assert not (tmp_path / "plan/inputs.parquet").exists()
    with pytest.raises(RunFailed, match="is missing"):
        read_inputs(tmp_path, plan)


def test_shards_without_a_plan_are_refused(tmp_path: Path) -> None:
    """Fault 23: shards whose plan is gone are refused, and nothing is touched."""
    finished_run(tmp_path)
    (tmp_path / "plan.json").unlink()
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"holds shards but no plan\.json"):
        start(tmp_path, inputs(6))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["manifest.json", "report.html"])
def test_files_of_somebody_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=f"holds no run, but a {name}"):
        start(tmp_path, inputs(6))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"plan_id": "x"}', "\0\0"])
def test_a_damaged_plan_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(RunFailed, match=r"plan\.json is not a plan"):
        read_plan(tmp_path)


def test_a_folder_in_place_of_the_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(RunFailed, match=r"plan\.json cannot be read"):
        read_plan(tmp_path)


def test_an_output_of_another_version_of_the_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 30: an output of another version of the schema is refused with the difference."""
    start(tmp_path, inputs(6))
    monkeypatch.setattr(pipeline.draft, "SCHEMA_VERSION", 99)
    with pytest.raises(SettingsChanged, match=r"schema_version +was 1, now 99"):
        start(tmp_path, None)


def test_a_source_that_is_refused_leaves_no_folder_behind(tmp_path: Path) -> None:
    def scan() -> Inputs:
        raise UsageError("nothing is there")

    with pytest.raises(UsageError, match="nothing is there"):
        open_plan(tmp_path / "out", SETTINGS, scan=scan, max_rows=None, shard_rows=3, prompt_names=["x"], num_samples=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"shard_rows": 0}, {"num_samples": 0}, {"prompt_names": []}], ids=str)
def test_a_plan_that_asks_nothing_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"shard_rows": 3, "prompt_names": ["x"], "num_samples": 1} | wrong
    with pytest.raises(UsageError, match="at least 1"):
        open_plan(tmp_path / "out", SETTINGS, scan=lambda: inputs(1), max_rows=None, **asked)
    assert list(tmp_path.iterdir()) == []


def test_an_output_dir_that_is_a_file_is_named_before_the_scan(tmp_path: Path) -> None:
    """Fault 19: an output folder that is a file, or below one, is named before the source is scanned."""
    (tmp_path / "file").write_text("x")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFailed, match="cannot be written"):
            start(output_dir, None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_dir_without_permission_is_named_before_the_scan(tmp_path: Path) -> None:
    """Fault 19: an output folder without permission is named before the source is scanned."""
    tmp_path.chmod(0o500)
    with pytest.raises(RunFailed, match="cannot be written"):
        start(tmp_path, None)


def test_a_sub_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Fault 19: a file in the place of data/ is named."""
    (tmp_path / "data").write_text("x")
    with pytest.raises(RunFailed, match="data"):
        make_folders(tmp_path)


def test_a_file_system_without_hard_links_takes_a_plan_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: a file system without hard links takes a plan, too."""

    def link(source: Any, target: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    plan = start(tmp_path, inputs(6))
    assert start(tmp_path, None) == plan


def test_a_full_disk_leaves_no_half_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 18: a full disk leaves no half plan, and with room the next start makes it."""

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match="No space left on device"):
            start(tmp_path, inputs(6))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert start(tmp_path, inputs(6)).num_rows == 6


def test_plan_json_is_small_and_carries_what_a_reader_needs(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 1000)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content == json.loads(json.dumps(asdict(plan)))
    assert (tmp_path / "plan.json").stat().st_size < 4000
    assert {"plan_id", "fingerprint", "settings", "num_rows", "versions", "inputs_sha256"} <= content.keys()


def test_many_rows_are_planned_without_a_python_object_each(tmp_path: Path) -> None:
    """Fault 24: many rows are planned without a Python object for each."""
    num_rows = 200_000
    names = pa.array([f"folder{number % 977:03d}/picture {number:07d}.jpg" for number in range(num_rows)])
    sizes = pa.array(range(num_rows), pa.int64())
    files = files_table(names, sizes, [1] * num_rows)
    began = time.monotonic()
    plan = start(tmp_path, Inputs("/", files, inputs(1).columns), shard_rows=1000)
    planned = time.monotonic()
    assert read_inputs(tmp_path, plan).files.num_rows == num_rows
    print(f"{num_rows} rows: planned in {planned - began:.2f} s, read in {time.monotonic() - planned:.2f} s")
    assert plan.num_shards == 200


def test_a_finished_run_of_a_thousand_shards_is_recognised_without_torch_model_or_source(tmp_path: Path) -> None:
    """Fault 24: a finished run of a thousand shards is recognised by footers alone: no source, model or torch."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(1000):
        (source / f"{number:04d}.jpg").write_bytes(b"x")
    script = """
import sys
from pathlib import Path
from pipeline.dataset.images import ImagesConfig
from pipeline.planning import open_plan, make_folders
from pipeline.write.shard import published_shards
out = Path("out")
plan = open_plan(out, {"dataset.path": "source"}, scan=lambda: ImagesConfig(path="source").scan(), max_rows=None,
                 shard_rows=1, prompt_names=["default"], num_samples=1)
if sys.argv[1] == "make":
    sys.path.insert(0, sys.argv[2])
    import shutil
    from small_run import new_ledger, work
    make_folders(out)
    ledger = new_ledger(out, plan)
    work(ledger, plan, plan.shard(0))
    ledger.close()
    for number in range(1, plan.num_shards):  # a footer is a footer
        shutil.copy(out / "data/part-00000.parquet", out / f"data/{plan.shard(number).name}.parquet")
assert len(published_shards(out / "data", plan.plan_id)) == plan.num_shards == 1000
heavy = {"torch", "transformers", "datasets", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""

    def call(word: str) -> None:
        command = [sys.executable, "-c", script, word, str(Path(__file__).parent)]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)

    call("make")
    for path in source.iterdir():
        path.unlink()
    source.rmdir()
    began = time.monotonic()
    call("recognise")
    print(f"1000 shards recognised in {time.monotonic() - began:.2f} s, start of Python included")
