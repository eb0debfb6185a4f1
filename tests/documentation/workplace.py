"""A folder in which the documentation's commands find what they speak of: photos/, products.csv, a model ..."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pages import blocks

from pipeline.dataset.demo import DEMO_FILE

MODEL = str(DEMO_FILE.parents[1] / "vlm" / "demo")
# What `...` in a command stands for, by its command: words that a page leaves out, as it has said them before.
ELIDED = {
    "run": ["dataset=images", "dataset.path=photos/", "vlm=auto", "vlm.path=MODEL"],
    "plan": ["dataset=images", "dataset.path=photos/", "vlm=auto", "vlm.path=MODEL"],
    "preview": ["dataset=images", "dataset.path=photos/", "vlm=auto", "vlm.path=MODEL"],
}


def concrete(words: list[str]) -> list[str]:
    """A command of a page as it can be started: `...` filled in, MODEL a model."""
    found: list[str] = []
    for word in words:
        found += ELIDED[words[1]] if word == "..." else [word]
    return [word.replace("MODEL", MODEL) if word.partition("=")[2] == "MODEL" else word for word in found]


def make_workplace(folder: Path, page: Path) -> None:
    """Pictures, tables and texts, and the files that a page shows."""
    demo = [row for row in pq.read_table(DEMO_FILE).slice(0, 60).to_pylist() if len(row["images"]) == 1][:8]
    pictures = [row["images"][0]["bytes"] for row in demo]
    for place in ("photos", "scans", "data"):
        (folder / place).mkdir()
    for number, data in enumerate(pictures[:4]):
        (folder / "photos" / ("cat.jpg" if number == 0 else f"img_{number}.png")).write_bytes(data)
        (folder / "scans" / f"page-{number}.png").write_bytes(data)
    (folder / "scans" / "page-3.png").write_bytes(b"a page that nobody can read")
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(pictures[0])
    names = [f"photos/img_{number}.png" for number in range(1, 4)]
    lines = [",".join((name, "Acme", f"kettle {number}")) for number, name in enumerate(names)]
    (folder / "products.csv").write_text("\n".join(["file,brand,name", *lines]) + "\n")
    (folder / "products.jsonl").write_text(
        "".join(json.dumps({"image": name, "brand": "Acme"}) + "\n" for name in names)
    )
    rows = [
        {"image": {"bytes": data, "path": None}, "question": row["question"], "answer": row["answer"]}
        for data, row in zip(pictures, demo, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "questions.parquet")
    for block in blocks(page):
        if block.file is not None:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
