"""A job of Ray Data, as somebody else might have one: ray_data_job.py ADDRESS FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
import ray.data

from pipeline.ray_data import Answers

if __name__ == "__main__":
    address, folder = sys.argv[1:]
    ray.init(address=address, logging_level="ERROR")
    rows = ray.data.read_parquet(f"{folder}/rows.parquet")
    words = ["dataset.image_column=images", "dataset.id_column=id"]
    answers = rows.map_batches(
        Answers, fn_constructor_args=[words], batch_format="pyarrow", batch_size=3, concurrency=1, num_cpus=1
    )
    wanted = ["id", "status", "error_stage", "response"]
    found = [{name: row[name] for name in wanted} for row in answers.take_all()]
    Path(folder, "answers.json").write_text(json.dumps(found))
