"""Finished runs over real sources, without a model: a test says what is answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from small_run import SETTINGS, new_ledger

from pipeline.dataset.base import DatasetConfig
from pipeline.dataset.images import ImagesConfig
from pipeline.dataset.jsonl import JsonlConfig
from pipeline.manifest import write_manifest
from pipeline.plan import Plan
from pipeline.planning import make_folders, open_plan
from pipeline.prompt.image import image_bytes
from pipeline.records import Answer, Fault, FinishReason, PromptFacts, RecordKey, Row, Stage
from pipeline.status import read_status
from pipeline.write.schema import WriteConfig, output_schema

FAULT = Fault(Stage.DECODE, "UnidentifiedImageError", "it is no picture")
Said = Callable[[Row, RecordKey], "str | Fault"]


def default_said(row: Row, key: RecordKey) -> str:
    return f"{row.id} is a picture"


def answered_run(
    output_dir: Path,
    source: DatasetConfig,
    said: Said = default_said,
    *,
    prompt_names: Sequence[str] = ("default",),
    num_samples: int = 1,
    shard_rows: int = 3,
    write: WriteConfig | None = None,
    settings: Mapping[str, Any] | None = None,
    prompt: str = "What is it?",
    finish: FinishReason = FinishReason.STOP,
    only_shards: Iterable[int] | None = None,
) -> Plan:
    """A run whose every shard is published, or those of `only_shards`."""
    write, inputs = write or WriteConfig(), source.scan()
    chosen: dict[str, Any] = dict(SETTINGS) | {"dataset.kind": source.kind, "vlm.path": "org/model"}
    chosen |= {f"dataset.{entry.name}": getattr(source, entry.name) for entry in fields(source)}
    chosen |= {f"write.{name}": getattr(write, name) for name in ("prefix", "response_column", "keep_images")}
    plan = open_plan(
        output_dir,
        chosen | dict(settings or {}),
        scan=lambda: inputs,
        max_rows=None,
        shard_rows=shard_rows,
        prompt_names=prompt_names,
        num_samples=num_samples,
    )
    make_folders(output_dir)
    schema = output_schema(write, inputs.columns, id_column=source.id_column, image_column=source.image_column)
    ledger = new_ledger(output_dir, plan, columns=inputs.columns, schema=schema)
    dataset = source.open(inputs)
    for number in range(plan.num_shards) if only_shards is None else only_shards:
        shard = plan.shard(number)
        ledger.open(shard)
        for row in dataset.rows(shard.start, shard.stop):
            keys = [
                RecordKey(row.index, name, sample) for name in plan.prompt_names for sample in range(plan.num_samples)
            ]
            columns = dict(row.columns)
            images = [image_bytes(ref) for ref in row.images]
            if write.keep_images:
                columns[source.image_column or ""] = [{"bytes": None, "path": ref.path} for ref in row.images]
            ledger.expect(Row(row.index, row.id, row.images, columns), keys, shard)
            for key in keys:
                ledger.record(_answer(row, key, said(row, key), images, write, prompt, finish))
    ledger.close()
    write_manifest(output_dir, read_status(output_dir))
    return plan


def _answer(
    row: Row, key: RecordKey, said: str | Fault, images: list[bytes], write: WriteConfig, prompt: str, end: FinishReason
) -> Answer:
    facts = PromptFacts(
        prompt=prompt,
        num_prompt_tokens=5,
        num_images=len(images),
        image_sha256=tuple(hashlib.sha256(data).hexdigest() for data in images),
        image_bytes=tuple(images) if write.keep_images else (),
    )
    if isinstance(said, Fault):
        return Answer(key, row.id, facts, fault=said)
    return Answer(key, row.id, facts, said, end, 3)


def picture(number: int = 0, kind: str = "PNG") -> bytes:
    """A small picture, another for each number."""
    stream = BytesIO()
    Image.new("RGB", (8, 6), (number * 40 % 256, 90, 200)).save(stream, kind)
    return stream.getvalue()


def pictures(folder: Path, *names: str) -> ImagesConfig:
    """Files of these names, as a source."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "JPEG" if name.lower().endswith((".jpg", ".jpeg")) else "PNG"))
    return ImagesConfig(path=str(folder))


def manifest(folder: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> JsonlConfig:
    """A manifest of these rows, as a source without images unless options say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlConfig(path=str(path), **({"image_column": None} | options))
