"""Files in the output folder that the run did not put there: left alone, or refused by name, and never counted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from faultbox import KILLED, Box, Found

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

GARBAGE = b"mine"


def half_done(box: Box) -> None:
    """A run that was killed when its first shard was published."""
    process = box.start(crash_at="shard_settled")
    process.communicate(timeout=60)
    assert process.returncode == KILLED


def test_foreign_files_everywhere(tmp_path: Path, found: Found) -> None:
    """Fault 23: foreign files, folders, links and FIFOs in the output folder are no answers, and stay as they are."""
    box = Box(tmp_path / "box", 120, shard_rows=30)
    half_done(box)
    names = [
        "data/part-00003.parquet.tmp", "data/.DS_Store", "data/x.json", "data/part-0001.parquet",
        "data/part-000002.parquet", "data/.nfs0001", "work/notes.txt", "work/part-00002.other.journal",
        "stats/worker-9.json", "stats/x", "plan/x", "notes.md",
    ]  # fmt: skip
    for name in names:
        (box.output / name).write_bytes(GARBAGE)
    folders = ["data/folder", "data/part-00009.parquet", "work/part-00001.a.journal", "work/part-00001.a.taken"]
    for name in folders:
        (box.output / name).mkdir()
    fifos = [f"{name}/fifo" for name in ("data", "work", "stats", "plan")] + ["work/part-00001.b.journal"]
    for name in fifos:
        os.mkfifo(box.output / name)
    # These have the names of shards, of a claim and of a retry's file, and are nothing of the kind.
    (box.output / "data/part-00002.parquet").touch()
    (box.output / "data/part-00003.parquet").symlink_to("nowhere")
    (box.output / "work/part-00002.claim").write_bytes(GARBAGE)
    os.utime(box.output / "work/part-00002.claim", (0, 0))
    (box.output / "work/part-00000.g1.parquet").write_bytes(GARBAGE)
    found.num_faults += len(names) + len(folders) + len(fifos) + 4
    printed = box.run()
    assert "Traceback" not in printed
    assert "120 of 120 done" in printed
    kept = [name for name in names if name != "work/part-00002.other.journal"]  # named like one of ours, and done with
    assert {name: (box.output / name).read_bytes() for name in kept} == dict.fromkeys(kept, GARBAGE)
    assert all((box.output / name).is_dir() for name in folders)
    assert all((box.output / name).is_fifo() for name in fifos)
    audited = box.run(command="audit", code=1)
    for name in ("part-0001.parquet", "part-000002.parquet"):
        assert f"{name} is no shard of this run" in audited, "who reads data/*.parquet reads it, too"
    assert "120 of 120 done" in box.run(command="status")
    for name in (*names, *fifos, "work/part-00000.g1.parquet"):
        (box.output / name).unlink(missing_ok=True)
    for name in folders:
        (box.output / name).rmdir()
    box.finish(found)


@pytest.mark.parametrize("kind", ["folder", "another run's", pytest.param("fifo", marks=pytest.mark.torture)])
def test_something_else_with_the_name_of_a_shard(kind: str, tmp_path: Path, found: Found) -> None:
    """Fault 23: a folder, a FIFO, a shard of another run under the name of a shard: not done; a folder is named."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    half_done(box)
    shard = box.output / "data/part-00001.parquet"
    if kind == "folder":
        shard.mkdir()
        printed = box.run(code=1)
        assert f"{shard} is a folder where a shard has to be; move it away" in printed.splitlines()[-1]
        shard.rmdir()
    elif kind == "fifo":
        os.mkfifo(shard)
    else:
        other = Box(tmp_path / "other", 60, shard_rows=30, seed=1)
        other.run()
        shutil.copy(other.output / "data" / shard.name, shard)
        assert "1 of 2 published" in box.run(command="status"), "the other run's answers are not counted"
    found.num_faults += 1
    box.finish(found)


@pytest.mark.torture
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, found: Found) -> None:
    """Fault 23: a folder where plan.json or manifest.json has to be is named, and no answer is lost."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    for name in ("plan.json", "manifest.json"):
        path = box.output / name
        path.mkdir(parents=True)
        printed = box.run(code=1)
        assert str(path) in printed.splitlines()[-1] and "Traceback" not in printed
        path.rmdir()
        found.num_faults += 1
    box.finish(found)
