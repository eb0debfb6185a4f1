"""Status and manifest: where a run stands, from its files alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import CHECKOUT
from small_run import FAULT, answer, finished_run, keys_of, new_ledger, new_plan, row, tree, work

from pipeline.errors import RunFailed, UsageError
from pipeline.manifest import conclude, write_manifest
from pipeline.status import read_status, status_lines
from pipeline.write import shard
from pipeline.write.crash_point import VARIABLE
from pipeline.write.journal import Journal, JournalHeader


def test_a_run_that_was_killed_says_what_is_done_and_how_to_go_on(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 9)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0))
    work(ledger, plan, plan.shard(2), list(keys_of(plan, plan.shard(2)))[:2])
    ledger.close()
    status = read_status(tmp_path)
    assert (status.num_published, status.num_journalled, status.num_done) == (3, 2, 5)
    assert not status.complete
    lines = list(status_lines(tmp_path, status))
    assert "rows     5 of 9 done (55.6%)" in lines
    assert "shards   1 of 3 published" in lines
    assert lines[-1] == "state    not running; the same command goes on where it stopped"


def test_a_finished_run_says_so_with_its_errors(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 3)
    ledger = new_ledger(tmp_path, plan)
    ledger.open(plan.shard(0))
    for key in keys_of(plan, plan.shard(0)):
        ledger.expect(row(key.row_index), [key], plan.shard(0))
        ledger.record(answer(key, fault=FAULT))
    ledger.close()
    lines = list(status_lines(tmp_path, read_status(tmp_path)))
    assert lines[-1] == "state    done"
    assert any("3 x decode/UnidentifiedImageError" in line for line in lines)


def test_a_run_that_ended_is_whole_though_its_folder_is_listed_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system shows new names seconds later, and opens them at once."""
    finished_run(tmp_path, 9)
    monkeypatch.setattr(shard, "shard_files", lambda data_dir: iter(()))
    assert read_status(tmp_path).num_shards_done == 0
    assert read_status(tmp_path, ended=True).complete
    conclude(tmp_path, is_retry=False)
    assert json.loads((tmp_path / "manifest.json").read_text())["num_shards"] == 3


def test_a_journal_beside_its_published_shard_counts_once(tmp_path: Path) -> None:
    """A worker that was killed between publication and tidying up left it, or one that is at the shard too."""
    plan = new_plan(tmp_path, 6)
    keys = list(keys_of(plan, plan.shard(0)))
    slow, quick = new_ledger(tmp_path, plan, "slow"), new_ledger(tmp_path, plan, "quick")
    work(slow, plan, plan.shard(0), keys[:1])
    work(quick, plan, plan.shard(0))
    slow.sync()
    assert len(list((tmp_path / "work").glob("*.journal"))) == 1
    assert read_status(tmp_path).num_done == 3
    slow.close()
    quick.close()


def test_a_journal_of_another_plan_does_not_count(tmp_path: Path) -> None:
    new_plan(tmp_path, 6)
    Journal(tmp_path / "work/part-00000.x.journal", JournalHeader("another", 0, 0)).close()
    (tmp_path / "work/part-00001.y.journal").write_bytes(b"torn")
    assert read_status(tmp_path).num_journalled == 0


