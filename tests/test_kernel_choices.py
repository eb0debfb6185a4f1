"""Kernels are timed once for a run: every later start on such a machine takes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RunFailed
from pipeline.kernel_choices import KernelChoices

# A start whose timing would find this kernel the fastest.
_START = """
import sys
from pipeline.vlm.slots import speedups
speedups.fastest = lambda *args, **kwargs: sys.argv[1]
from pipeline.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def names(text: str) -> str:
    """What a choice is read by: these words alone."""
    return {"matmul": "products", "sdpa": "torch"}[text]


def unwanted() -> str:
    raise AssertionError("timed anew")


def test_a_choice_is_made_once_for_all_starts(tmp_path: Path) -> None:
    assert KernelChoices(tmp_path)("decode: cpu", lambda: "matmul", names) == "products"
    assert KernelChoices(tmp_path)("decode: cpu", unwanted, names) == "products"
    assert KernelChoices(tmp_path)("decode: gpu", lambda: "sdpa", names) == "torch"  # another machine
    kept = [json.loads(path.read_text()) for path in (tmp_path / "plan").iterdir()]
    assert {one["for"]: one["chosen"] for one in kept} == {"decode: cpu": "matmul", "decode: gpu": "sdpa"}
    assert not list((tmp_path / "work").iterdir())


def test_of_two_starts_at_once_both_take_the_choice_of_the_first(tmp_path: Path) -> None:
    def late() -> str:
        assert KernelChoices(tmp_path)("decode: cpu", lambda: "matmul", names) == "products"
        return "sdpa"

    assert KernelChoices(tmp_path)("decode: cpu", late, names) == "products"


def test_a_choice_that_cannot_be_made_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="timed anew"):
        KernelChoices(tmp_path)("decode: cpu", unwanted, names)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '"matmul"', '{"for": "decode: cpu", "chosen": "mat"}'])
def test_a_damaged_choice_stops_the_run_and_is_named(content: str, tmp_path: Path) -> None:
    KernelChoices(tmp_path)("decode: cpu", lambda: "matmul", names)
    [path] = (tmp_path / "plan").iterdir()
    path.write_text(content)
    with pytest.raises(RunFailed, match=r"kernels-[0-9a-f]{12}\.json should say what was chosen for decode: cpu"):
        KernelChoices(tmp_path)("decode: cpu", unwanted, names)


def test_a_choice_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("a file where the folder should be")
    with pytest.raises(RunFailed, match="cannot be written"):
        KernelChoices(tmp_path)("decode: cpu", lambda: "matmul", names)


@pytest.mark.slow
def test_a_later_start_of_a_run_has_the_kernels_of_the_first(tmp_path: Path) -> None:
    """Half of the rows by a start that finds matrix products the fastest, the rest by one that would find SDPA so."""
    for kernel, num_rows in (("matmul", 20), ("sdpa", 40)):
        options = [f"dataset.max_rows={num_rows}", "write.shard_rows=20", "output_dir=answers", "resume=extend"]
        done = subprocess.run(
            [sys.executable, "-c", _START, kernel, "run", *options], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "matmul attends in decode steps" in done.stderr + done.stdout
    [numerics] = json.loads((tmp_path / "answers" / "manifest.json").read_text())["numerics"]
    assert (numerics["num_shards"], numerics["decode_attention"]) == (2, "matmul")
