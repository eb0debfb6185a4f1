"""cluster=gpus on a CPU: several processes answer what one answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_line import CHECKOUT, CommandLine, wait_for_journal

from pipeline.cluster.gpus import listed_gpus, visible_gpus
from pipeline.errors import UsageError
from pipeline.ranks import Ranks, num_own_cores, ranks_given

JOB = ("run", "dataset.max_rows=300", "write.shard_rows=20", "write.sync_seconds=0.1")
CREW = ("cluster=gpus", "cluster.workers=2")
TIMELESS = ["id", "row_index", "row_key", "status", "prompt", "response", "finish_reason", "num_generated_tokens"]


def answers(output_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output_dir / "data", columns=TIMELESS).to_pylist()
    return rows


def test_what_nvidia_smi_lists() -> None:
    listing = (
        "GPU 0: NVIDIA H200 (UUID: GPU-aaaa)\n"
        "  MIG 3g.71gb     Device  0: (UUID: MIG-1111)\n"
        "  MIG 3g.71gb     Device  1: (UUID: MIG-2222)\n"
        "GPU 1: NVIDIA H200 (UUID: GPU-bbbb)\n"
        "GPU 2: NVIDIA H200 (UUID: GPU-cccc)\n"
    )
    assert listed_gpus(listing) == ["MIG-1111", "MIG-2222", "GPU-bbbb", "GPU-cccc"]
    assert listed_gpus("No devices were found\n") == []


@pytest.mark.parametrize(
    ("given", "wanted"), [("0,1", ["0", "1"]), ("", []), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("2,-1,3", ["2"])]
)
def test_what_the_environment_lets_us_see(given: str, wanted: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": given}) == wanted


def test_nvidia_smi_is_asked_where_the_environment_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: GPU-a)'\n")
    program.chmod(0o755)
    assert visible_gpus({}) == ["GPU-a"]
    program.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert visible_gpus({}) == []


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, None),
        ({"RANK": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Ranks(1, 4, 1, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Ranks(5, 8, 1, 4)),
    ],
)
def test_ranks_of_the_environment(environment: Mapping[str, str], wanted: Ranks | None) -> None:
    assert ranks_given(environment) == wanted
    assert wanted is None or "LOCAL_WORLD_SIZE" not in environment or wanted.environment == environment


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
    ],
)
def test_ranks_that_cannot_be(environment: Mapping[str, str]) -> None:
    with pytest.raises(UsageError, match="in the environment: expected"):
        ranks_given(environment)


def test_processes_of_one_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert num_own_cores() == 8
    for name, value in Ranks(1, 3, 1, 3).environment.items():
        monkeypatch.setenv(name, value)
    assert num_own_cores() == 2


def test_without_a_gpu_it_says_what_to_do(vlm_batch: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = vlm_batch(*JOB, "cluster=gpus", code=2).stderr
    assert "no GPU is visible" in said and "cluster.workers=N" in said


def test_wrong_settings_are_said_once_and_before_any_process_starts(vlm_batch: CommandLine) -> None:
    said = vlm_batch(*JOB, *CREW, "vlm=auto", "vlm.path=nowhere", code=1).stderr
    assert said.count("vlm-batch: ") == said.count("not a folder here") == 1 and "[0]" not in said


@pytest.mark.slow
def test_two_processes_answer_what_one_answers(vlm_batch: CommandLine, tmp_path: Path) -> None:
    vlm_batch(*JOB, "output_dir=one")
    said = vlm_batch(*JOB, *CREW, "output_dir=two")
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    assert said.stdout.count("rows     300 of 300 done") == 1 and "2 workers" in said.stdout
    assert len(list((tmp_path / "two" / "stats").glob("worker-*.json"))) == 2
    assert "[1] " not in said.stderr, "what both do alike is said by one"
    assert "no model was loaded" in vlm_batch(*JOB, *CREW, "output_dir=two").stdout


@pytest.mark.slow
def test_the_shards_of_a_killed_process_are_done_in_the_same_run(vlm_batch: CommandLine, tmp_path: Path) -> None:
    vlm_batch(*JOB, "output_dir=one")
    words = [sys.executable, "-m", "pipeline", *JOB, *CREW, "engine.max_batch_rows=4", "output_dir=two"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_journal(tmp_path / "two", process)
    os.kill(worker_pid(process.pid, rank=1), signal.SIGKILL)
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "worker 1 was ended by SIGKILL; it is started again" in said
    assert "rows     300 of 300 done" in printed
    assert answers(tmp_path / "two") == answers(tmp_path / "one")


@pytest.mark.slow
def test_a_stopped_crew_goes_on_as_one(vlm_batch: CommandLine, tmp_path: Path) -> None:
    vlm_batch(*JOB, "output_dir=one")
    words = [sys.executable, "-m", "pipeline", *JOB, *CREW, "engine.max_batch_rows=4", "output_dir=two"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_journal(tmp_path / "two", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75 and said.count("Run the same command again") >= 1, said
    vlm_batch(*JOB, "output_dir=two")
    assert answers(tmp_path / "two") == answers(tmp_path / "one")


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "-m"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--module",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_another_launcher(launcher: str, vlm_batch: CommandLine, tmp_path: Path) -> None:
    vlm_batch(*JOB, "output_dir=one")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "pipeline", *JOB, "output_dir=two"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    assert done.stdout.count("rows     300 of 300 done") == 1, "one speaks for all"
    ranks = {path.name.split("-")[1] for path in (tmp_path / "two" / "stats").glob("worker-*.json")}
    assert ranks == {"0", "1"}


def worker_pid(parent: int, rank: int) -> int:
    """The process of a rank among the children of a crew."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _is_worker(int(entry), parent, rank):
                return int(entry)
        time.sleep(0.05)
    raise AssertionError("no such process")


def _is_worker(pid: int, parent: int, rank: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return int(status[1]) == parent and f"RANK={rank}".encode() in environment