def test_a_worker_that_was_heard_of_lately_is_running(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    now = time.time()
    worker = {"plan_id": plan.plan_id, "state": "running", "started": now - 60, "updated": now, "rows_per_second": 0.1}
    worker |= {"host": socket.gethostname(), "pid": os.getpid()}
    heartbeat = tmp_path / "stats/worker-0-x.json"
    heartbeat.write_text(json.dumps(worker))
    (tmp_path / "stats/worker-1-y.json").write_text(json.dumps(worker | {"plan_id": "another"}))
    (tmp_path / "stats/worker-2-z.json").write_text("{")
    assert list(status_lines(tmp_path, read_status(tmp_path)))[-1] == (
        "state    running, 1 worker, 0.1 rows/s, 1 min 00 s left"
    )
    ended = subprocess.Popen(["true"])
    ended.wait()
    for change in ({"updated": now - 3600}, {"pid": ended.pid}):  # silent for an hour; killed a moment ago
        heartbeat.write_text(json.dumps(worker | change))
        assert "not running, last heard of as 'running'" in list(status_lines(tmp_path, read_status(tmp_path)))[-1]


def heartbeat(folder: Path, plan_id: str, rank: int, **changes: object) -> None:
    worker = {"plan_id": plan_id, "rank": rank, "state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    worker |= {"started": time.time() - 60, "updated": time.time(), "num_answered": 1200, "rows_per_second": 2.0}
    (folder / f"stats/worker-{rank}-x.json").write_text(json.dumps(worker | changes))


def test_of_several_workers_each_is_named_and_of_many_the_slow_ones(tmp_path: Path) -> None:
    plan_id = new_plan(tmp_path, 6).plan_id
    heartbeat(tmp_path, plan_id, 0)
    heartbeat(tmp_path, plan_id, 1, rows_per_second=0.1)
    heartbeat(tmp_path, plan_id, 2, rows_per_second=0.0, state="loading")
    heartbeat(tmp_path, plan_id, 3, state="done")
    lines = list(status_lines(tmp_path, read_status(tmp_path)))[-4:]
    assert lines[0].startswith("state    running, 3 workers, 2.1 rows/s")
    of = f"on {socket.gethostname()}:"
    assert [re.sub(r"\d+ s ago", "ago", line) for line in lines[1:]] == [
        f"worker   0 {of} running, 1,200 rows, 2.0 rows/s, heard of ago",
        f"worker   1 {of} running, 1,200 rows, 0.1 rows/s, heard of ago, slower than most",
        f"worker   2 {of} loading, 1,200 rows, 0.0 rows/s, heard of ago",
    ]
    for rank in range(3, 20):
        heartbeat(tmp_path, plan_id, rank)
    told = [line for line in status_lines(tmp_path, read_status(tmp_path)) if line.startswith("worker")]
    assert len(told) == 1 and told[0].startswith("worker   1 ")


def test_no_run_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        read_status(tmp_path)


def test_status_needs_no_model_and_changes_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = tree(tmp_path)
    script = f"""
import sys
from pathlib import Path
from pipeline.status import read_status
assert read_status(Path({str(tmp_path)!r})).complete
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert tree(tmp_path) == before


def test_a_finished_run_gets_a_manifest_and_loses_its_work_folder(tmp_path: Path) -> None:
    finished_run(tmp_path)
    for stray in ("part-00000.dead.journal", "part-00001.dead.parquet", "part-00000.claim", "plan.json.0f.tmp"):
        (tmp_path / "work" / stray).write_bytes(b"left by a kill")
    assert write_manifest(tmp_path, read_status(tmp_path)) is True
    assert not (tmp_path / "work").exists()
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert (content["num_rows"], content["num_errors"], content["num_generated_tokens"]) == (6, 0, 18)
    assert content["numerics"] == [{"num_shards": 2, "engine": "none"}]
    assert content["settings"]["prompt.user"] == "What is it?"


def test_a_further_start_of_a_finished_run_changes_no_byte(tmp_path: Path) -> None:
    finished_run(tmp_path)
    write_manifest(tmp_path, read_status(tmp_path))
    before = tree(tmp_path)
    assert write_manifest(tmp_path, read_status(tmp_path)) is True
    assert tree(tmp_path) == before
    assert not (tmp_path / "work").exists()


def test_an_unfinished_run_has_no_manifest_and_keeps_its_journals(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0), list(keys_of(plan, plan.shard(0)))[:1])
    ledger.close()
    before = tree(tmp_path)
    assert write_manifest(tmp_path, read_status(tmp_path)) is False
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("point", "is_there"), [("manifest_ready", False), ("manifest_written", True)])
def test_a_kill_while_the_manifest_is_written(point: str, is_there: bool, tmp_path: Path) -> None:
    """Fault 5: killed while it writes the manifest: that is absent or whole, and a further start completes it."""
    finished_run(tmp_path)
    answers = tree(tmp_path / "data")
    script = f"""
from pathlib import Path
from pipeline.manifest import conclude, write_manifest
from pipeline.status import read_status
write_manifest(Path({str(tmp_path)!r}), read_status(Path({str(tmp_path)!r})))
"""
    environment = os.environ | {VARIABLE: point}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, cwd=CHECKOUT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "manifest.json").exists() == is_there
    if is_there:
        assert json.loads((tmp_path / "manifest.json").read_text())["num_rows"] == 6
    assert write_manifest(tmp_path, read_status(tmp_path)) is True
    assert json.loads((tmp_path / "manifest.json").read_text())["num_rows"] == 6
    assert not (tmp_path / "work").exists()
    assert tree(tmp_path / "data") == answers


def test_whoever_only_looks_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    """Fault 5: status and audit, killed at any moment, leave the folder of a run as it was."""
    plan = new_plan(tmp_path, 6)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0))
    work(ledger, plan, plan.shard(1), list(keys_of(plan, plan.shard(1)))[:1])
    ledger.close()
    before = tree(tmp_path)
    words = [sys.executable, "-m", "pipeline"]
    with subprocess.Popen(
        [*words, "status", "watch=true", f"output_dir={tmp_path}"], cwd=CHECKOUT, stdout=subprocess.PIPE
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith(b"folder")
        watching.kill()
    rng = random.Random(5)
    for _ in range(3):
        with subprocess.Popen(
            [*words, "audit", f"output_dir={tmp_path}"], cwd=CHECKOUT, stdout=subprocess.DEVNULL
        ) as looking:
            time.sleep(rng.uniform(0.2, 0.8))
            looking.kill()
    assert tree(tmp_path) == before


def test_notes_that_somebody_keeps_in_work_stay(tmp_path: Path) -> None:
    finished_run(tmp_path)
    (tmp_path / "work/notes.txt").write_text("mine")
    assert write_manifest(tmp_path, read_status(tmp_path)) is True
    assert (tmp_path / "work/notes.txt").read_text() == "mine"


def test_a_manifest_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    finished_run(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(RunFailed, match=r"manifest\.json cannot be written"):
        write_manifest(tmp_path, read_status(tmp_path))
