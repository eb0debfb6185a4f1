"""cluster=slurm: what is submitted, what a member does when it is stopped, and what is said of one that fails.

Where no Slurm is here, its commands are small scripts that write down how they were called.
"""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import slurm_member
from command_line import CommandLine
from slurm_node import job_of, needs_slurm, states, wait_until

from pipeline.cluster import slurm
from pipeline.cluster.base import Job
from pipeline.cluster.slurm import SlurmConfig, is_member, script_words
from pipeline.cluster.slurm_queue import QueuedArray
from pipeline.compose import compose
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.ranks import num_own_cores

COMMAND = ("/usr/bin/python3", "-m", "pipeline", "run", "prompt.user=What's in it?", "output_dir=out")
Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Put a script in the place of a command of Slurm; it writes its words to tmp_path/NAME.called first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, body: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/{name}.called"\n{body}\n')
        (folder / name).chmod(0o755)

    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        write(name, "exit 0")
    write("sbatch", 'cp "$1" "$0.script"; env >"$0.environment"; echo "Submitted batch job 7"')
    return write


def job(*, left: bool = True, wait: bool = False, output_dir: str = "out") -> Job:
    return Job(lambda: left, print, output_dir, command=COMMAND, wait=wait, progress=lambda: "3 of 4 rows")


