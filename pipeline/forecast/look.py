"""What a worker process makes of a sampled row: what is known of its prompts, and how long that took. No tensors.

With a processor the row is prepared as for a run; without one its prompts are rendered and its images opened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.errors import RowFault
from pipeline.preparation import Preparation, PreparationOptions, Task
from pipeline.prompt.image import decode_image, image_bytes
from pipeline.prompt.template import Template
from pipeline.records import Answer, Fault, ImageRef, PromptFacts, RecordKey, Stage


@dataclass(frozen=True, slots=True)
class SeenPrompt:
    """One prompt of a row."""

    name: str
    facts: PromptFacts  # without image bytes
    num_bytes: int = 0  # of what the engine would be given
    max_new_tokens: int | None = None  # room for the answer
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class SeenRow:
    """One row. Rows of one worker come in the order of `number`, from 0."""

    index: int
    id: str
    columns: Mapping[str, Any]  # of the input
    prompts: tuple[SeenPrompt, ...]
    image_bytes: int  # encoded
    seconds: float  # to read, decode and encode it
    cpu_seconds: float  # of these, what the worker computed
    worker: int
    number: int

    @property
    def fault(self) -> Fault | None:
        """Of the row, or of the first of its prompts that cannot be asked."""
        return next((prompt.fault for prompt in self.prompts if prompt.fault), None)


@dataclass(frozen=True, slots=True)
class OpeningOptions:
    """What has to be known to look at a row without a processor."""

    template: Template
    max_image_pixels: int
    allow_urls: bool


def preparing(options: PreparationOptions) -> Look:
    """Looks at rows with the model's processor; built in a worker."""
    prepared = Preparation(replace(options, keep_images=True))  # the bytes are counted, and stay in the worker

    def seen(task: Task) -> tuple[list[SeenPrompt], int]:
        results = prepared(task)
        found: dict[str, SeenPrompt] = {}
        num_bytes = 0
        for item in results:
            num_bytes = max(num_bytes, sum(len(data or b"") for data in item.facts.image_bytes))
            facts = replace(item.facts, image_bytes=())
            if isinstance(item, Answer):
                found.setdefault(item.key.prompt_name, SeenPrompt(item.key.prompt_name, facts, fault=item.fault))
            else:
                size, room = item.num_bytes, item.max_new_tokens
                found.setdefault(item.key.prompt_name, SeenPrompt(item.key.prompt_name, facts, size, room))
        return list(found.values()), num_bytes

    return Look(seen)


def opening(options: OpeningOptions) -> Look:
    """Looks at rows without a processor; built in a worker."""
    return Look(partial(_opened, options))


class Look:
    """Applied to one task after the other by a worker."""

    def __init__(self, see: Callable[[Task], tuple[list[SeenPrompt], int]]) -> None:
        self._see = see
        self._number = -1

    def __call__(self, task: Task) -> SeenRow:
        self._number += 1
        began, cpu_began = time.perf_counter(), time.process_time()
        prompts, image_bytes = self._see(task)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        row = task.row
        return SeenRow(
            row.index, row.id, row.columns, tuple(prompts), image_bytes, seconds, cpu_seconds, os.getpid(), self._number
        )


def lost(task: Task, kind: str, reason: str) -> SeenRow:
    """A row that no worker could finish."""
    fault = Fault(Stage.DECODE, kind, f"the row {reason}")
    prompts = tuple(SeenPrompt(name, PromptFacts(), fault=fault) for name in _names(task.keys))
    return SeenRow(task.row.index, task.row.id, task.row.columns, prompts, 0, 0.0, 0.0, 0, 0)


def _opened(options: OpeningOptions, task: Task) -> tuple[list[SeenPrompt], int]:
    row = task.row
    opened: dict[ImageRef, tuple[str, int, int] | RowFault] = {}
    num_bytes = 0
    found = []
    for name in _names(task.keys):
        facts = PromptFacts(num_images=len(row.images))
        try:
            prompt = options.template.prompt(row, name)
            facts = PromptFacts(prompt=prompt.text, num_images=len(prompt.images), warnings=prompt.warnings)
            images = []
            for ref in prompt.images:
                if ref not in opened:
                    opened[ref], size = _image(ref, options)
                    num_bytes += size
                image = opened[ref]
                if isinstance(image, RowFault):
                    raise image
                images.append(image)
            sha256, width, height = zip(*images, strict=True) if images else ((), (), ())
            facts = replace(facts, image_sha256=sha256, image_width=width, image_height=height)
            found.append(SeenPrompt(name, facts))
        except RowFault as fault:
            found.append(SeenPrompt(name, facts, fault=Fault(fault.stage, fault.kind, fault.message)))
        except MemoryError:
            memory = Fault(Stage.DECODE, "MemoryError", "the row needs more than engine.worker_memory_bytes")
            found.append(SeenPrompt(name, facts, fault=memory))
    return found, num_bytes


def _image(ref: ImageRef, options: OpeningOptions) -> tuple[tuple[str, int, int] | RowFault, int]:
    """Hash, width and height, or why not; and the encoded bytes."""
    size = 0
    try:
        data = image_bytes(ref, allow_urls=options.allow_urls)
        size = len(data)
        image = decode_image(ref, data, max_image_pixels=options.max_image_pixels)
        return (image.sha256, image.width, image.height), size
    except RowFault as fault:
        return fault, size


def _names(keys: Sequence[RecordKey]) -> list[str]:
    return list(dict.fromkeys(key.prompt_name for key in keys))
