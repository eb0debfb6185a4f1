"""The whole program around the fake model of tests/torture, and a look at every byte that it leaves.

done = start(folder, "dataset=jsonl", ..., prelude="import socket ...", variables={"HF_TOKEN": "..."})
"""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.write.crash_point import VARIABLE

TESTS = Path(__file__).resolve().parents[1]
SHARED = TESTS.parents[1] / "shared" / "data"
# Nothing of a real model; one worker, and journals as early as can be.
WORDS = [
    "output_dir=out", "vlm=demo", "max_error_rate=null", "engine.num_workers=1", "engine.parity_rows=0",
    "write.sync_seconds=0.02", "prompt.user=What is it?", "report=false",
]  # fmt: skip


def start(
    folder: Path,
    *words: str,
    command: str = "run",
    prelude: str = "",
    code: int | None = 0,
    crash_at: str = "",
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run the program in a folder to its end; what it printed.

    prelude: Python that runs before the program, in its main process. code: None where any will do.
    """
    environment = os.environ | {"PYTHONPATH": f"{TESTS / 'torture'}{os.pathsep}{TESTS.parent}"} | dict(variables or {})
    environment.pop(VARIABLE, None)
    if crash_at:
        environment[VARIABLE] = crash_at
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}\nimport fake_model; fake_model.start()", command, *WORDS, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    printed = done.stdout.decode(errors="backslashreplace")  # no text mode, which would hide a carriage return
    assert code is None or done.returncode == code, f"exit code {done.returncode}, expected {code}\n{printed}"
    return printed


def records(folder: Path) -> list[dict[str, Any]]:
    """What the run in a folder has answered, in order."""
    rows: list[dict[str, Any]] = pq.read_table(folder / "out" / "data").to_pylist()
    return rows


def written(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below a folder, its name included; what is compressed in Parquet also as text."""
    for path in sorted(folder.rglob("*")):
        yield path, str(path.relative_to(folder)).encode()
        if path.is_file():
            yield path, path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield path, repr((table.schema.metadata, table.to_pylist())).encode("utf-8", "surrogatepass")


def png(red: int = 1) -> bytes:
    """A picture of one colour."""
    encoded = io.BytesIO()
    Image.new("RGB", (3, 2), (red, 2, 3)).save(encoded, "PNG")
    return encoded.getvalue()


def data_uri(red: int = 1) -> str:
    return "data:image/png;base64," + base64.b64encode(png(red)).decode()


def parquet_at(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """A Parquet file as careful people write it."""
    pq.write_table(pa.table(columns), path, **{"write_page_checksum": True, **options})
    return path
