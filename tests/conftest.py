"""What tests share: the command line as a user starts it, and the demo's rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, Browser, opened_browser
from command_line import CommandLine

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def vlm_batch(tmp_path: Path) -> CommandLine:
    """Run `vlm-batch WORDS` in an empty folder; check the exit code. Without a report, which takes seconds to draw,
    unless the words ask for it."""

    def call(*words: str, code: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        if words[:1] in (("run",), ("retry",)) and not any(word.startswith("report=") for word in words):
            words = (*words, "report=false")
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *words], cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One for all tests that look at pages."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason="needs selenium: make setup")
    with opened_browser() as found:
        yield found
