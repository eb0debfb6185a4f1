"""Measure models of real size on a GPU: python scripts/gpu_models.py --output docs/benchmarks

    building        Idefics2-8B from its published configuration, random weights made on the device, saved and loaded
    generation      a batch of 16 through the engine in bfloat16 with SDPA
    kernels         which attention kernel runs for prompts of one length, and for padded ones
    flash_packages  the same with flash-attn or flash-attn-4
    device_map      device_map=auto gives the same answers
    parity          logits of a batch against rows alone in bfloat16
    int8            Quanto's int8 against bfloat16: memory and time
    architectures   the same in float32 within 1e-5, for a tiny model of every architecture

Nothing is downloaded. It needs torch, transformers, accelerate and this checkout on PYTHONPATH; a check whose package
is missing says so and is not measured. Where no network is, carry the wheels of such packages there, and name the
folder they are put into (pip install --no-index --no-deps --target DIR *.whl) in PYTHONPATH.

Writes models_gpu.json and models_gpu.md after each check; exit code 1 where one failed. `--tiny --device cpu` goes the
same way with a small model: it shows that the suite works.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gpu_checks import CHECKS, Missed, NotMeasured, Table
from gpu_subject import PUBLISHED, TINY, Subject, made

PACKAGES = ("torch", "transformers", "accelerate", "optimum-quanto", "flash-attn", "flash-attn-4")
_GB_FREE = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for models_gpu.json and models_gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--only", choices=list(CHECKS), action="append", help="only this one; may be given again")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured and nothing written (--tiny --device cpu goes without)")
        return 2
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # device_map=auto would find one
    sizes = TINY if args.tiny else PUBLISHED
    report: dict[str, Any] = {"model": sizes.name, "circumstances": circumstances(args.device), "checks": {}}
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-models-") as folder:
        free = shutil.disk_usage(folder).free / 1e9
        if not args.tiny and free < _GB_FREE:
            print(f"{folder} has {free:.0f} GB free; the model needs {_GB_FREE}. Set TMPDIR to a larger disk.")
            return 2
        subject = made(sizes, args.device, Path(folder))
        for name in args.only or CHECKS:
            found = report["checks"][name] = outcome(CHECKS[name], subject)
            report["seconds"] = round(time.perf_counter() - started, 1)
            print(f"{report['seconds']:6.1f} s  {name}: {found['outcome']}", flush=True)
            (args.output / "models_gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            (args.output / "models_gpu.md").write_text(page(report))
    return 1 if any(found["outcome"].startswith("failed") for found in report["checks"].values()) else 0


def outcome(check: Callable[[Subject], Table], subject: Subject) -> dict[str, Any]:
    """What a check found. One that fails, in whatever way, must not take the others with it."""
    started = time.perf_counter()
    table: Table = []
    try:
        table = check(subject)
        said = "passed"
    except NotMeasured as reason:
        said = f"not measured: {reason}"
    except Missed as problem:
        said, table = f"failed: {problem}", problem.table
    except Exception as problem:
        said = f"failed: {type(problem).__name__}: {problem}"
    return {
        "outcome": said,
        "seconds": round(time.perf_counter() - started, 1),
        "doc": (check.__doc__ or "").splitlines()[0],
        "table": table,
    }


def circumstances(device: str) -> dict[str, str]:
    """Machine and versions."""
    found = {"device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})"}
    if device == "cuda":
        found["CUDA of torch"] = str(torch.version.cuda)
    found |= {"Python": platform.python_version(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Models of real size on a GPU",
        "",
        "What `make gpu` measured; `models_gpu.json` beside this page has the same. Weights are random, so the text of",
        "the answers means nothing; sizes, kernels, memory and time are those of the real model. Times are medians",
        "(least .. most).",
        "",
        f"- Model: {report['model']}, bfloat16, 16 rows in a batch.",
        *(f"- {name}: {value}" for name, value in report["circumstances"].items()),
        f"- All checks together: {report.get('seconds', '-')} s.",
    ]
    for name, found in report["checks"].items():
        lines += ["", f"## {name}", "", found["doc"], "", f"**{found['outcome']}**"]
        if found["table"]:
            lines += ["", *_markdown(found["table"])]
    return "\n".join(lines) + "\n"


def _markdown(table: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in table for name in row))
    rows = [[_shown(row.get(name, "")).replace("|", "\\|") for name in names] for row in table]
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]


def _shown(value: Any) -> str:
    """A cell: samples as median (least .. most)."""
    if isinstance(value, list):
        return f"{statistics.median(value):.4g} ({min(value):.4g} .. {max(value):.4g})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
