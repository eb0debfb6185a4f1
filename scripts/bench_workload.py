"""The rows that are benchmarked, and what a run says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench_trace import ROOT

MODEL = ROOT / "pipeline" / "vlm" / "demo"
DEMO = ROOT / "pipeline" / "dataset" / "demo.parquet"
MAX_NEW_TOKENS = 96  # the longest answer of the demo fits


def write_rows(path: Path, num_rows: int, num_images: int | None = None) -> None:
    """The demo's rows as often as needed under fresh ids; num_images: only those with so many images."""
    rows = pq.read_table(DEMO)
    if num_images is not None:
        rows = rows.filter(pa.array([len(images) == num_images for images in rows["images"].to_pylist()]))
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        for start in range(0, num_rows, len(rows)):
            part = rows.slice(0, num_rows - start)
            names = pa.array([f"row-{start + place:07d}" for place in range(len(part))])
            writer.write_table(part.set_column(0, rows.schema.field("id"), names), row_group_size=200)


def source(rows: Path) -> list[str]:
    """The settings of `vlm-batch run` for these rows: the packaged model and prompt, answers of any length."""
    return [
        *("dataset=parquet", f"dataset.path={rows}", "dataset.image_column=images", "dataset.id_column=id"),
        *("vlm=demo", "vlm.device=cpu", f"generation.max_new_tokens={MAX_NEW_TOKENS}"),
    ]


def worker_stats(output_dir: Path) -> dict[str, Any]:
    """What the only worker of a run wrote of itself last.

    Raises:
        FileNotFoundError: nothing yet.
    """
    for path in (output_dir / "stats").glob("worker-*.json"):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    raise FileNotFoundError(f"{output_dir / 'stats'} has no worker-*.json")
