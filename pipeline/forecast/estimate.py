"""What the run will take and cost: time, accelerator-hours, disk, and what limits it."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.forecast.fleet import Fleet
from pipeline.forecast.foreseen import Foreseen, existing_parent
from pipeline.forecast.interval import Interval, around, relative_error
from pipeline.forecast.pace import Pace, unsteadiness
from pipeline.forecast.survey import Survey
from pipeline.forecast.volume import Volume
from pipeline.forecast.warm_run import WarmRun
from pipeline.write.object_store import ObjectPath

# Standard deviations, as shares. The same job on the same machine took times that differed by so much (docs/plan.md),
# and so did start-ups.
_MACHINE, _START = 0.08, 0.15
# Workers that share a machine share its memory and its disk as well, which is not measured; others are on machines that
# are not this one.
_SHARED, _ELSEWHERE = 0.12, 0.1
_UNCOUNTED = 0.2  # where the engine does not count its steps, and filling and draining cannot be told apart
_OPEN_SHARDS = 2  # of a worker, whose records are in journals
_SLACK = 1.1  # input that is no faster than the model is the limit as well


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a run with so many workers. Seconds from the first start to the last row, start-up included.

    Args:
        start_seconds: of a worker, until it begins to answer.
        phases: seconds of one worker after that, by what it does.
        model_rows_per_second, input_rows_per_second: of one worker, were the other endlessly fast; rows of the input.
    """

    num_workers: int
    accelerators: float
    seconds: Interval
    start_seconds: float
    phases: dict[str, float]
    model_rows_per_second: float
    input_rows_per_second: float
    rows_per_second: float  # of all workers
    tokens_per_second: float

    @property
    def accelerator_hours(self) -> Interval:
        return self.seconds.scaled(self.num_workers * self.accelerators / 3600)

    @property
    def limit(self) -> str:
        """What more of would make it faster: `model`, `input`, `start-up`."""
        if self.start_seconds > sum(self.phases.values()):
            return "start-up"
        return "model" if self.input_rows_per_second > self.model_rows_per_second else "input"


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes of output_dir.

    Args:
        data_bytes: of the shards that are still to come, kept images included.
        images_bytes: of these, kept images.
        passing_bytes: of journals and of shards that are being written, at a time; gone when the run is done.
        has_answers: whether answers are in it, or only what is known without a model.
        free_bytes: None for object stores.
    """

    data_bytes: float
    images_bytes: float
    passing_bytes: float
    inputs_bytes: int
    has_answers: bool
    free_bytes: int | None

    @property
    def needed_bytes(self) -> float:
        return self.data_bytes + self.passing_bytes + self.inputs_bytes

    @property
    def is_short(self) -> bool:
        return self.free_bytes is not None and self.needed_bytes > self.free_bytes


def estimated(found: Foreseen, warm: WarmRun, expected: Pace, team: Fleet, start_seconds: float) -> Estimate:
    """Time and rates of what is left.

    expected: of one worker. start_seconds: from its start until it begins to answer.
    """
    num_rows = found.num_left / found.plan.records_per_row
    own_rows = max(1, math.ceil(num_rows / team.num_workers)) if num_rows else 0
    phases = expected.phases(own_rows)
    busy = sum(phases.values())
    per_row = [
        expected.vision + expected.prefill + expected.other + _decode_seconds(warm, expected, index)
        for index in sorted(warm.indices)
    ]
    uneven = unsteadiness(warm.steps, expected.decoding.cost) if expected.decoding else _UNCOUNTED
    spread = math.hypot(relative_error(per_row, found.num_rows_left), _MACHINE, uneven)
    if team.num_here > 1:
        spread = math.hypot(spread, _SHARED)
    elif team.num_workers > 1:
        spread = math.hypot(spread, _ELSEWHERE)
    total = start_seconds + busy
    relative = math.hypot(busy * spread, start_seconds * math.hypot(_START, uneven)) / total if total else 0.0
    work_rate = own_rows / busy if busy else 0.0
    waiting = phases["waiting for input"]
    tokens = [length.num_tokens for length in warm.all_lengths]
    mean_tokens = sum(tokens) / max(1.0, warm.num_rows)
    return Estimate(
        num_workers=team.num_workers,
        accelerators=team.accelerators,
        seconds=around(total, relative),
        start_seconds=start_seconds,
        phases=phases,
        model_rows_per_second=own_rows / (busy - waiting) if busy > waiting else 0.0,
        input_rows_per_second=1 / expected.input if expected.input else 0.0,
        rows_per_second=work_rate * team.num_workers,
        tokens_per_second=work_rate * team.num_workers * mean_tokens,
    )


def disk(config: RunConfig, found: Foreseen, seen: Survey, volume: Volume, team: Fleet, *, has_answers: bool) -> Disk:
    """What the rest of the run writes."""
    plan = found.plan
    num_rows = found.num_left / plan.records_per_row
    num_shards = math.ceil(found.num_rows_left / plan.shard_rows) if found.num_left else 0
    image_bytes = sum(row.image_bytes for row in seen.rows) / max(1, len(seen.rows))
    images = num_rows * plan.records_per_row * image_bytes if config.write.keep_images else 0.0
    shard_records = min(plan.shard_rows, found.num_rows_left) * plan.records_per_row
    per_record = volume.journal_bytes + volume.record_bytes + (2 * image_bytes if config.write.keep_images else 0.0)
    open_shards = min(num_shards, _OPEN_SHARDS * team.num_workers)
    free = None
    if not isinstance(config.output_path, ObjectPath):
        free = shutil.disk_usage(existing_parent(config.output_path)).free
    return Disk(
        data_bytes=volume.data_bytes(found.num_left, num_shards) + images,
        images_bytes=images,
        passing_bytes=open_shards * shard_records * per_record,
        inputs_bytes=found.inputs_bytes,
        has_answers=has_answers,
        free_bytes=free,
    )


def _decode_seconds(warm: WarmRun, expected: Pace, index: int) -> float:
    decoding = expected.decoding
    return sum(map(decoding.record_seconds, warm.lengths.get(index, ()))) if decoding else 0.0
