"""The demo's pictures as files: python pictures.py FOLDER [NUMBER]. For examples that want a folder of images."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.dataset.demo import DEMO_FILE

folder = Path(sys.argv[1])
wanted = int(sys.argv[2]) if len(sys.argv) > 2 else 24
folder.mkdir(parents=True, exist_ok=True)
rows = [row for row in pq.read_table(DEMO_FILE).to_pylist() if len(row["images"]) == 1]
for row in rows[:wanted]:
    (folder / f"{row['id']}.png").write_bytes(row["images"][0]["bytes"])
