"""Several processes on one host, and who looks after them: some die, all die, somebody stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import crews
import pytest

from pipeline.cluster import crew as crew_module
from pipeline.cluster.crew import Crew
from pipeline.errors import RunFailed, UsageError

Work = Callable[[Path, int, int], None]


def crew(work: Work, folder: Path, num_workers: int = 2, gpus: tuple[str, ...] = ()) -> Crew:
    return Crew(partial(work, folder), num_workers, gpus)


def test_each_process_knows_its_rank_and_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    crew(crews.tells, tmp_path, 3, ("GPU-a", "GPU-b")).run()
    told = [(tmp_path / f"{rank}.told").read_text() for rank in range(3)]
    assert told == ["0 3 0 3 GPU-a 0/3", "1 3 1 3 GPU-b 1/3", "2 3 2 3 GPU-a 2/3"]
    assert "RANK" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ
    crew(crews.tells, tmp_path, 1).run()
    assert (tmp_path / "0.told").read_text() == "0 1 0 1 - 0/1"


def test_a_killed_process_is_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    crew(crews.is_killed_once, tmp_path).run()
    assert (tmp_path / "0.started").stat().st_size == 2
    assert "worker 0 was ended by SIGKILL; it is started again (1 of 16 times)" in caplog.text


def test_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "_MAX_RESTARTS", 1)
    with pytest.raises(RunFailed, match="no worker is left: worker 0 was ended by SIGKILL; worker 1 was ended by SIGK"):
        crew(crews.always_killed, tmp_path).run()
    assert [(tmp_path / f"{rank}.started").stat().st_size for rank in (0, 1)] == [2, 2]


def test_one_that_ends_in_good_order_speaks_for_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    crew(crews.one_fails, tmp_path).run()
    assert "worker 1 ended with exit code 1; what it left was done by others" in caplog.text


def test_what_all_say_of_the_settings_is_an_error_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The reason stands above"):
        crew(crews.all_misused, tmp_path).run()
    with pytest.raises(RunFailed, match="worker 0 ended with exit code 2; worker 1 ended with exit code 1"):
        crew(crews.all_fail, tmp_path).run()


@contextmanager
def started(work: Work, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A crew of two in a process of its own, in a group of its own, once both are at work."""
    words = [sys.executable, crews.__file__, work.__name__, str(folder)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(folder, "started", process)
        yield process
    finally:
        with_group(process, signal.SIGKILL)
        process.communicate()


def wait_for(folder: Path, word: str, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / f"{rank}.{word}").exists() for rank in (0, 1)):
        assert process is None or process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, f"never {word}"
        time.sleep(0.02)


def with_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("to", ["the parent", "the group"])
def test_a_signal_reaches_all_and_is_said_once(number: signal.Signals, to: str, tmp_path: Path) -> None:
    if number == signal.SIGUSR1 and to == "the group":
        pytest.skip("these processes listen to two signals")
    with started(crews.waits, tmp_path) as process:
        process.send_signal(number) if to == "the parent" else with_group(process, number)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 75
    assert said.count("Run the same command again") == 1 and "Traceback" not in said
    wait_for(tmp_path, "stopped")


def test_processes_follow_a_parent_that_was_killed(tmp_path: Path) -> None:
    with started(crews.waits, tmp_path) as process:
        process.kill()
        wait_for(tmp_path, "stopped")


def test_the_third_interrupt_ends_at_once(tmp_path: Path) -> None:
    with started(crews.hangs, tmp_path) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        process.wait(timeout=10)
    assert process.returncode == 75
