"""Tar files that mean harm, through the whole program: nothing is extracted, linked, run or unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hostile_run import SHARED, png, records, start

WEBDATASET = SHARED / "webdataset"
NO_PICKLES = """
import pickle
def load(*_, **__): raise AssertionError("something was unpickled")
pickle.load = pickle.Unpickler = load
"""


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def hostile_tar(path: Path, outside: Path) -> None:
    """Two sound samples, and between them all that a tar can hold."""
    evil = pickle.dumps(Canary(outside / "unpickled"))
    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname, info.mode = len(data), kind, link, 0o6777
            info.devmajor, info.devminor = 1, 5  # /dev/zero
            archive.addfile(info, io.BytesIO(data))

        add("a.png", png(1))
        add("a.txt", b"first")
        for name in (
            "../climbed.png",
            "../../climbed.png",
            f"{outside}/absolute.png",
            "x/../../climbed.png",
            "..\\back.png",
        ):
            add(name, png(9))
        for name in ("a.pkl", "a.pickle", "a.pyd", "a.pth", "a.npy", "a.json.pkl", "evil.pkl"):
            add(name, evil)
        add("link", kind=tarfile.SYMTYPE, link=str(outside))
        add("link/through.png", png(9))
        add("shadow.png", kind=tarfile.SYMTYPE, link="/etc/shadow")
        add("hard.png", kind=tarfile.LNKTYPE, link="/etc/shadow")
        add("zero.png", kind=tarfile.CHRTYPE)
        add("disk.png", kind=tarfile.BLKTYPE)
        add("pipe.png", kind=tarfile.FIFOTYPE)
        add("folder.png", kind=tarfile.DIRTYPE)
        add("b.png", png(2))
        add("b.png", png(3))  # twice: which one is meant nobody knows
        add("c.png", png(4))
        add("c.json", json.dumps({"image": "/etc/passwd", "png": "/etc/passwd", "__key__": "../x", "n": 1}).encode())


def test_a_hostile_tar_leaves_nothing_behind(tmp_path: Path) -> None:
    """Fault S-6: ../x, absolute names, links, devices, duplicates, pickles: no file made, nothing unpickled or read."""
    job, outside = tmp_path / "job", tmp_path / "outside"
    (job / "in").mkdir(parents=True)
    outside.mkdir()
    hostile_tar(job / "in" / "evil.tar", outside)
    printed = start(job, "dataset=webdataset", "dataset.path=in", prelude=NO_PICKLES)
    assert list(outside.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "outside"]
    assert sorted(path.name for path in job.iterdir()) == ["in", "out"]
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink() or not (path.is_dir() or path.is_file())]
    rows = {row["id"]: row for row in records(job)}
    answered = {name for name, row in rows.items() if row["status"] == "ok"}
    assert answered == {"evil.tar/a", "evil.tar/link/through", "evil.tar/c"}
    assert rows["evil.tar/a"]["txt"] == "first"
    assert {name: row["error_type"] for name, row in rows.items() if name not in answered} == {
        "evil.tar/b": "DuplicateMember", "evil.tar/evil": "NullImage",
    }  # fmt: skip
    assert "4 x members with absolute names or .. passed over" in printed
    assert "6 x links, devices and sparse members passed over" in printed
    for extension in ("pkl", "pickle", "pyd", "pth", "npy", "json.pkl"):
        assert f".{extension} members passed over" in printed


@pytest.mark.parametrize("path", ["pipe:touch CANARY", "pipe:cat in.tar", "| touch CANARY", "file:pipe:touch CANARY"])
def test_a_path_is_no_command(path: str, tmp_path: Path) -> None:
    """Fault S-6: pipe: and other forms in which libraries run a shell are paths that do not exist."""
    printed = start(tmp_path, "dataset=webdataset", f"dataset.path={path}", code=2)
    assert "does not exist" in printed
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.skipif(not WEBDATASET.is_dir(), reason=f"no test data at {WEBDATASET}")
def test_public_shards_are_only_read(tmp_path: Path) -> None:
    """Fault S-6: real shards, nested folders and compressed members among them, through a run: nothing is extracted."""
    os.symlink(WEBDATASET, tmp_path / "in")
    start(tmp_path, "dataset=webdataset", "dataset.path=in/{sample.tgz,compressed.tar}", prelude=NO_PICKLES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    rows = records(tmp_path)
    assert sum(row["status"] == "ok" for row in rows) > 10
    assert {row["error_type"] for row in rows} <= {None, "NullImage"}