def called(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / f"{name}.called"
    return path.read_text().splitlines() if path.exists() else []


def script(tmp_path: Path) -> list[str]:
    return (tmp_path / "bin" / "sbatch.script").read_text().splitlines()


def options(**settings: Any) -> dict[str, Any]:
    return SlurmConfig(**settings).sbatch_options("some where/out", Path("/logs"))


def test_every_key_reaches_sbatch_under_its_name() -> None:
    words = [
        "cluster=slurm", "cluster.workers=8", "cluster.partition=gpu", "cluster.account=me", "cluster.constraint=a|b",
        "cluster.qos=low", "cluster.time=1-12:00:00", "cluster.gpus=a100:1", "cluster.cpus=6", "cluster.mem=64G",
        "cluster.max_running=3", "cluster.signal_seconds=300", "cluster.extra.exclude=node7",
        "cluster.extra.no_kill=true", "cluster.extra.nice=null",
    ]  # fmt: skip
    config = compose(words).config.cluster
    assert isinstance(config, SlurmConfig)
    assert config.sbatch_options("some where/out 1", Path("/logs")) == {
        "array": "0-7%3",
        "job_name": "vlm-batch-out-1",
        "nodes": 1,
        "ntasks": 1,
        "signal": "B:USR1@300",
        "requeue": True,
        "open-mode": "append",
        "output": "/logs/%A_%a.log",
        "partition": "gpu",
        "account": "me",
        "constraint": "a|b",
        "qos": "low",
        "time": "1-12:00:00",
        "gres": "gpu:a100:1",
        "cpus-per-task": 6,
        "mem": "64G",
        "exclude": "node7",
        "no-kill": True,
    }


def test_what_is_not_set_is_left_to_slurm() -> None:
    assert options().keys() == {
        "array", "job_name", "nodes", "ntasks", "signal", "requeue", "open-mode", "output",
    }  # fmt: skip
    assert options()["array"] == "0-1"


@pytest.mark.parametrize("extra", ["array", "open-mode", "no_requeue", "partition", "cpus_per_task", "job-name"])
def test_extra_options_that_the_program_sets_itself_are_refused(extra: str) -> None:
    with pytest.raises(UsageError, match=f"cluster.extra.{extra.replace('_', '-')}"):
        options(extra={extra: "x"})


def test_an_option_adds_no_line_to_the_script() -> None:
    with pytest.raises(UsageError, match="expected one line"):
        options(mem="64G\nrm -r out")


def test_the_script_starts_the_command_again(
    tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lögs and scripts"
    assert SlurmConfig(folder=str(folder), setup=["module load cuda"], mem="2G").launch(job()) is False
    lines = script(tmp_path)
    names = [line.split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert len(names) == len(set(names)), "an option is set twice"
    assert "#SBATCH --job-name=vlm-batch-out" in lines and "#SBATCH --signal=B:USR1@120" in lines
    assert f"#SBATCH --output='{folder}/%A_%a.log'" in lines
    assert lines.index("module load cuda") < lines.index('export VLM_BATCH_MEMBER_OF="$SLURM_ARRAY_JOB_ID"')
    starts = [line for line in lines if line.startswith("exec ")]
    assert starts == ["exec /usr/bin/python3 -m pipeline run 'prompt.user=What'\"'\"'s in it?' output_dir=out"]
    assert not list(folder.rglob("*.pkl"))
    said = capsys.readouterr().out
    for words in ("job 7, 2 members", f"{folder}/7_*.log", "scancel 7", "vlm-batch status output_dir=out"):
        assert words in said


def test_the_whole_command_line_is_what_a_member_starts(
    vlm_batch: CommandLine, tmp_path: Path, program: Program
) -> None:
    said = vlm_batch("run", "cluster=slurm", "dataset.max_rows=5", "report=false", "--config-dir=.").stdout
    assert "job 7" in said and (tmp_path / "outputs/demo/plan.json").exists()
    start = f"exec {sys.executable} -m pipeline run cluster=slurm dataset.max_rows=5 report=false --config-dir=."
    assert start in script(tmp_path)


def test_a_password_in_an_address_is_written_nowhere(tmp_path: Path, program: Program) -> None:
    words = [*COMMAND, "dataset.path=https://me:pa$$word@host/a"]
    secret = Job(lambda: True, print, "out", command=words)
    SlurmConfig(folder=str(tmp_path / "logs")).launch(secret)
    for path in (tmp_path / "logs").rglob("*"):
        assert "pa$$word" not in path.read_text()
    assert (
        "VLM_BATCH_WORD_6=dataset.path=https://me:pa$$word@host/a"
        in (tmp_path / "bin" / "sbatch.environment").read_text()
    )
    quoted, secrets = script_words(words)
    assert not secrets.keys() & os.environ.keys()
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {' '.join(quoted)}"], env=secrets, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == words
    missing = subprocess.run(["bash", "-c", f"echo {' '.join(quoted)}"], env={}, capture_output=True, text=True)
    assert missing.returncode != 0 and "environment of sbatch" in missing.stderr


def test_nothing_is_submitted_where_nothing_is_left(tmp_path: Path, program: Program) -> None:
    assert SlurmConfig(folder=str(tmp_path)).launch(job(left=False)) is True
    assert called(tmp_path, "sbatch") == []


def test_wrong_settings_are_said_before_anything_is_submitted(
    vlm_batch: CommandLine, tmp_path: Path, program: Program
) -> None:
    said = vlm_batch("run", "cluster=slurm", "vlm=auto", "vlm.path=nowhere", code=1).stderr
    assert "not a folder here" in said and called(tmp_path, "sbatch") == []


def test_a_job_that_slurm_refuses(tmp_path: Path, program: Program) -> None:
    program("sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    with pytest.raises(UsageError, match=r"sbatch refuses the job: .*invalid partition specified: gpuu"):
        SlurmConfig(folder=str(tmp_path), partition="gpuu").launch(job())


def test_without_slurm_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"there is no sbatch here\. Run it where jobs are submitted"):
        SlurmConfig(folder=str(tmp_path)).launch(job())


def test_without_submitit_it_names_the_extra(tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "submitit":
            raise ImportError(name)
        return find(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r"pip install 'vlm-batch\[slurm\]'"):
        SlurmConfig(folder=str(tmp_path)).launch(job())


def test_logs_need_a_folder() -> None:
    with pytest.raises(UsageError, match=r"Set cluster\.folder"):
        SlurmConfig().log_folder("s3://bucket/out")
    assert SlurmConfig(folder="/logs").log_folder("s3://bucket/out") == Path("/logs")
    assert SlurmConfig().log_folder("out") == Path.cwd() / "out" / "slurm"
    with pytest.raises(UsageError, match="without %"):
        SlurmConfig().log_folder("100%")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "_LINE_SECONDS", 0.0)


STATES = """
if [ ! -e "$0.1" ]; then touch "$0.1"; echo '7_0|PENDING|Resources'; echo '7_1|PENDING|Resources'
elif [ ! -e "$0.2" ]; then touch "$0.2"; echo 'no answer' >&2; exit 1
elif [ ! -e "$0.3" ]; then touch "$0.3"; echo '7_0|RUNNING|None'; echo '7_1|PENDING|Resources'
else echo '7_0|{0}|None'; echo '7_1|{1}|None'; fi
"""


@pytest.mark.usefixtures("impatient")
def test_following_says_how_far_it_is(
    tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    program("squeue", STATES.replace("{0}", "COMPLETED").replace("{1}", "CANCELLED"))
    assert SlurmConfig(folder=str(tmp_path / "logs")).launch(job(wait=True)) is True
    said = capsys.readouterr().out
    assert "7: 2 pending (Resources); 3 of 4 rows" in said
    assert "7: 1 running, 1 pending (Resources); 3 of 4 rows" in said
    assert "squeue cannot be asked now (no answer)" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_members_that_are_not_needed_any_more_leave_the_queue(tmp_path: Path, program: Program) -> None:
    program("squeue", 'echo "7_0|COMPLETED|None"; if [ -e "$0.2" ]; then echo "7_1|CANCELLED|None"; '
                      'else touch "$0.2"; echo "7_1|PENDING|Resources"; fi')  # fmt: skip
    SlurmConfig(folder=str(tmp_path / "logs")).launch(job(wait=True))
    assert called(tmp_path, "scancel") == ["--state=PENDING 7"]


@pytest.mark.usefixtures("impatient")
def test_following_ends_with_the_log_of_a_member_that_failed(tmp_path: Path, program: Program) -> None:
    program("squeue", STATES.replace("{0}", "CANCELLED").replace("{1}", "FAILED"))
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "7_0.log").write_text("cancelled\n")
    (logs / "7_1.log").write_text("a line\n" * 50 + "vlm-batch: the disk is full\n")
    with pytest.raises(RunFailed) as failed:
        SlurmConfig(folder=str(logs)).launch(job(wait=True))
    said = str(failed.value)
    assert "rows are missing: 7_0 CANCELLED, 7_1 FAILED" in said and f"{logs}/7_0.log" in said
    assert "The end of 7_1.log:" in said and said.endswith("  vlm-batch: the disk is full")
    assert said.count("a line") < 20


@pytest.mark.usefixtures("impatient")
def test_a_job_that_slurm_has_forgotten_is_one_that_has_ended(tmp_path: Path, program: Program) -> None:
    program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert SlurmConfig(folder=str(tmp_path)).launch(Job(iter([True, False]).__next__, print, "out", wait=True)) is True
    with pytest.raises(RunFailed, match=r"7_0 ended, 7_1 ended.*no member has begun"):
        SlurmConfig(folder=str(tmp_path)).launch(job(wait=True))


@pytest.mark.usefixtures("impatient")
def test_whoever_stops_waiting_stops_nothing_else(tmp_path: Path, program: Program) -> None:
    # It interrupts once it is waited for: before that subprocess itself would lose sight of it.
    program("squeue", "sleep 0.5; echo '7_0|RUNNING|None'; kill -INT $PPID")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(Interrupted, match=r"job 7 goes on\. 'scancel 7' ends it"):
            SlurmConfig(folder=str(tmp_path)).launch(job(wait=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert called(tmp_path, "scancel") == []


def test_states_are_counted() -> None:
    array = QueuedArray("7", 3)
    array.members["7_1"].state = "RUNNING"
    assert array.states() == "2 pending, 1 running" and not array.ended


def test_a_member_is_one_of_a_job_of_ours() -> None:
    assert is_member({"VLM_BATCH_MEMBER_OF": "7", "SLURM_ARRAY_JOB_ID": "7"})
    assert not is_member({"SLURM_ARRAY_JOB_ID": "7"}), "somebody's own script"
    assert not is_member({"VLM_BATCH_MEMBER_OF": "7", "SLURM_ARRAY_JOB_ID": "8"}), "submitted from within a member"
    assert not is_member({})


@contextmanager
def member(work: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Task 1 of array job 7 at work, in a group of its own."""
    words = [sys.executable, slurm_member.__file__, work, str(folder)]
    given = {"VLM_BATCH_MEMBER_OF": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "9"}
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | given | environment
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def stopped(process: subprocess.Popen[str], folder: Path, *numbers: signal.Signals) -> str:
    """What it says when these signals come, one after the other."""
    wait_until(lambda: (folder / "1.started").exists() or process.poll() is not None, "the start")
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    return process.communicate(timeout=60)[1]


def test_a_member_knows_its_rank(tmp_path: Path) -> None:
    with member("tells", tmp_path, CUDA_VISIBLE_DEVICES="GPU-a") as process:
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "1.told").read_text() == "1 3 0 1 GPU-a 1/3"


def test_a_member_that_is_warned_queues_itself_again(tmp_path: Path, program: Program) -> None:
    with member("waits", tmp_path) as process:
        said = stopped(process, tmp_path, signal.SIGUSR1)
    assert process.returncode == 75 and "7_1 is in the queue again" in said
    assert called(tmp_path, "scontrol") == ["requeue 7_1"]
    assert (tmp_path / "1.stopped").exists(), "the work did not end in good order"


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)])
def test_a_member_that_slurm_ends_does_not_come_back(
    numbers: tuple[signal.Signals, ...], tmp_path: Path, program: Program
) -> None:
    with member("stops_slowly", tmp_path) as process:
        stopped(process, tmp_path, *numbers)
    assert process.returncode == 75 and called(tmp_path, "scontrol") == []


def test_a_signal_while_it_is_queued_again_changes_nothing(tmp_path: Path, program: Program) -> None:
    program("scontrol", f"kill -TERM $PPID; kill -TERM $$; kill -USR1 $PPID; sleep 0.2; touch {tmp_path}/queued")
    with member("waits", tmp_path) as process:
        said = stopped(process, tmp_path, signal.SIGUSR1)
    assert process.returncode == 75 and "in the queue again" in said and (tmp_path / "queued").exists()


def test_a_member_that_gets_nowhere_is_not_queued_for_ever(tmp_path: Path, program: Program) -> None:
    with member("waits", tmp_path, SLURM_RESTART_COUNT="3") as process:
        stopped(process, tmp_path, signal.SIGUSR1)
    assert len(called(tmp_path, "scontrol")) == 1
    (tmp_path / "1.started").unlink()
    (tmp_path / "1.signals").unlink()
    with member("waits", tmp_path, SLURM_RESTART_COUNT="4") as process:
        said = stopped(process, tmp_path, signal.SIGUSR1)
    assert process.returncode == 1 and "cluster.max_requeues" in said
    assert len(called(tmp_path, "scontrol")) == 1


def test_what_slurm_objects_to_is_said(tmp_path: Path, program: Program) -> None:
    program("scontrol", "echo 'Job is not allowed to requeue' >&2; exit 1")
    with member("waits", tmp_path) as process:
        said = stopped(process, tmp_path, signal.SIGUSR1)
    assert process.returncode == 75 and "could not be queued again (Job is not allowed to requeue)" in said


def test_a_member_whose_process_is_killed_starts_it_again(tmp_path: Path) -> None:
    with member("is_killed_once", tmp_path, SLURM_ARRAY_TASK_ID="0") as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "worker 0 was ended by SIGKILL; it is started again" in said


def test_cores_are_those_that_slurm_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert num_own_cores() == 3
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    assert num_own_cores() == 8


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_array_answers_what_one_process_answers(vlm_batch: CommandLine, tmp_path: Path) -> None:
    words = ("run", "dataset.max_rows=300", "write.shard_rows=20")
    columns = ["id", "row_index", "row_key", "status", "prompt", "response", "finish_reason", "num_generated_tokens"]
    vlm_batch(*words, "output_dir=one")
    said = vlm_batch(*words, "output_dir=many of them", "cluster=slurm", "cluster.workers=3", "wait=true", timeout=600)
    one, many = (
        pq.read_table(tmp_path / name / "data", columns=columns).to_pylist() for name in ("one", "many of them")
    )
    assert many == one
    assert "rows     300 of 300 done" in said.stdout
    assert set(states(job_of(said.stdout)).values()) <= {"COMPLETED", "CANCELLED"}
    assert "no model was loaded" in vlm_batch(*words, "output_dir=many of them", "cluster=slurm").stdout
