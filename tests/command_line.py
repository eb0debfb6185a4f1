"""The command line as tests start it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]


def wait_for_journal(output_dir: Path, process: subprocess.Popen[str]) -> None:
    """Until the first answers are on disk."""
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 1000 for path in (output_dir / "work").glob("*.journal")):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline, "no answer within two minutes"
        time.sleep(0.05)
