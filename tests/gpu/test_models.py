"""Models of real size on a GPU; the same checks on a tiny model on the CPU, so that they are known to work.

`make gpu` runs the marked half and keeps its results in docs/benchmarks/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = CHECKOUT / "scripts"
# The architectures' own tests cover them on the CPU.
ON_THE_CPU = ("building", "generation", "kernels", "flash_packages", "device_map", "parity", "int8")

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

Report = dict[str, Any]


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the script found; in a process of its own, so that it goes as for a user and frees the device."""
    folder = tmp_path_factory.mktemp("gpu_models")
    words = ["--device", request.param]
    if request.param == "cpu":
        words += ["--tiny", *(word for name in ON_THE_CPU for word in ("--only", name))]
    else:
        folder = Path(os.environ.get("GPU_RESULTS", folder))
    _script(*words, "--output", str(folder))
    found: Report = json.loads((folder / "models_gpu.json").read_text())
    return found


def _script(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run([sys.executable, str(SCRIPTS / "gpu_models.py"), *words], env=env, text=True, timeout=580)


def test_every_check_passes_or_says_which_package_it_lacks(report: Report) -> None:
    wrong = {
        name: found["outcome"]
        for name, found in report["checks"].items()
        if found["outcome"] != "passed" and not found["outcome"].startswith("not measured: ")
    }
    assert not wrong
    assert set(ON_THE_CPU) <= set(report["checks"])


def test_sdpa_takes_its_flash_kernel_for_prompts_of_one_length(report: Report) -> None:
    equal = report["checks"]["kernels"]["table"][0]
    assert equal["flash"]
    assert "flash" in equal["kernels"] + equal["operators"]


def test_int8_weights_take_less_memory_than_bfloat16(report: Report) -> None:
    found = report["checks"]["int8"]
    if found["outcome"] != "passed":
        pytest.skip(found["outcome"])
    plain, int8 = found["table"]
    assert int8["weights, GB"] < plain["weights, GB"]
    assert len(int8["tokens/s"]) == len(plain["tokens/s"]) > 1


def test_the_published_configuration_is_that_of_a_model_with_eight_billion_parameters() -> None:
    from gpu_subject import IDEFICS2_8B
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(Idefics2Config(**IDEFICS2_8B))
    assert model.num_parameters() == pytest.approx(8.40e9, rel=0.002)  # the model card says 8.4 B


def test_an_architecture_of_the_ordinary_tests_goes_through_the_check(tmp_path: Path) -> None:
    from gpu_checks import BOUND, architecture

    found = architecture("idefics2", tmp_path, "cpu")
    assert found["outcome"] == "passed"
    assert 0 < found["largest difference"] <= BOUND
    assert found["dtype"] == "float32"


def test_a_check_that_fails_keeps_its_table_and_lets_the_others_go_on() -> None:
    from gpu_checks import Missed, NotMeasured, Table
    from gpu_models import outcome, page

    def missed(subject: object) -> Table:
        """Something is measured."""
        raise Missed("too slow", [{"seconds": [1.0, 3.0, 2.0]}])

    def lacking(subject: object) -> Table:
        """Something else is."""
        raise NotMeasured("quick is not installed")

    def broken(subject: object) -> Table:
        """A third thing is."""
        raise ZeroDivisionError("division by zero")

    found = {check.__name__: outcome(check, None) for check in (missed, lacking, broken)}  # type: ignore[arg-type]
    assert found["missed"]["outcome"] == "failed: too slow"
    assert found["lacking"]["outcome"] == "not measured: quick is not installed"
    assert found["broken"]["outcome"] == "failed: ZeroDivisionError: division by zero"
    shown = page({"model": "a model", "circumstances": {"device": "none"}, "checks": found})
    assert "| 2 (1 .. 3) |" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_without_a_cuda_device_nothing_is_written(tmp_path: Path) -> None:
    assert _script("--output", str(tmp_path)).returncode == 2
    assert not list(tmp_path.iterdir())
