"""Power loss: what has its name is on the disk before, and what is removed is on the disk elsewhere.

A kill leaves what was written; a machine that loses power loses what no fsync confirmed. The calls of a run are
followed here, and each is held against what the disk would have if the power went at that moment.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import FAULT, SETTINGS, answer, inputs, keys_of, new_ledger, new_plan, row, work

from pipeline.agenda import Agenda
from pipeline.manifest import write_manifest
from pipeline.plan import Plan
from pipeline.planning import Resume, open_plan
from pipeline.status import read_status
from pipeline.tally import Tally

LASTING = ("plan.json", "plan", "data", "manifest.json", "old")  # what a run keeps; work/ and stats/ may be lost


class Disk:
    """What a disk has confirmed: contents of files, by inode, and names in folders."""

    def __init__(self, output_dir: Path, monkeypatch: pytest.MonkeyPatch, lost: str = "") -> None:
        self.output_dir = output_dir
        self.lost = lost  # a name that is given, and said to have failed
        self.contents: dict[int, tuple[int, int]] = {}  # inode -> size and date when it was synced
        self.waiting: dict[Path, set[str]] = {}  # folder -> names that it was given and that are not synced
        self.named: list[str] = []
        self.num_removed = 0
        for name in ("fsync", "link", "replace", "unlink"):
            monkeypatch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))

    def _fsync(self, real: Callable[..., Any]) -> Callable[..., None]:
        def fsync(descriptor: int) -> None:
            real(descriptor)
            path, status = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor)
            if path.is_dir():
                self.waiting.pop(path, None)
            self.contents[status.st_ino] = (status.st_size, status.st_mtime_ns)

        return fsync

    def _link(self, real: Callable[..., Any]) -> Callable[..., None]:
        def give_name(source: Path, target: Path) -> None:
            self._check_content(source, target)
            real(source, target)
            if self._lasts(target):
                self.waiting.setdefault(target.parent, set()).add(target.name)
                self.named.append(str(target.relative_to(self.output_dir)))
            if target.name == self.lost:
                self.lost = ""
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        return give_name

    _replace = _link

    def _unlink(self, real: Callable[..., Any]) -> Callable[..., None]:
        def unlink(path: Path, **more: Any) -> None:
            if str(path).endswith((".journal", ".g1.parquet")):  # what a shard was made from
                self.num_removed += 1
                data, stem = self.output_dir / "data", Path(path).name.partition(".")[0]
                named = self.named.count(f"data/{stem}.parquet")
                assert named > (".g1." in str(path)), f"{path} is removed, and its answers are nowhere else"
                assert not self.waiting.get(data), f"{path} is removed, and no disk has {self.waiting[data]}"
            real(path, **more)

        return unlink

    def _lasts(self, path: Path) -> bool:
        return path.is_relative_to(self.output_dir) and path.relative_to(self.output_dir).parts[0] in LASTING

    def _check_content(self, source: Path, target: Path) -> None:
        if self._lasts(target):
            status = os.stat(source)
            synced = self.contents.get(status.st_ino)
            assert synced == (status.st_size, status.st_mtime_ns), f"{target} is named before the disk has its content"


@pytest.mark.parametrize("lost", ["", "part-00001.parquet"])
def test_a_name_is_given_to_what_the_disk_has(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 9: power loss: whatever has its name is whole on disk, and no journal goes before its shard is there."""
    out = tmp_path / "out"
    out.mkdir()
    disk = Disk(out, monkeypatch, lost)
    plan = new_plan(out)
    answered(out, plan)
    ask_again(out, plan)
    write_manifest(out, read_status(out))
    assert disk.named == [
        "plan.json", "plan/inputs.parquet", "data/part-00000.parquet", "data/part-00001.parquet",
        "data/part-00000.parquet", "manifest.json",
    ]  # fmt: skip
    assert disk.num_removed >= 4
    assert disk.waiting == {}, "the run is done, and these names may be lost"
    open_plan(
        out, SETTINGS | {"prompt.user": "Why?"}, scan=lambda: inputs(6), max_rows=None, shard_rows=3,
        prompt_names=["default"], num_samples=1, resume=Resume.overwrite,
    )  # fmt: skip
    assert disk.waiting == {}


def answered(out: Path, plan: Plan) -> None:
    """Both shards, the first with an error; its journal was begun by a start before."""
    ledger = new_ledger(out, plan, "first")
    shard = plan.shard(0)
    keys = list(keys_of(plan, shard))
    for key in sorted(ledger.open(shard)):
        ledger.expect(row(key.row_index), [key], shard)
    ledger.record(answer(keys[0], fault=FAULT))
    ledger.close()
    ledger = new_ledger(out, plan, "second")
    for number in range(plan.num_shards):
        work(ledger, plan, plan.shard(number))
    ledger.close()


def ask_again(out: Path, plan: Plan) -> None:
    agenda = Agenda(out, plan, [])
    [shard] = agenda.shards()
    ledger = new_ledger(out, plan, "retry", only=[], tally=Tally(plan.num_records))
    [key] = ledger.open(shard)
    ledger.expect(row(key.row_index), [key], shard)
    ledger.record(answer(key))
    ledger.close()


def test_answers_in_a_journal_outlive_a_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 9: power loss: after a sync the journal's bytes are on disk, and so is its name."""
    plan = new_plan(tmp_path)
    ledger = new_ledger(tmp_path, plan)
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())

    monkeypatch.setattr(os, "fsync", fsync)
    work(ledger, plan, plan.shard(0), list(keys_of(plan, plan.shard(0)))[:1])
    ledger.sync()
    [journal] = (tmp_path / "work").glob("*.journal")
    assert synced == ["work", f"work/{journal.name}"]
    ledger.close()
