"""The examples run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))


def run_example(folder: Path, *command: str) -> str:
    """What it prints. The exit code has to be 0."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_in_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert len(SCRIPTS) > 5
    assert [
        path.name for path in EXAMPLES.glob("*.*") if path.suffix in (".sh", ".py") and path.name not in listed
    ] == [
        "pictures.py"  # which the others call
    ]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    assert run_example(tmp_path, "bash", str(script))


@pytest.mark.slow
def test_answers_are_read_without_us(tmp_path: Path) -> None:
    run_example(tmp_path, "bash", str(EXAMPLES / "caption_folder.sh"))
    said = run_example(tmp_path, sys.executable, str(EXAMPLES / "read_answers.py"), "outputs/captions")
    assert "num_rows: 24" in said
