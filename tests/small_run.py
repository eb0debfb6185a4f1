"""Real runs without a model, for tests: a plan over invented files, and a ledger that is given its answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.agenda import Agenda
from pipeline.dataset.base import Inputs
from pipeline.dataset.files import files_table
from pipeline.plan import Plan
from pipeline.planning import make_folders, open_plan
from pipeline.records import Answer, Fault, FinishReason, PromptFacts, RecordKey, Row, Shard, Stage
from pipeline.tally import Tally
from pipeline.write.ledger import Ledger
from pipeline.write.schema import OutputSchema, WriteConfig, output_schema

COLUMNS = pa.schema([("path", pa.string()), ("year", pa.int64())])
SETTINGS = {
    "dataset.path": "/photos",
    "dataset.columns": None,
    "dataset.id_column": None,
    "dataset.image_column": "image",
    "prompt.user": "What is it?",
    "generation.max_new_tokens": 8,
    "write.prefix": "",
    "write.response_column": "response",
    "write.keep_images": False,
}


def inputs(num_rows: int, *, root: str = "/", columns: pa.Schema = COLUMNS) -> Inputs:
    """One file a row; `root` exists, the files do not."""
    names = [f"{number:05d}.jpg" for number in range(num_rows)]
    return Inputs(root, files_table(names, [100] * num_rows, [1] * num_rows), columns)


def new_plan(
    output_dir: Path,
    num_rows: int = 6,
    *,
    shard_rows: int = 3,
    prompt_names: Sequence[str] = ("default",),
    num_samples: int = 1,
    settings: Mapping[str, Any] = SETTINGS,
    columns: pa.Schema = COLUMNS,
) -> Plan:
    plan = open_plan(
        output_dir,
        settings,
        scan=lambda: inputs(num_rows, columns=columns),
        max_rows=None,
        shard_rows=shard_rows,
        prompt_names=prompt_names,
        num_samples=num_samples,
    )
    make_folders(output_dir)
    return plan


def new_ledger(
    output_dir: Path,
    plan: Plan,
    attempt_id: str = "a",
    *,
    columns: pa.Schema = COLUMNS,
    tally: Tally | None = None,
    schema: OutputSchema | None = None,
    sync_seconds: float = 3600,
    only: Collection[str] | None = None,
) -> Ledger:
    goal = Agenda(output_dir, plan, only).goal(
        schema or output_schema(WriteConfig(), columns),
        constants={"model_id": "demo", "model_revision": None, "run_id": plan.plan_id},
        compression="zstd",
    )
    return Ledger(
        output_dir,
        goal,
        attempt_id=attempt_id,
        numerics=lambda: {"engine": "none"},
        tally=tally or Tally(plan.num_records),
        sync_seconds=sync_seconds,
    )


def row(index: int, **columns: Any) -> Row:
    return Row(index, f"{index:05d}.jpg", (), {"path": f"{index:05d}.jpg", "year": 1900 + index} | columns)


def answer(
    key: RecordKey, response: str | None = None, fault: Fault | None = None, row_id: str | None = None
) -> Answer:
    """What a model might say of this key: the same whenever it is asked."""
    row_id = row_id or f"{key.row_index:05d}.jpg"
    if fault is not None:
        return Answer(key, row_id, fault=fault)
    facts = PromptFacts(
        prompt="What is it?", num_prompt_tokens=5, image_sha256=("ab",), image_width=(4,), image_height=(3,)
    )
    return Answer(key, row_id, facts, response or f"answer to {tuple(key)}", FinishReason.STOP, 3)


FAULT = Fault(Stage.DECODE, "UnidentifiedImageError", "it is no picture")


def keys_of(plan: Plan, shard: Shard) -> Iterator[RecordKey]:
    for index in range(shard.start, shard.stop):
        for name in plan.prompt_names:
            for sample in range(plan.num_samples):
                yield RecordKey(index, name, sample)


def work(ledger: Ledger, plan: Plan, shard: Shard, keys: Iterable[RecordKey] | None = None) -> list[RecordKey]:
    """What a worker does with a shard: every missing key, or those given, is answered. The keys that were."""
    lacking = ledger.open(shard)
    missing = [key for key in (keys_of(plan, shard) if keys is None else keys) if key in lacking]
    for index in dict.fromkeys(key.row_index for key in keys_of(plan, shard) if key in lacking):
        ledger.expect(row(index), [k for k in keys_of(plan, shard) if k.row_index == index and k in lacking], shard)
    for key in missing:
        ledger.record(answer(key))
    return missing


def finished_run(output_dir: Path, num_rows: int = 6, **more: Any) -> Plan:
    """A run whose every shard is published."""
    plan = new_plan(output_dir, num_rows, **more)
    ledger = new_ledger(output_dir, plan)
    for number in range(plan.num_shards):
        work(ledger, plan, plan.shard(number))
    ledger.close()
    return plan


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with date and content: what must not have been touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
