"""`vlm-batch status watch=true` in a terminal of its own, and through a pipe."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import CHECKOUT, CommandLine
from heartbeats import heartbeat
from small_run import finished_run, new_ledger, new_plan, tree, work
from terminal import Session

from pipeline.errors import RunFailed
from pipeline.watch import command as command_module
from pipeline.watch.command import watch

LEFT = b"\x1b[?1049l"  # the other screen of the terminal
CURSOR = b"\x1b[?25h"


def watching(folder: Path, *words: str, **terminal: int | str) -> Session:
    return Session(sys.executable, "-m", "pipeline", "status", "watch=true", f"output_dir={folder}", *words, **terminal)  # type: ignore[arg-type]


def assert_restored(session: Session) -> None:
    assert session.written.rindex(LEFT) > session.written.rindex(b"\x1b[?1049h")
    assert session.written.rindex(CURSOR) > session.written.rindex(b"\x1b[?25l")
    assert session.modes_now == session.modes


def test_a_run_that_ends_while_it_is_watched(tmp_path: Path) -> None:
    """The window grows narrow meanwhile; keys are not echoed; at the end the terminal has the last figures."""
    plan = new_plan(tmp_path, 6)
    ledger = new_ledger(tmp_path, plan)
    work(ledger, plan, plan.shard(0))
    heartbeat(tmp_path, plan.plan_id, 0)
    with watching(tmp_path) as session:
        lines = session.wait_for("1 at work")
        assert "running, 1 min" in lines[0]
        assert "rows     3 of 6 done" in lines and session.modes_now != session.modes
        session.press(b"zzz")
        session.resize(60, 16)
        session.wait_until(lambda: session.lines()[15].startswith("q or") and "running" in session.lines()[0])
        narrow = session.lines()
        assert "rank  state    rows/s  heard of" in narrow and not any("zzz" in line for line in narrow)
        work(ledger, plan, plan.shard(1))
        heartbeat(tmp_path, plan.plan_id, 0, state="done")
        ledger.close()
        assert session.ended() == 0
        assert_restored(session)
        end = session.written[session.written.rindex(LEFT) :].decode()
        assert "rows     6 of 6 done (100.0%)" in end and "state    done" in end
        assert "q or Ctrl-C" not in end and "workers" not in end


@pytest.mark.parametrize(
    ("how", "code"), [(b"q", 0), (b"\x03", 0), (signal.SIGTERM, 128 + signal.SIGTERM)], ids=["q", "Ctrl-C", "SIGTERM"]
)
def test_a_look_that_is_ended_leaves_the_terminal_and_the_run_as_they_were(
    tmp_path: Path, how: bytes | int, code: int
) -> None:
    plan = new_plan(tmp_path, 6)
    heartbeat(tmp_path, plan.plan_id, 0)
    before = tree(tmp_path)
    with watching(tmp_path) as session:
        session.wait_for("1 at work")
        if isinstance(how, bytes):
            session.press(how)
        else:
            session.signal(how)
        assert session.ended() == code
        assert_restored(session)
        said = session.written[session.written.rindex(LEFT) + len(LEFT) :]
        assert b"Traceback" not in session.written and said.strip(b"\r\n") in (b"", CURSOR, b"^C")
    assert tree(tmp_path) == before


def test_ctrl_z_leaves_the_screen_and_fg_comes_back_to_it(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    heartbeat(tmp_path, plan.plan_id, 0)
    look = shlex.join([sys.executable, "-m", "pipeline", "status", "watch=true", f"output_dir={tmp_path}"])
    with Session("bash", "--norc", "-m", "-c", f"{look}; fg") as session:
        session.wait_for("1 at work")
        session.press(b"\x1a")
        session.wait_until(lambda: session.written.count(b"\x1b[?1049h") == 2)
        stopped = session.written.index(b"Stopped")
        assert session.written.index(LEFT) < stopped < session.written.rindex(b"\x1b[?1049h")
        session.press(b"q")
        assert session.ended() == 0
        assert_restored(session)


def test_nobody_at_work_for_long_ends_the_look_with_1(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    heartbeat(tmp_path, plan.plan_id, 0, updated=time.time() - 3600)
    with watching(tmp_path, "idle_seconds=0") as session:
        assert session.ended() == 1
        said = session.written[session.written.rindex(LEFT) :].decode().replace("\r\n", " ")
        assert "rows     0 of 6 done (0.0%)" in said
        assert "vlm-batch: nobody has been at work for 0 s (idle_seconds), and the run is not done" in said


def test_a_pipe_or_a_dumb_terminal_has_plain_lines(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 6)
    words = [sys.executable, "-m", "pipeline", "status", "watch=true", f"output_dir={tmp_path}"]
    piped = subprocess.run([*words, "idle_seconds=0"], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert piped.returncode == 1 and piped.stderr.startswith("vlm-batch: nobody has been at work")
    assert piped.stdout.splitlines()[0] == f"folder   {tmp_path}" and "\x1b" not in piped.stdout
    assert piped.stdout.count("folder") == 1
    heartbeat(tmp_path, plan.plan_id, 0)
    with watching(tmp_path, term="dumb") as session:
        session.wait_for("running, 1 worker, 2.0 rows/s")
        session.press(b"\x03")
        assert session.ended() == 0
        assert b"\x1b" not in session.written and b"Traceback" not in session.written


def test_a_finished_run_is_said_once_and_ends_the_look(tmp_path: Path, vlm_batch: CommandLine) -> None:
    finished_run(tmp_path / "run")
    done = vlm_batch("status", "watch=true", f"output_dir={tmp_path / 'run'}")
    assert done.stdout.count("state    done") == 1 and done.stderr == ""


def test_error_rows_that_are_asked_again_are_watched_until_their_workers_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A retry has all its shards from the beginning."""
    plan = finished_run(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 0)
    waits = []

    def pass_time(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            heartbeat(tmp_path, plan.plan_id, 0, state="done")

    monkeypatch.setattr("pipeline.watch.views.time.sleep", pass_time)
    watch(tmp_path, idle_seconds=0)
    assert waits == [5.0, 5.0] and capsys.readouterr().out.count("folder") == 3


def test_a_run_is_looked_at_as_often_as_its_workers_are_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On an object store each heartbeat is a request, and each look some."""
    new_plan(tmp_path, 6)
    waits: list[float] = []
    monkeypatch.setattr("pipeline.watch.views.time.sleep", waits.append)
    monkeypatch.setattr(command_module, "heartbeat_seconds", lambda place: 30.0)
    with pytest.raises(RunFailed, match="nobody has been at work"):
        watch(tmp_path, idle_seconds=0.05)
    assert set(waits) == {30.0} and capsys.readouterr().out.startswith("folder")
