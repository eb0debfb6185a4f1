"""Publication: a shard's name appears in one step, over a whole file, for one of its writers."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RunFailed
from pipeline.write.schema import ShardSummary
from pipeline.write.shard import publish_shard, published_shards, read_shard, shard_files

NUM_RACES = 50


def summary(shard: int = 0, plan_id: str = "ours", num_rows: int = 100) -> ShardSummary:
    return ShardSummary(plan_id, shard, num_rows, 0, {}, 0, {})


def table(who: str = "me", num_rows: int = 100) -> pa.Table:
    return pa.table({"row_index": range(num_rows), "response": [f"{who} {number}" for number in range(num_rows)]})


def publish(folder: Path, *, who: str = "me", shard: int = 0, plan_id: str = "ours", rows: int = 100) -> bool:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    return publish_shard(
        table(who, rows),
        summary(shard, plan_id, rows),
        final=folder / "data" / f"part-{shard:05d}.parquet",
        attempt_path=folder / "work" / f"part-{shard:05d}.{who}.parquet",
        compression="zstd",
    )


def racer(folder: Path, who: str, barrier: Any, won: Any) -> None:
    for shard in range(NUM_RACES):
        barrier.wait(60)
        if publish(folder, who=who, shard=shard):
            won.append((shard, who))


def test_of_two_processes_that_race_for_a_shard_one_wins_every_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    (tmp_path / "data").mkdir()
    (tmp_path / "work").mkdir()
    with context.Manager() as manager:
        won, barrier = manager.list(), context.Barrier(2)
        processes = [context.Process(target=racer, args=(tmp_path, who, barrier, won)) for who in ("red", "blue")]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        winners = dict(won)
        assert len(won) == len(winners) == NUM_RACES
    for shard, who in winners.items():
        rows = read_shard(tmp_path / "data" / f"part-{shard:05d}.parquet")
        assert rows["response"][0].as_py() == f"{who} 0", "the file is the winner's"
    assert list((tmp_path / "work").iterdir()) == []


def test_a_published_shard_is_never_replaced_by_its_own_plan(tmp_path: Path) -> None:
    assert publish(tmp_path, who="first") is True
    before = (tmp_path / "data/part-00000.parquet").read_bytes()
    assert publish(tmp_path, who="second") is False
    assert (tmp_path / "data/part-00000.parquet").read_bytes() == before
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    "content", [None, b"", b"PAR1 but nothing else PAR1"], ids=["another plan's", "empty", "damaged"]
)
def test_a_file_that_is_no_shard_of_this_plan_is_not_done_and_is_replaced(
    tmp_path: Path, content: bytes | None
) -> None:
    """Fault 23: an empty or damaged file, or another plan's, under the name of a shard is not done and is replaced."""
    publish(tmp_path, who="other", plan_id="theirs")
    if content is not None:
        (tmp_path / "data/part-00000.parquet").write_bytes(content)
    assert published_shards(tmp_path / "data", "ours") == {}
    assert publish(tmp_path) is True
    assert list(published_shards(tmp_path / "data", "ours")) == [0]


def test_a_folder_with_the_name_of_a_shard_is_refused_by_name(tmp_path: Path) -> None:
    """Fault 23: a folder with the name of a shard is not done, and is refused by name."""
    (tmp_path / "data/part-00000.parquet").mkdir(parents=True)
    assert published_shards(tmp_path / "data", "ours") == {}
    with pytest.raises(RunFailed, match=r"part-00000\.parquet is a folder"):
        publish(tmp_path)
    assert list((tmp_path / "work").iterdir()) == []


def test_files_that_only_look_like_shards_are_not_counted(tmp_path: Path) -> None:
    """Fault 23: part-00001.parquet.tmp, .DS_Store, x.json, other spellings, an empty file: none counts as done."""
    publish(tmp_path)
    data = tmp_path / "data"
    for name in ("part-00001.parquet.tmp", ".DS_Store", "x.json", "part-0002.parquet", "part-000000.parquet"):
        (data / name).write_bytes((data / "part-00000.parquet").read_bytes())
    (data / "part-00004.parquet").touch()
    assert [number for number, _ in shard_files(data)] == [0, 4]
    assert list(published_shards(data, "ours")) == [0]


def test_a_flipped_bit_anywhere_is_an_error_or_harmless_but_never_another_value(tmp_path: Path) -> None:
    publish(tmp_path)
    path, damaged = tmp_path / "data/part-00000.parquet", tmp_path / "damaged.parquet"
    content, good = path.read_bytes(), read_shard(path)
    num_found = 0
    for place in range(0, len(content), 7):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            rows = read_shard(damaged)
        except RunFailed:
            num_found += 1
        else:
            # The footer has no checksum of its own: names and statistics in it are for the audit to compare.
            assert [column.to_pylist() for column in rows.columns] == [column.to_pylist() for column in good.columns]
    assert num_found > len(content) // 7 // 3


