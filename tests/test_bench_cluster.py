"""The benchmark of several workers runs, and measures what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
pytest.importorskip("psutil", reason="the benchmark watches processes with psutil (extra dev)")


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_a_target_may_be_met_exactly() -> None:
    from bench_figure import Sizes, compared

    assert compared("end / ideal", "x", [1.3], "<= 1.3", Sizes()).passed is True
    assert compared("end / ideal", "x", [1.31], "<= 1.3", Sizes()).passed is False


def test_a_rank_stays_on_its_core_with_all_that_it_starts(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, threading; from bench_pinned import on_one_core\n"
        "cores = sorted(os.sched_getaffinity(0))\n"
        "def work(rank, world):\n"
        "    print(os.sched_getaffinity(0) == {cores[rank % len(cores)]})\n"
        "    thread = threading.Thread(target=lambda: print(len(os.sched_getaffinity(0))))\n"
        "    thread.start(); thread.join()\n"
        "    subprocess.run([sys.executable, '-c', 'import os; print(len(os.sched_getaffinity(0)))'])\n"
        "on_one_core(work, cores, 1, 2)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{SCRIPTS}{os.pathsep}{SCRIPTS.parent}", "PYTHONUNBUFFERED": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.split() == ["True", "1", "1"]


@pytest.mark.slow
def test_all_of_it_runs_on_few_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_cluster.py"), "--quick", "--output", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    content = json.loads((tmp_path / "bench_cluster.json").read_text())
    figures = {figure["name"]: figure for figure in content["figures"]}
    assert figures["one of 8 ten times slower: end / ideal"]["median"] >= 1.0
    assert figures["8 workers alike: end / ideal"]["median"] >= 1.0
    assert figures["vlm-batch status, running, 200 workers"]["median"] > 0
    if len(os.sched_getaffinity(0)) > 1:
        assert figures["two processes: whole command"]["median"] > 0
    assert (tmp_path / "bench_cluster.md").read_text() == found.stdout
