"""vlm-batch report as people start it, and what it costs."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import CHECKOUT, CommandLine
from made_run import jpeg, made_run, put_pictures
from page_reader import page_read

WORDS = (
    "a picture",
    "shows",
    "two people",
    "who walk",
    "along the street",
    "beside",
    "red and blue cars",
    "in the rain",
)


def test_the_command_says_where_the_page_is(vlm_batch: CommandLine, tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    said = vlm_batch("report", "output_dir=out", "examples=1", "dataset=images", "dataset.path=in").stdout
    assert said == "report   out/report.html\n"
    assert len(page_read((tmp_path / "out/report.html").read_text()).all("li", class_="card")) == 2 + 1 + 1
    assert "holds no run" in vlm_batch("report", "output_dir=nowhere", code=2).stderr
    assert "at least 1" in vlm_batch("report", "output_dir=out", "examples=0", code=2).stderr


def test_it_needs_no_model_and_no_torch(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    script = f"""
import sys
from pathlib import Path
from pipeline.report.report import write_report
write_report(Path({str(tmp_path / "out")!r}))
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=CHECKOUT)


# A small process starts what is measured: the kernel counts what the one that starts it held as the child's own.
MEASURED = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"peak_bytes": used.ru_maxrss * 1024, "cpu_seconds": used.ru_utime + used.ru_stime}))
"""


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    """Under 10 MB, in less than a gigabyte and a minute of processor time, all processes together."""
    pictures = tmp_path / "in"
    pictures.mkdir()
    content = jpeg(1600, 1200)
    for number in range(100_000):
        path, first = (
            pictures / f"{number:06d}.jpg",
            pictures / f"{number % 4:06d}.jpg",
        )  # a file has 65,000 names at most
        path.write_bytes(content) if path == first else os.link(first, path)
    sha256 = hashlib.sha256(content).hexdigest()

    def record(index: int) -> Mapping[str, Any]:
        row: dict[str, Any] = {"image_sha256": [sha256], "image_width": [1600], "image_height": [1200]}
        row["response"] = " ".join(random.Random(index).choices(WORDS, k=30))
        if index % 97 == 0:
            row |= {
                "status": "error",
                "error_stage": "decode",
                "error_type": f"Odd{index % 7}",
                "error_message": "torn",
            }
        return row

    made_run(tmp_path / "out", pictures, record, shard_rows=1000, hashed=False)
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", "pipeline", "report", f"output_dir={tmp_path}/out"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    html = (tmp_path / "out/report.html").read_text()
    assert len(html) < 10_000_000
    assert figures["peak_bytes"] < 1e9, figures
    assert figures["cpu_seconds"] < 60, figures
    assert len(page_read(html).all("img")) > 100
