"""Every command of the documentation is known, and is run."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Block, blocks, commands
from workplace import concrete, make_workplace

from pipeline.__main__ import main

# Commands that need more than a folder, and the test that runs them.
ELSEWHERE = {
    r"vlm-batch run cluster=gpus .*": "tests/cluster/test_gpus.py::test_two_processes_answer_what_one_answers",
    r"vlm-batch run cluster=slurm .*": "tests/cluster/test_slurm.py::test_an_array_answers_what_one_process_answers",
    r"(ray job submit -- )?vlm-batch run cluster=ray .*": (
        "tests/cluster/test_ray.py::test_two_actors_answer_what_one_process_answers"
    ),
    r"(torchrun|accelerate launch) .* pipeline run .*": "tests/cluster/test_gpus.py::test_under_another_launcher",
    r"vlm-batch export .*format=hub.*": "tests/export/test_push.py::test_shards_and_card_are_pushed_in_one_commit",
    r"vlm-batch run .* track=wandb": (
        "tests/tracking/test_trackers.py::test_weights_and_biases_keeps_the_figures_in_files_without_a_network"
    ),
    r"vlm-batch (run|status) .*s3://.*": "tests/object_store/test_runs_there.py::test_pictures_and_answers_in_a_store",
}
PYTHON_ELSEWHERE = {
    "pipeline.ray_data": "tests/cluster/test_ray.py::test_a_stage_of_ray_data_answers_as_a_run_does",
    "s3://": "tests/object_store/test_runs_there.py::test_pictures_and_answers_in_a_store",
}
SETUP = r"make \w[\w-]*|pip install .*|bash \.ci/run|scripts/slurm_node\.sh \w+|git clone .*|cd .*"
STANDARD_INPUT = "What is the first digit?\n/quit\n"


def test_examples_of_python_that_need_more_are_tried_elsewhere() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for word, test in PYTHON_ELSEWHERE.items():
        file, _, function = test.partition("::")
        assert word in text and f"def {function}(" in (ROOT / file).read_text()


def elsewhere(words: Sequence[str]) -> str | None:
    line = " ".join(words)
    return next((test for pattern, test in ELSEWHERE.items() if re.fullmatch(pattern, line)), None)


def is_setup(words: Sequence[str]) -> bool:
    return re.fullmatch(SETUP, " ".join(words)) is not None


ALL = [(name, words) for page in PAGES for name, words in commands(page)]
OURS = [(name, words) for name, words in ALL if words[0] == "vlm-batch"]


def test_there_are_commands_to_check() -> None:
    assert len(OURS) > 30
    assert {words[1] for _, words in OURS} >= {"run", "preview", "status", "audit", "retry"}


@pytest.mark.parametrize(("name", "words"), ALL, ids=[f"{name} {' '.join(words)[:60]}" for name, words in ALL])
def test_every_command_is_one_that_some_test_runs(name: str, words: list[str]) -> None:
    if test := elsewhere(words):
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), f"{name}: {test} is gone"
        return
    assert words[0] == "vlm-batch" or is_setup(words), f"{name}: no test runs {shlex.join(words)}"
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"{name}: there is no target {words[1]}"
    for extra in re.findall(r"vlm-batch\[([\w,-]+)\]|\.\[([\w,-]+)\]", " ".join(words)):
        for one in "".join(extra).split(","):
            assert f"\n{one} = [" in (ROOT / "pyproject.toml").read_text(), f"{name}: there is no extra {one}"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_page_is_whole(page: Path) -> None:
    """Nothing that was to be filled in later, and no link to a file that is not there."""
    text = page.read_text()
    assert not re.findall(r"@[A-Z]+@|^(?:[A-Z]+_EXAMPLE|MEASURED|STATIC)$", text, re.MULTILINE)
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every command of a page and every block of Python, from top to bottom in one folder; how many there were."""
    make_workplace(folder, page)
    monkeypatch.chdir(folder)
    number = 0
    for block in blocks(page):
        is_ours = block.language == "python" and block.file is None
        if is_ours and not any(word in block.text for word in PYTHON_ELSEWHERE):
            number += 1
            python(block)
        for words in block.commands if block.language in ("bash", "console") else ():
            if words[0] != "vlm-batch" or elsewhere(words):
                continue
            number += 1
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STANDARD_INPUT.encode())))
            code = main(concrete(words)[1:])
            assert code == 0, f"{block.name}: exit code {code} of {shlex.join(words)}"
    return number


def python(block: Block) -> None:
    """Run a block as people would, in the folder of the page's commands."""
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not run_page(page, tmp_path, monkeypatch):
        pytest.skip("there is nothing to run on it")
