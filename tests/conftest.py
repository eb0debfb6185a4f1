"""What tests share: the command line as a user starts it, and the demo's rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHECKOUT = Path(__file__).resolve().parents[1]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def vlm_batch(tmp_path: Path) -> CommandLine:
    """Run `vlm-batch WORDS` in an empty folder; check the exit code."""

    def call(*words: str, code: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *words], cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


def wait_for_journal(output_dir: Path, process: subprocess.Popen[str]) -> None:
    """Until the first answers are on disk."""
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 1000 for path in (output_dir / "work").glob("*.journal")):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline, "no answer within two minutes"
        time.sleep(0.05)
