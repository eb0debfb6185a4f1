"""A finished run over real picture files, without a model: shards as a ledger publishes them, answers as a test wants.

plan = made_run(tmp_path / "out", pictures=tmp_path / "pictures", record=lambda index: {"response": "a cat"})
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.dataset.images import ImagesConfig
from pipeline.plan import Plan
from pipeline.planning import make_folders, open_plan
from pipeline.source_images import SourceImages
from pipeline.write.schema import ShardSummary, WriteConfig, output_schema
from pipeline.write.shard import publish_shard

Record = Callable[[int], Mapping[str, Any]]


def put_pictures(folder: Path, num_pictures: int = 6, size: tuple[int, int] = (40, 30)) -> Path:
    """PNG files of one colour each, all different: 00000.png, 00001.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_pictures):
        Image.new("RGB", size, (number % 256, 90, 200)).save(folder / f"{number:05d}.png")
    return folder


def jpeg(width: int, height: int) -> bytes:
    """A picture with something to see in it."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([across % 256, down % 256, (across + down) // 8 % 256], axis=-1).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def made_run(
    output: Path,
    pictures: Path,
    record: Record = lambda index: {},
    *,
    shard_rows: int = 3,
    num_shards: int | None = None,
    settings: Mapping[str, Any] | None = None,
    hashed: bool = True,
) -> Plan:
    """Publish a run.

    record: what the record of a row has besides, or instead. num_shards: how many are published; None = all.
    hashed: whether the records have the hashes of their pictures (or they are in what `record` gives).
    """
    source = ImagesConfig(path=str(pictures))
    asked = {
        "dataset.kind": "images", "dataset.path": str(pictures), "dataset.image_column": "image",
        "dataset.columns": None, "dataset.id_column": None, "prompt.user": "What is it?",
        "prompt.max_image_pixels": 100_000_000, "vlm.path": "demo", "write.prefix": "",
        "write.response_column": "response", "write.keep_images": False,
    }  # fmt: skip
    asked |= dict(settings or {})
    inputs = source.scan()
    plan = open_plan(
        output, asked, scan=lambda: inputs, max_rows=None, shard_rows=shard_rows, prompt_names=("default",),
        num_samples=1,
    )  # fmt: skip
    make_folders(output)
    options = WriteConfig(
        prefix=str(asked["write.prefix"]),
        response_column=str(asked["write.response_column"]),
        keep_images=bool(asked["write.keep_images"]),
    )
    schema = output_schema(options, inputs.columns, image_column=str(asked["dataset.image_column"]))
    names = inputs.files["path"].to_pylist()
    for number in range(plan.num_shards if num_shards is None else num_shards):
        shard = plan.shard(number)
        indices = range(shard.start, shard.stop)
        rows = [_row(index, names[index], record(index)) for index in indices]
        if hashed or options.keep_images:
            for row, (_, images) in zip(rows, SourceImages(output, plan).of_rows(indices), strict=True):
                row["image_sha256"] = row["image_sha256"] or [image.sha256 for image in images if image.sha256]
                if options.keep_images:
                    row["input.image"] = [{"bytes": image.data, "path": None} for image in images]
        errors: dict[str, int] = {}
        for row in rows:
            if row["status"] == "error":
                kind = f"{row['error_stage']}/{row['error_type']}"
                errors[kind] = errors.get(kind, 0) + 1
        table = schema.publish(
            pa.Table.from_pylist(rows, schema.journal),
            {"model_id": "demo", "model_revision": None, "run_id": plan.plan_id},
        )
        summary = ShardSummary(
            plan.plan_id, number, len(rows), sum(errors.values()), errors,
            sum(row["num_generated_tokens"] or 0 for row in rows), {"engine": "slots", "device": "cpu"},
        )  # fmt: skip
        name = f"{shard.name}.parquet"
        publish_shard(
            table, summary, final=output / "data" / name, attempt_path=output / "work" / name, compression="zstd"
        )
    (output / "stats/worker-0-a.json").write_text(json.dumps(worker(plan)))
    return plan


def worker(plan: Plan, **changes: Any) -> dict[str, Any]:
    """What a worker says of itself that answered everything within 40 seconds."""
    times = list(range(0, 41, 2))
    return {
        "plan_id": plan.plan_id, "rank": 0, "state": "done", "host": "here", "pid": 1,
        "started": time.time() - 100, "updated": time.time() - 60, "seconds": 40.0, "loading_seconds": 4.0,
        "waiting_for_input_seconds": 9.0, "writing_seconds": 1.0, "num_answered": plan.num_records,
        "num_errors": 0, "num_generated_tokens": 10, "rows_per_second": 1.0, "tokens_per_second": 1.0,
        "error_examples": {}, "engine": {"prefill_seconds": 10.0, "decode_seconds": 16.0},
        "parity": {"num_rows": 8, "num_identical": 7, "dtype": "bfloat16"},
        "series": {
            "seconds": times,
            "num_answered": [plan.num_records * max(0, second - 4) / 36 for second in times],
            "waiting_for_input_seconds": [9.0 * second / 40 for second in times],
        },
    } | changes  # fmt: skip


def _row(index: int, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "id": name, "row_index": index, "prompt_name": "default", "sample_index": 0,
        "row_key": hashlib.sha256(name.encode()).hexdigest(), "status": "ok", "error_stage": None, "error_type": None,
        "error_message": None, "warnings": [], "prompt": "What is it?", "response": f"answer {index}",
        "finish_reason": "stop", "num_prompt_tokens": 20, "num_image_tokens": 16, "num_generated_tokens": 3,
        "num_images": 1, "image_sha256": [], "image_width": [40], "image_height": [30], "attempt": 1,
        "input.path": name,
    }  # fmt: skip
    row |= changes
    if row["status"] == "error":
        row |= {"response": None, "finish_reason": None, "num_generated_tokens": None}
    return row
