"""SIGKILL at any moment: no row is lost, none is doubled, and no answer changes."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from faultbox import KILLED, Box, Found, Watcher, kill_at_random

from pipeline.write.crash_point import CRASH_POINTS


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_kills", [20, pytest.param(100, marks=pytest.mark.torture)])
def test_kills_at_random_moments(num_kills: int, tmp_path: Path, found: Found) -> None:
    """Fault 1: SIGKILL of the whole process group at random moments."""
    rng = random.Random(num_kills)
    box = Box(tmp_path / "0", 1000)
    while found.num_faults < num_kills:
        with Watcher(box) as watcher:
            while found.num_faults < num_kills:
                before = box.made()
                if not kill_at_random(box, rng, seconds=(0.1, 2.5)):
                    break
                found.num_faults += 1
                again = sum(1 for key in box.made() - before if key in before)
                found.most_redone = max(found.most_redone, again)
                box.check_always()
            box.finish(found)
        assert watcher.num_looks
        box = Box(tmp_path / str(found.num_faults), 1000, seed=found.num_faults)


def test_kills_in_the_first_second_of_a_start(tmp_path: Path, found: Found) -> None:
    """Fault 6: killed again and again while it recovers."""
    rng = random.Random(6)
    box = Box(tmp_path / "box", 600)
    kill_at_random(box, rng, seconds=(1.5, 2.0))
    for _ in range(10):
        kill_at_random(box, rng, seconds=(0.0, 1.0))
        box.check_always()
        found.num_faults += 1
    box.finish(found)


def crash(box: Box, crash_at: str, found: Found, command: str = "run") -> str:
    """Have the job die at a point, which has to be reached; what it printed."""
    process = box.start(crash_at=crash_at, command=command)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == KILLED, f"{crash_at} was never reached\n{printed}"
    found.num_faults += 1
    box.check_always()
    return printed


# A few in `make test`, all of them in `make torture`.
FEW = ("plan_created", "journal_appended", "shard_written", "shard_published", "manifest_written")
OF_RETRY = ("generation_published", "generation_in_place")
OF_OVERWRITE = ("overwrite_begun", "overwrite_without_plan")
OF_EXTEND = ("inputs_extended",)
OF_RUN = [point for point in CRASH_POINTS if point not in (*OF_RETRY, *OF_OVERWRITE, *OF_EXTEND)]


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in FEW else pytest.mark.torture) for point in OF_RUN]
)
def test_a_crash_at_each_point(point: str, tmp_path: Path, found: Found) -> None:
    """Fault 2: SIGKILL at each named point of a run, the first time that it is reached."""
    box = Box(tmp_path / "box", 120, shard_rows=40)
    if point == "stray_removed":  # there is one
        crash(box, "shard_closed", found)
    crash(box, point, found)
    box.finish(found)


@pytest.mark.torture
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("point", ["claim_taken", "journal_synced", "shard_opened", "shard_checked", "shard_settled"])
def test_a_crash_at_a_later_shard(point: str, times: int, tmp_path: Path, found: Found) -> None:
    """Fault 2: the same at later shards, in a folder that was killed before."""
    box = Box(tmp_path / "box", 200, shard_rows=40)
    crash(box, "journal_synced:2", found)
    crash(box, f"{point}:{times}", found)
    box.finish(found)


@pytest.mark.parametrize("kind", ["journal_bytes", "shard_bytes"])
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.torture)])
def test_a_crash_at_any_byte(kind: str, times: int, tmp_path: Path, found: Found) -> None:
    """Fault 3: SIGKILL in the middle of a write: journals, rows and footers of shards."""
    rng = random.Random(times)
    whole = Box(tmp_path / "--", 90, shard_rows=90)  # paths are as long as below: shards hold those of their rows
    whole.run()
    # Times are in it, too: of eight shards four were a byte shorter than the others.
    size = next((whole.output / "data").iterdir()).stat().st_size - 8
    for number in range(times):
        box = Box(tmp_path / f"{number:02}", 90, shard_rows=90)
        # The footer is the last third of a shard of 90 rows; a journal is as long as the rows.
        crash(box, f"{kind}:{rng.randrange(1, size if kind == 'shard_bytes' else size // 3)}", found)
        assert not list((box.output / "data").iterdir())
        box.finish(found)


@pytest.mark.parametrize("point", [*OF_OVERWRITE, pytest.param("plan_ready", marks=pytest.mark.torture)])
@pytest.mark.parametrize("is_done", [True, pytest.param(False, marks=pytest.mark.torture)])
def test_a_crash_while_a_run_is_moved_aside(point: str, is_done: bool, tmp_path: Path, found: Found) -> None:
    """Fault 2: SIGKILL while resume=overwrite moves the old run away: it is whole in old/, and the new one is whole."""
    box = Box(tmp_path / "box", 90, shard_rows=40)
    if is_done:
        box.run()
    else:
        crash(box, "shard_published", found)
    answers = {path.name: path.read_bytes() for path in (box.output / "data").iterdir()}
    box.words[box.words.index("write.response_column=response")] = "write.response_column=says"
    box.words.append("resume=overwrite")
    box.response_column = "says"
    process = box.start(crash_at=point)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == KILLED, printed
    found.num_faults += 1
    box.log.unlink()
    box.finish(found)
    [old] = (box.output / "old").glob("*/data")
    assert {path.name: path.read_bytes() for path in old.iterdir()} == answers
    assert not (old.parent / "moving").exists()


@pytest.mark.parametrize("is_done", [True, pytest.param(False, marks=pytest.mark.torture)])
def test_a_crash_while_the_input_is_extended(is_done: bool, tmp_path: Path, found: Found) -> None:
    """Fault 2: SIGKILL while resume=extend takes in new files: the plan is the old one or the new one."""
    box = Box(tmp_path / "box", 80, shard_rows=40)
    if is_done:
        box.run()
    else:
        crash(box, "shard_published", found)
    answers = {path.name: path.read_bytes() for path in (box.output / "data").iterdir()}
    box.grow(50)
    box.words.append("resume=extend")
    crash(box, "inputs_extended", found)
    crash(box, "inputs_extended", found)
    box.finish(found)
    assert len(list((box.output / "data").iterdir())) == 4
    assert answers.items() <= {path.name: path.read_bytes() for path in (box.output / "data").iterdir()}.items()


RETRY_POINTS = (*OF_RETRY, "claim_taken", "journal_created", "journal_appended", "shard_checked", "shard_settled")


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in OF_RETRY else pytest.mark.torture) for point in RETRY_POINTS]
)
def test_a_crash_of_a_retry(point: str, tmp_path: Path, found: Found) -> None:
    """Fault 2: SIGKILL at each named point of a retry; answers that were there stay."""
    box = Box(tmp_path / "box", 120, shard_rows=40)
    box.run()
    answered = {path.name: path.read_bytes() for path in (box.output / "data").iterdir()}
    box.mend()
    crash(box, point, found, command="retry")
    assert sorted(path.name for path in (box.output / "data").iterdir()) == sorted(answered)
    box.run(command="retry")
    box.check_always()
    rows = pq.read_table(box.output / "data").to_pylist()
    assert {row["id"] for row in rows if row["attempt"] > 1 and row["status"] == "ok"} == box.mended.keys()
    assert len(rows) == box.num_rows
    box.run()  # finishes what the retry left: nothing but work/
    assert not (box.output / "work").exists()
