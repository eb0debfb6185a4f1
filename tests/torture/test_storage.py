"""Storage that is full, gone, read-only or lies: the run stops with the path named, or goes on, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faultbox
import pytest
from faultbox import Box, Found
from faulty_storage import FAULTS, ROOT

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

PAGE_BYTES = 4096


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[None]:
    """Something else in the place of a folder. Skips the test where that is not allowed."""
    done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that even root cannot write to."""
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield


def stopped(box: Box, *named: Path) -> str:
    """Start the job, which has to end with a sentence that names one of these paths."""
    printed = box.run(code=1)
    assert "Traceback" not in printed, printed
    [sentence] = [line for line in printed.splitlines() if line.startswith("vlm-batch: ")]
    assert any(str(path) in sentence for path in named), sentence
    return printed


# Pages of 4 KB that are free: the folders (0), plan.json and its inputs (1, 2), journals (4 to 9), the first shard
# (10 to 14) and the second (16).
@pytest.mark.parametrize(
    "num_pages",
    [6, 12, *(pytest.param(pages, marks=pytest.mark.torture) for pages in (0, 1, 2, 3, 4, 5, 7, 8, 10, 11, 13, 14))],
)
def test_a_disk_that_is_full(num_pages: int, tmp_path: Path, found: Found) -> None:
    """Fault 18: the disk is full after so many pages, in plan, journal or shard: the path is named, no part is left."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    box.output.mkdir()
    with mounted(box.output, "-t", "tmpfs", "-o", f"size={(num_pages + 1) * PAGE_BYTES}", "none"):
        ballast = box.output / "ballast"
        ballast.write_bytes(bytes(PAGE_BYTES))
        assert "No space left on device" in stopped(box, box.output)
        found.num_faults += 1
        box.check_always()
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(box.output)], check=True)
        box.finish(found)


@pytest.mark.torture
def test_a_disk_that_gets_a_page_of_room_before_each_start(tmp_path: Path, found: Found) -> None:
    """Fault 18: the disk is full at every start, a page later each time: every start gets as far as it can."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    box.output.mkdir()
    with mounted(box.output, "-t", "tmpfs", "-o", f"size={40 * PAGE_BYTES}", "none"):
        ballast = [box.output / f"ballast{number}" for number in range(40)]
        for path in ballast:
            path.write_bytes(bytes(PAGE_BYTES))
        for path in ballast[:8]:
            stopped(box, box.output)
            found.num_faults += 1
            box.check_always()
            path.unlink()
        for path in ballast[8:]:
            path.unlink()
        box.finish(found)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[Box, str], None]:
    """Has a box run on a file system with these faults; with none when they are empty."""
    program = [sys.executable, "-c", "import faulty_storage; faulty_storage.start()"]
    monkeypatch.setattr(faultbox, "PROGRAM", program)

    def set_faults(box: Box, faults: str) -> None:
        box.environment = {FAULTS: faults, ROOT: str(box.output)}

    return set_faults


