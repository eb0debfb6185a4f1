"""Claims: two workers seldom do the same shard, and no claim of the dead stops anybody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.write.claim import Claims

SHARD = "part-00003"


def set_date(path: Path, seconds_ago: float) -> None:
    os.utime(path, (time.time() - seconds_ago,) * 2)


def foreign(path: Path, *, host: str = "elsewhere", pid: int = 1) -> Path:
    path.write_text(json.dumps({"owner": "them", "host": host, "pid": pid}))
    return path


def test_a_shard_has_one_owner_until_it_is_released(tmp_path: Path) -> None:
    red, blue = Claims(tmp_path, "red"), Claims(tmp_path, "blue")
    assert red.take(SHARD) is True
    assert blue.take(SHARD) is False
    assert red.take(SHARD) is True, "taking one's own again is no conflict"
    assert blue.take("part-00004") is True
    blue.release(SHARD)
    assert blue.take(SHARD) is False, "releasing what is another's changes nothing"
    red.release(SHARD)
    assert blue.take(SHARD) is True
    blue.close()
    assert list(tmp_path.iterdir()) == []


def test_a_live_claim_of_another_host_holds_for_its_lease(tmp_path: Path) -> None:
    """Fault 13: the claim of another host, which may be dead, holds for its lease and no longer."""
    path = foreign(tmp_path / f"{SHARD}.claim")
    claims = Claims(tmp_path, "us", lease_seconds=60)
    set_date(path, 50)
    assert claims.take(SHARD) is False
    set_date(path, 70)
    assert claims.take(SHARD) is True
    assert json.loads(path.read_text())["owner"] == "us"


def test_a_claim_of_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    """Fault 13: the claim of a dead process of this host is taken over at once, that of a stopped one is not."""
    script = f"""
import os, signal
from pathlib import Path
from pipeline.write.claim import Claims
assert Claims(Path({str(tmp_path)!r}), "doomed").take({SHARD!r})
print("claimed", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        claims = Claims(tmp_path, "us")
        assert claims.take(SHARD) is False, "a stopped process is not a dead one"
        process.kill()
        process.wait()
        assert claims.take(SHARD) is True


UNREADABLE = ["", "{", "[]", '{"owner": 1}', "\0", "\xff\xfe", "[" * 100_000, "9" * 10_000]
UNREADABLE += [f'{{"owner": "them", "host": "", "pid": {pid}}}' for pid in ("1e999", "-1", "9" * 30, "null")]


@pytest.mark.parametrize("content", UNREADABLE, ids=lambda content: repr(content[:40]))
def test_an_unreadable_claim_holds_for_its_lease_and_no_longer(tmp_path: Path, content: str) -> None:
    """Fault 13: an empty, torn or unreadable claim holds for its lease and no longer."""
    path = tmp_path / f"{SHARD}.claim"
    path.write_text(content, encoding="latin-1")
    claims = Claims(tmp_path, "us", lease_seconds=60)
    assert claims.take(SHARD) is False
    set_date(path, 61)
    assert claims.take(SHARD) is True


@pytest.mark.timeout(60)
def test_a_claim_that_is_no_file_or_may_not_be_read_is_taken_over_like_any_other(tmp_path: Path) -> None:
    """Fault 13: a claim without permissions, or a FIFO in its place, holds for its lease and stops nobody."""
    locked, fifo = foreign(tmp_path / "part-00001.claim"), tmp_path / "part-00002.claim"
    locked.chmod(0)
    os.mkfifo(fifo)
    claims = Claims(tmp_path, "us", lease_seconds=60)
    for path in (locked, fifo):
        assert claims.take(path.stem) is False
        set_date(path, 61)
        assert claims.take(path.stem) is True


def test_who_claims_while_the_run_is_finished_by_others_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 13: work/ is cleared away between two steps of a claim; the claim is made anew."""
    work, link = tmp_path / "work", os.link
    cleared = iter((True, True, False))

    def late_link(source: Path, target: Path) -> None:
        if next(cleared):
            shutil.rmtree(work)
        link(source, target)

    monkeypatch.setattr(os, "link", late_link)
    assert Claims(work, "us").take(SHARD) is True
    assert [path.name for path in work.iterdir()] == [f"{SHARD}.claim"]


def test_a_claim_in_a_folder_that_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Claims(tmp_path / "gone" / "work", "us").take(SHARD)


def test_a_claim_from_the_future_does_not_hold_for_ever(tmp_path: Path) -> None:
    """Fault 13: a claim dated in the future does not hold for ever."""
    path = foreign(tmp_path / f"{SHARD}.claim")
    set_date(path, -3600)
    assert Claims(tmp_path, "us", lease_seconds=60).take(SHARD) is True


def test_a_heartbeat_renews_the_lease(tmp_path: Path) -> None:
    """Fault 13: a claim that is renewed is never taken over."""
    red, blue = Claims(tmp_path, "red", lease_seconds=60), Claims(tmp_path, "blue", lease_seconds=60)
    red.take(SHARD)
    set_date(tmp_path / f"{SHARD}.claim", 100)
    red.beat()
    assert blue.take(SHARD) is False
    set_date(tmp_path / f"{SHARD}.claim", 100)
    assert blue.take(SHARD) is True


def test_who_slept_past_the_lease_leaves_the_claim_to_its_new_owner(tmp_path: Path) -> None:
    """Fault 8: who slept past the lease leaves the claim to its new owner."""
    red, blue = Claims(tmp_path, "red", lease_seconds=60), Claims(tmp_path, "blue", lease_seconds=60)
    red.take(SHARD)
    path = tmp_path / f"{SHARD}.claim"
    set_date(path, 100)
    assert blue.take(SHARD) is True
    set_date(path, 50)
    before = path.stat().st_mtime
    red.beat()
    red.close()
    assert path.stat().st_mtime == before
    assert json.loads(path.read_text())["owner"] == "blue"
    assert blue.take(SHARD) is True
