"""What a start of `run` would find or make, and that looking writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from small_run import keys_of, new_ledger, tree, work

from pipeline.compose import compose
from pipeline.config import RunConfig
from pipeline.errors import RunFailed, SettingsChanged, UsageError, VlmBatchError
from pipeline.forecast.foreseen import Foreseen, foreseen
from pipeline.plan import Plan
from pipeline.run import begun
from pipeline.vlm.identity import identify


def pictures(folder: Path, num: int, first: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(first, first + num):
        Image.new("RGB", (40, 30), (number, 90, 200)).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A job of ten pictures in shards of three."""
    folder = pictures(tmp_path / "pictures", 10)
    return ["dataset=images", f"dataset.path={folder}", f"output_dir={tmp_path / 'out'}", "write.shard_rows=3"]


def config_of(*words: str) -> RunConfig:
    return compose(words).config


def seen(*words: str, with_model: bool = True) -> Foreseen:
    config = config_of(*words)
    return foreseen(config, identify(config.vlm) if with_model else None)


def begin(*words: str) -> Plan:
    """What a start of a run does before its model loads."""
    return begun(config_of(*words), None)[1]


@pytest.mark.parametrize("with_model", [True, False])
def test_a_new_job_is_seen_whole_and_nothing_is_made(words: list[str], with_model: bool, tmp_path: Path) -> None:
    before = tree(tmp_path)
    found = seen(*words, with_model=with_model)
    assert (found.is_new, found.num_left, found.num_rows_left, found.plan.num_shards) == (True, 10, 10, 4)
    assert found.ranges == ((0, 10),)
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


def test_the_plan_is_the_one_that_a_run_makes(words: list[str]) -> None:
    """All of it but its name and date."""
    expected, made = seen(*words).plan, begin(*words)
    assert (expected.fingerprint, expected.settings) == (made.fingerprint, made.settings)
    assert (expected.inputs_sha256, expected.extents, expected.root) == (made.inputs_sha256, made.extents, made.root)
    assert seen(*words).plan == made, "and then it is the folder's own"


@pytest.mark.parametrize("with_model", [True, False])
def test_of_a_begun_run_the_rest_is_seen(words: list[str], with_model: bool, tmp_path: Path) -> None:
    plan = begin(*words)
    ledger = new_ledger(tmp_path / "out", plan, schema=seen(*words).schema)
    work(ledger, plan, plan.shard(1))
    work(ledger, plan, plan.shard(3))
    ledger.close()
    before = tree(tmp_path)
    found = seen(*words, with_model=with_model)
    assert (found.is_new, found.num_done, found.num_left) == (False, 4, 6)
    assert found.ranges == ((0, 3), (6, 9))
    assert tree(tmp_path) == before


def test_answers_in_journals_are_done_and_their_shards_are_not(words: list[str], tmp_path: Path) -> None:
    plan = begin(*words)
    ledger = new_ledger(tmp_path / "out", plan, schema=seen(*words).schema)
    work(ledger, plan, plan.shard(2), list(keys_of(plan, plan.shard(2)))[:2])
    ledger.close()
    found = seen(*words)
    assert (found.num_done, found.ranges) == (2, ((0, 10),))


def test_what_a_run_refuses_is_refused_in_the_same_words(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    begin(*words)
    data = tmp_path / "stray" / "data"
    data.mkdir(parents=True)
    (data / "part-00000.parquet").write_bytes(b"somebody's")
    for changes in (
        ["prompt.user=Something else."],
        ["dataset.path=" + str(tmp_path / "nowhere"), f"output_dir={tmp_path / 'other'}"],
        [f"output_dir={tmp_path / 'stray'}"],
        ["prompt.user={{ title }}", f"output_dir={tmp_path / 'other'}"],
        ["generation.max_new_tokens_column=cap", f"output_dir={tmp_path / 'other'}"],
        [f"output_dir={tmp_path / 'file' / 'out'}"],
    ):
        before = tree(tmp_path)
        with pytest.raises(VlmBatchError) as ours:
            seen(*words, *changes)
        assert tree(tmp_path) == before
        with pytest.raises(VlmBatchError) as theirs:
            begin(*words, *changes)
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value).split(": ")[0] == str(theirs.value).split(": ")[0], "of a folder, ours names the file"


def test_without_a_model_an_old_run_is_compared_as_far_as_that_goes(words: list[str]) -> None:
    begin(*words)
    with pytest.raises(SettingsChanged, match=r"prompt\.user"):
        seen(*words, "prompt.user=Another question.", with_model=False)


def test_a_folder_that_cannot_be_written_is_refused_without_a_try(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFailed, match="cannot be written"):
        seen(*words, f"output_dir={tmp_path / 'file' / 'out'}")


def test_stray_shards_are_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "part-00000.parquet").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="holds shards but no"):
        seen(*words)


def test_resume_overwrite_sees_a_new_plan_and_moves_nothing(words: list[str], tmp_path: Path) -> None:
    begin(*words)
    before = tree(tmp_path)
    assert not seen(*words, "resume=overwrite").is_new, "the settings are the same"
    found = seen(*words, "resume=overwrite", "prompt.user=Another question.")
    assert found.is_new and found.num_left == 10
    assert tree(tmp_path) == before


def test_resume_extend_sees_what_was_added(words: list[str], tmp_path: Path) -> None:
    plan = begin(*words)
    ledger = new_ledger(tmp_path / "out", plan, schema=seen(*words).schema)
    for number in range(plan.num_shards):
        work(ledger, plan, plan.shard(number))
    ledger.close()
    assert seen(*words).num_left == 0
    pictures(tmp_path / "pictures", 4, first=10)
    before = tree(tmp_path)
    assert seen(*words).num_left == 0, "not asked to"
    found = seen(*words, "resume=extend")
    assert (found.num_left, found.ranges, found.plan.extents) == (4, ((10, 14),), (10, 14))
    assert tree(tmp_path) == before
    assert found.plan == begin(*words, "resume=extend"), "as a run extends it"


def test_a_source_is_listed_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have a million files."""
    config, scans = config_of(*words), list[int]()
    scan = type(config.dataset).scan
    monkeypatch.setattr(type(config.dataset), "scan", lambda self: scans.append(1) or scan(self))
    foreseen(config, None)
    assert len(scans) == 1
    begin(*words)
    scans.clear()
    foreseen(config, None)
    assert not scans, "the plan has it"
