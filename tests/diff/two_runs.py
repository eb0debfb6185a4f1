"""Runs to compare, without a model: each is told what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from small_run import COLUMNS, SETTINGS, inputs, keys_of, new_ledger, row

from pipeline.dataset.images import ImagesConfig
from pipeline.diff.command import run_diff
from pipeline.diff.options import DiffOptions
from pipeline.plan import Plan
from pipeline.planning import make_folders, open_plan
from pipeline.records import Answer, Fault, FinishReason, PromptFacts, RecordKey, Stage
from pipeline.write.schema import WriteConfig, output_schema

Say = Callable[[RecordKey], str | Fault | None]
UNREADABLE = Fault(Stage.DECODE, "UnidentifiedImageError", "it is no picture")
OUT_OF_MEMORY = Fault(Stage.GENERATE, "OutOfMemoryError", "it does not fit")


def make_run(
    output_dir: Path,
    say: Say,
    num_rows: int = 6,
    *,
    shard_rows: int = 3,
    num_shards: int | None = None,
    prompt_names: Sequence[str] = ("default",),
    num_samples: int = 1,
    settings: Mapping[str, Any] | None = None,
    columns: pa.Schema = COLUMNS,
    more: Callable[[int], Mapping[str, Any]] = lambda index: {},
    ids: Callable[[int], str] = "{:05d}.jpg".format,
    prompt: str = "What is it?",
    image: Callable[[int], str] = "picture {}".format,
    length: Callable[[str], int] = len,
    pictures: Path | None = None,
) -> Plan:
    """A run that answers what `say` says: a text, or a fault.

    num_shards: those that are published; None = all. pictures: folder of the images that it was asked about, as many as
    there are rows; their ids and hashes are the records'.
    """
    settings = {**SETTINGS, "dataset.image_column": None, **(settings or {})}
    if pictures is not None:
        source = ImagesConfig(path=str(pictures)).scan()
        settings |= {"dataset.kind": "images", "dataset.path": str(pictures), "dataset.image_column": "image"}
        columns, files = source.columns, source.files["path"].to_pylist()
        ids, image = files.__getitem__, lambda index: _sha256(pictures / files[index])
    plan = open_plan(
        output_dir,
        settings,
        scan=lambda: source if pictures is not None else inputs(num_rows, columns=columns),
        max_rows=None,
        shard_rows=shard_rows,
        prompt_names=prompt_names,
        num_samples=num_samples,
    )
    make_folders(output_dir)
    write = WriteConfig(prefix=settings["write.prefix"], response_column=settings["write.response_column"])
    ledger = new_ledger(output_dir, plan, columns=columns, schema=output_schema(write, columns))
    for number in range(plan.num_shards if num_shards is None else num_shards):
        shard = plan.shard(number)
        ledger.open(shard)
        keys = list(keys_of(plan, shard))
        for index in range(shard.start, shard.stop):
            own = {} if pictures is None else {"path": ids(index)}
            ledger.expect(
                row(index, **own | dict(more(index))),
                [key for key in keys if key.row_index == index],
                shard,
            )
        for key in keys:
            said = say(key)
            facts = PromptFacts(
                prompt=prompt, image_sha256=(image(key.row_index),), image_width=(4,), image_height=(3,)
            )
            if isinstance(said, Fault):
                ledger.record(Answer(key, ids(key.row_index), facts, fault=said))
            else:
                assert said is not None
                ledger.record(Answer(key, ids(key.row_index), facts, said, FinishReason.STOP, length(said)))
    ledger.close()
    return plan


def put_pictures(folder: Path, num_pictures: int = 6, green: int = 90) -> Path:
    """PNG files of one colour each, all different: 00000.png, 00001.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_pictures):
        Image.new("RGB", (40, 30), (40 * number, green, 200)).save(folder / f"{number:05d}.png")
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parquet(file: Path, **columns: Any) -> Path:
    """A file of somebody else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def diff(capsys: Any, a: Path, b: Path, *, code: int = 0, **options: Any) -> tuple[dict[str, Any], str]:
    """What diff.json and the terminal say."""
    import json

    counts = Path(a).parent / "counts.json"
    options = {"html_rows": 0, "diff_output": str(counts)} | options
    assert run_diff(DiffOptions(a=str(a), b=str(b), **options)) == code
    return json.loads(Path(options["diff_output"]).read_text(encoding="utf-8")), capsys.readouterr().out