def test_the_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 9: the disk confirms a shard's content, then the shard gets its name, then the disk confirms the name."""
    steps: list[str] = []

    def traced(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **more: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            steps.append(f"{name} {Path(target).relative_to(tmp_path)}")
            return real(*args, **more)

        return step

    monkeypatch.setattr(os, "fsync", traced("fsync", os.fsync))
    monkeypatch.setattr(os, "link", traced("link", os.link))
    publish(tmp_path)
    assert steps == ["fsync work/part-00000.me.parquet", "link data/part-00000.parquet", "fsync data"]


def test_an_error_of_the_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: EIO when a shard is synced: it is not published, and no part of it is left."""

    def failing(number: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(RunFailed, match=r"part-00000\.parquet could not be written: Input/output error"):
        publish(tmp_path)
    assert list((tmp_path / "data").iterdir()) == list((tmp_path / "work").iterdir()) == []


def test_a_directory_that_cannot_be_synced_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: EIO when the folder of a shard is synced ends the run."""
    real = os.fsync

    def failing(number: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(5, "Input/output error")
        real(number)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(RunFailed, match="Input/output error"):
        publish(tmp_path)


@pytest.mark.parametrize("limit_bytes", [0, 4, 1_000, 20_000, -200, -8, -1])
def test_a_full_disk_ends_the_run_with_the_path_and_without_half_a_shard(tmp_path: Path, limit_bytes: int) -> None:
    """Fault 18: room ends in a shard or in its footer (limits from the end): path named, no part left."""
    publish(tmp_path, shard=1, rows=5_000)
    size = (tmp_path / "data/part-00001.parquet").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes if limit_bytes >= 0 else size + limit_bytes, hard))
    try:
        with pytest.raises(RunFailed, match=r"part-00000\.parquet could not be written: File too large"):
            publish(tmp_path, rows=5_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["part-00001.parquet"]
    assert list((tmp_path / "work").iterdir()) == []
    assert publish(tmp_path, rows=5_000) is True  # room was made


def test_a_lost_reply_of_a_network_file_system_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: link says EEXIST although it succeeded: the shard is this worker's."""
    real = os.link

    def link(source: Any, target: Any) -> None:
        real(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link)
    assert publish(tmp_path) is True
    assert list(published_shards(tmp_path / "data", "ours")) == [0]


def test_without_hard_links_a_shard_is_published_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: a file system without hard links: shards are published, and never replaced by their own plan."""

    def link(source: Any, target: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert publish(tmp_path, who="first") is True
    assert publish(tmp_path, who="second") is False
    assert read_shard(tmp_path / "data/part-00000.parquet")["response"][0].as_py() == "first 0"


def test_who_is_slower_and_finds_the_work_folder_cleared_away_has_lost_and_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pq.write_table

    def quicker(*args: Any, **more: Any) -> None:
        real(*args, **more)
        monkeypatch.setattr(pq, "write_table", real)
        assert publish(tmp_path, who="quick") is True
        for path in (tmp_path / "work").iterdir():
            path.unlink()
        (tmp_path / "work").rmdir()

    monkeypatch.setattr(pq, "write_table", quicker)
    assert publish(tmp_path, who="slow") is False


def test_the_output_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 25: blanks, Unicode, %3A, a dash, 240 bytes, quotes, links in the name of the output folder."""
    for name in ("with blank", "ümläut", "u\u0308", "%3A", "-dash", "a" * 240, "quote'\"", "*?["):
        (tmp_path / name).mkdir()
        assert publish(tmp_path / name) is True
        assert list(published_shards(tmp_path / name / "data", "ours")) == [0]
    (tmp_path / "link").symlink_to(tmp_path / "-dash")
    assert publish(tmp_path / "link") is False
    monkeypatch.chdir(tmp_path)
    assert publish(Path("-dash"), shard=7) is True


def test_a_footer_with_a_name_that_is_no_text_is_a_damaged_footer(tmp_path: Path) -> None:
    """Fault 22: a column name in the footer that is no UTF-8: the shard is not done, and whoever reads it is told."""
    publish(tmp_path)
    path = tmp_path / "data/part-00000.parquet"
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert content[footer:].count(b"row_index") >= 2
    path.write_bytes(content[:footer] + content[footer:].replace(b"row_index", b"\xe9ow_index", 1))
    with pytest.raises(RunFailed, match=r"part-00000\.parquet is damaged"):
        read_shard(path)
    assert published_shards(tmp_path / "data", "ours") == {}