def test_figures_that_cannot_be_kept_stop_nobody(
    tmp_path: Path, found: Found, faulty: Callable[[Box, str], None]
) -> None:
    """Fault 18: no room for statistics alone: a warning, and the run is done."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    faulty(box, "replace before ENOSPC */stats/*")
    printed = box.run()
    assert "could not be written: [Errno 28] No space left on device" in printed
    assert list((box.output / "stats").glob("*.json")) == []
    found.num_faults += 1
    faulty(box, "")
    box.finish(found)


def test_an_output_folder_that_is_read_only(tmp_path: Path, found: Found) -> None:
    """Fault 19: a read-only output folder, at the first start and at a later one, is named before a model loads."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    box.output.mkdir()
    with read_only(box.output):
        stopped(box, box.output)
        assert list(box.output.iterdir()) == []
    box.start(crash_at="journal_synced:2").communicate(timeout=60)
    before = (files_of(box.output), box.began())
    for folder in (box.output, box.output / "data"):
        with read_only(folder):
            stopped(box, folder)
        assert (files_of(box.output), box.began()) == before
        found.num_faults += 1
    box.finish(found)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_in_the_place_of_a_folder(tmp_path: Path, found: Found) -> None:
    """Fault 19: a file where the output folder or one of its folders has to be is named and stays as it is."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    for name in (".", "data", "work", "plan", "stats"):
        path = box.output / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        stopped(box, path)
        assert path.read_text() == "mine"
        assert box.began() == []
        path.unlink()
        shutil.rmtree(box.output, ignore_errors=True)
        found.num_faults += 1


def wait_for_shard(box: Box, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not list((box.output / "data").glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline, "no shard within a minute"
        time.sleep(0.01)


VANISHING = [(".", False), (".", True), ("data", False)]


@pytest.mark.parametrize(
    ("name", "has_file"), [("data", True), *(pytest.param(*case, marks=pytest.mark.torture) for case in VANISHING)]
)
def test_a_folder_that_vanishes_during_the_run(name: str, has_file: bool, tmp_path: Path, found: Found) -> None:
    """Fault 19: the output folder, or data/, goes away during the run: it stops; once it is back the run goes on."""
    box = Box(tmp_path / "box", 1500, shard_rows=30)
    process = box.start()
    wait_for_shard(box, process)
    folder, away = box.output / name, box.folder / "away"
    os.rename(folder, away)
    if has_file:
        folder.write_text("mine")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1, printed
    assert "Traceback" not in printed, printed
    assert str(box.output) in printed.splitlines()[-1], printed
    found.num_faults += 1
    if has_file:
        assert folder.read_text() == "mine"
        folder.unlink()
    else:
        assert not folder.exists(), "it was made anew without what was in it"
    os.rename(away, folder)
    box.check_always()
    box.finish(found)


@pytest.mark.torture
def test_a_work_folder_that_vanishes_during_the_run(tmp_path: Path, found: Found) -> None:
    """Fault 19: work/ is removed during the run: what was in it is asked for again, and nothing else."""
    box = Box(tmp_path / "box", 600, shard_rows=30)
    process = box.start()
    wait_for_shard(box, process)
    done = files_of(box.output / "data")
    shutil.rmtree(box.output / "work", ignore_errors=True)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode in (0, 1), printed
    assert "Traceback" not in printed, printed
    counted = box.finish(Found())  # what stood in the journals is forgotten by right
    found.num_lost, found.num_doubled, found.num_faults = counted.num_lost, counted.num_doubled, 1
    assert done.items() <= files_of(box.output / "data").items()


# faults -> whether the run gets through, and what the sentence says where it does not
NETWORK = {
    "link after EEXIST *": None,
    "link before ESTALE:1 */data/*": "Stale file handle",
    "fsync before EIO:1 */work/part-*.parquet": "Input/output error",
}
MORE_NETWORK = {
    "list lags 3 */data; list lags 3 */work": None,
    "unlink leaves .nfs */work": None,
    "link before ESTALE:1 */plan.json": "Stale file handle",
    "link after ESTALE:1 */data/*": None,
    "link before EIO:2 */data/*": "Input/output error",
    "replace before ESTALE:1 */plan/*": "Stale file handle",
    "replace after ESTALE:1 */plan/*": "Stale file handle",
    "replace before EIO:1 */manifest.json": "Input/output error",
    "replace after EIO:1 */manifest.json": None,
    "fsync before EIO:1 */plan.json.*": "Input/output error",
    "fsync before EIO:1 *.journal": "Input/output error",
    "fsync before EIO:3 *.journal": "Input/output error",
    "fsync before EIO:1 */data": "Input/output error",
    "fsync before EIO:2 */work/part-*.parquet": "Input/output error",
    "link after EEXIST *; list lags 3 */work; unlink leaves .nfs */work": None,
}


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [*NETWORK.items(), *(pytest.param(*case, marks=pytest.mark.torture) for case in MORE_NETWORK.items())],
)
def test_a_network_file_system(
    faults: str, sentence: str | None, tmp_path: Path, found: Found, faulty: Callable[[Box, str], None]
) -> None:
    """Fault 20: lost replies, stale handles, EIO, late listings, .nfs files: the run gets through or can go on."""
    box = Box(tmp_path / "box", 90, shard_rows=30)
    faulty(box, faults)
    printed = box.run(code=0 if sentence is None else 1)
    assert "Traceback" not in printed, printed
    assert "faulty storage: " in printed, "the fault was never met"
    assert sentence is None or sentence in printed.splitlines()[-1], printed
    box.check_always()
    shards = list((box.output / "data").glob("*"))
    if sentence is None:
        assert len(shards) == 3
    elif "fsync before EIO:1 */work/part-" in faults:
        assert shards == [], "a shard was published that the disk did not confirm"
    found.num_faults += printed.count("faulty storage: ")
    faulty(box, "")
    box.finish(found)


def test_a_finished_shard_that_cannot_be_read_now(
    tmp_path: Path, found: Found, faulty: Callable[[Box, str], None]
) -> None:
    """Fault 20: EIO while a finished shard is looked at: it is not taken for missing, and not made anew."""
    box = Box(tmp_path / "box", 90, shard_rows=30)
    box.start(crash_at="shard_settled:2").communicate(timeout=60)
    before, made = files_of(box.output / "data"), box.made()
    faulty(box, "read before EIO */data/part-00000.parquet")
    stopped(box, box.output / "data/part-00000.parquet")
    assert (files_of(box.output / "data"), box.made()) == (before, made)
    found.num_faults += 1
    faulty(box, "")
    box.finish(found)


def test_a_journal_that_cannot_be_read(tmp_path: Path, found: Found, faulty: Callable[[Box, str], None]) -> None:
    """Fault 20: EIO while a journal is read: its answers are asked for again, with a warning that names it."""
    box = Box(tmp_path / "box", 90, shard_rows=90)
    box.start(crash_at="journal_synced:3").communicate(timeout=60)
    faulty(box, "read before EIO *.journal")
    printed = box.run()
    assert ".journal cannot be read: [Errno 5] Input/output error" in printed
    faulty(box, "")
    counted = box.finish(Found())  # what stood in the journal is forgotten by right
    found.num_lost, found.num_doubled, found.num_faults = counted.num_lost, counted.num_doubled, 1


LEAVING = pytest.param("unlink leaves .nfs *", marks=pytest.mark.torture)


@pytest.mark.parametrize("faults", ["link after EEXIST *", LEAVING])
def test_a_retry_on_a_network_file_system(
    faults: str, tmp_path: Path, found: Found, faulty: Callable[[Box, str], None]
) -> None:
    """Fault 20: lost replies and .nfs files during a retry: the new answers are in place, the others untouched."""
    box = Box(tmp_path / "box", 90, shard_rows=30)
    box.run()
    box.mend()
    faulty(box, faults)
    box.run(command="retry")
    box.check_always()
    found.num_faults += 1
    faulty(box, "")
    box.run()
    assert not (box.output / "work").exists()
