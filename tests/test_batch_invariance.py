"""A batch never changes an answer: in float32, token for token, whatever the batch size and the number of workers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from command_line import CommandLine
from PIL import Image

from pipeline.compose import compose
from pipeline.preparation import Preparation, PreparationOptions, Task
from pipeline.records import EncodedSample, ImageRef, RecordKey
from pipeline.run import checked
from pipeline.tensors.batch import Batcher
from pipeline.tensors.processor import ProcessorSource
from pipeline.vlm.identity import identify
from pipeline.vlm.load import load_model

SAME = ["id", "response", "finish_reason", "num_prompt_tokens", "num_generated_tokens", "row_key"]
NUM_ROWS = 240


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_batch_engine_workers_and_transfer_do_not_change_answers(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 52: rows of one and two images alone, in three slots, in full batches: the same answers."""
    tables = {}
    for name, words in {
        "alone": ["engine=static", "engine.max_batch_rows=1"],
        "threes": ["engine=slots", "engine.max_batch_rows=3", "engine.num_workers=2", "write.shard_rows=50"],
        "full": ["engine=static", "engine.max_batch_rows=64", "engine.image_transfer=resized"],
        "slots": ["engine=slots", "engine.max_batch_rows=64", "engine.image_transfer=decoded"],
    }.items():
        vlm_batch("run", f"dataset.max_rows={NUM_ROWS}", f"output_dir={name}", *words)
        tables[name] = pq.read_table(tmp_path / name / "data", columns=SAME)
    for name in ("threes", "full", "slots"):
        assert tables[name].equals(tables["alone"]), name


def demo_samples(pictures: Sequence[Image.Image] = ()) -> list[EncodedSample]:
    """Rows of the demo as the model gets them, or the same questions about these pictures."""
    config = compose([]).config
    inputs = config.dataset.scan()
    template, _ = checked(config, inputs)
    prepare = Preparation(
        PreparationOptions(
            template=template,
            processor=ProcessorSource(str(identify(config.vlm).folder)),
            fingerprint="any",
            max_image_pixels=config.prompt.max_image_pixels,
            allow_urls=False,
            max_new_tokens=8,
            max_new_tokens_column=None,
        )
    )
    rows = list(config.dataset.open(inputs).rows(0, len(pictures) or NUM_ROWS))
    if pictures:
        rows = [replace(row, images=(png(image),)) for row, image in zip(rows, pictures, strict=True)]
    found = [prepare(Task(row, (RecordKey(row.index, "default", 0),)))[0] for row in rows]
    return [sample for sample in found if isinstance(sample, EncodedSample)]


def png(image: Image.Image) -> ImageRef:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return ImageRef(data=encoded.getvalue())


def compared(samples: list[EncodedSample]) -> tuple[int, float]:
    """How many samples were answered in batches, and how far their logits are from those of each alone at most."""
    config = compose([]).config
    loaded = load_model(config.vlm, identify(config.vlm), num_threads=1)
    batcher = Batcher(max_rows=48, max_tokens=1 << 20, max_new_tokens=8, pad_id=loaded.pad_id)

    def logits(group: list[EncodedSample]) -> torch.Tensor:
        batch: dict[str, Any] = batcher.collate(group)
        positions = batch["attention_mask"].cumsum(-1).sub(1).clamp(min=0)
        with torch.inference_mode():
            return loaded.model(**batch, position_ids=positions).logits[:, -1]

    num_compared, largest_difference = 0, 0.0
    for group in batcher.groups(iter(samples)):
        together = logits(group)
        alone = torch.cat([logits([sample]) for sample in group])
        assert torch.equal(together.argmax(-1), alone.argmax(-1))
        largest_difference = max(largest_difference, float((together - alone).abs().max() / alone.abs().max()))
        num_compared += len(group)
    return num_compared, largest_difference


def test_the_logits_of_a_batch_are_those_of_batches_of_one() -> None:
    """Fault 52: padded rows differ from a batch of one by at most 1e-5 of the largest logit."""
    num_compared, largest_difference = compared(demo_samples())
    assert num_compared == NUM_ROWS
    assert 0 < largest_difference <= 1e-5  # exactly 0 would mean that nothing was batched


def test_pictures_of_extreme_shapes_change_no_neighbour() -> None:
    """Fault 44: 1 x 1, 1 x 5000, 5000 x 1, 16,384 x 2 and usual pictures in one batch: the logits of a batch of one."""
    sizes = ((1, 1), (40, 30), (1, 5000), (300, 200), (5000, 1), (2, 2), (16_384, 2), (30, 90))
    samples = demo_samples([Image.effect_noise(size, 60).convert("RGB") for size in sizes])
    num_compared, largest_difference = compared(samples)
    assert num_compared == len(sizes)
    assert 0 < largest_difference <= 1e-5
