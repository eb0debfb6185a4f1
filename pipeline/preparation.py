"""What a worker process does with one row: render its prompts, open its images, run the model's processor.

    Task (Row and the keys still unanswered) -> [EncodedSample | Answer, ...]        one for each key

The row's fault becomes an error Answer here; any other exception is the program's fault and ends the run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pipeline.errors import RowFault
from pipeline.prompt.image import OpenedImage, decode_image, image_bytes
from pipeline.prompt.template import Template
from pipeline.records import Answer, EncodedSample, Fault, ImageRef, Prompt, PromptFacts, RecordKey, Row, Stage
from pipeline.tensors.processor import Processor, ProcessorSource
from pipeline.vlm.constraint import choices_problem

_KEPT_PIXELS = 1 << 24  # 50 MB of what a worker may take


@dataclass(frozen=True, slots=True)
class Task:
    """A row to prepare, and what is still to be answered about it."""

    row: Row
    keys: tuple[RecordKey, ...]


@dataclass(frozen=True, slots=True)
class PreparationOptions:
    """Everything a worker needs; sent once to each."""

    template: Template
    processor: ProcessorSource
    fingerprint: str
    max_image_pixels: int
    allow_urls: bool
    max_new_tokens: int
    max_new_tokens_column: str | None
    choices_column: str | None = None
    keep_images: bool = False  # their bytes go back with the results


class Preparation:
    """Built once in each worker process."""

    def __init__(self, options: PreparationOptions) -> None:
        self._options = options
        self.processor = Processor(options.processor)
        self._images = _Images(options)

    def __call__(self, task: Task) -> list[EncodedSample | Answer]:
        """One result for each of the task's keys."""
        row = task.row
        try:
            if row.fault is not None:
                raise RowFault(row.fault.stage, row.fault.kind, row.fault.message)
            cap, choices = self._cap(row), self._choices(row)
        except RowFault as fault:
            return errors(task, fault)
        self._images.begin_row()
        results: list[EncodedSample | Answer] = []
        for name in dict.fromkeys(key.prompt_name for key in task.keys):
            keys = [key for key in task.keys if key.prompt_name == name]
            results += self._prepared(row, keys, cap, choices)
        return [self._with_images(result, row) for result in results] if self._options.keep_images else results

    def _with_images(self, result: EncodedSample | Answer, row: Row) -> EncodedSample | Answer:
        """The bytes that the model is shown, not those that another look at the file might find."""
        return replace(result, facts=replace(result.facts, image_bytes=tuple(map(self._images.data, row.images))))

    def text(self, row: Row, prompt_name: str) -> str:
        """One prompt of a row as the model's chat template renders it.

        Raises:
            RowFault: the prompt cannot be rendered.
        """
        prompt = self._options.template.prompt(row, prompt_name, self.processor.neutral)
        return self.processor.text(prompt.messages, [])

    def _prepared(
        self, row: Row, keys: Sequence[RecordKey], cap: int | None, choices: tuple[str, ...]
    ) -> list[EncodedSample | Answer]:
        facts = PromptFacts(num_images=len(row.images))
        try:
            prompt = self._options.template.prompt(row, keys[0].prompt_name, self.processor.neutral)
            facts = PromptFacts(prompt=prompt.text, num_images=len(prompt.images), warnings=prompt.warnings)
            opened = [self._images.open(ref) for ref in prompt.images]
            facts = self._image_facts(facts, prompt, opened)
            encoded = self.processor.encode(prompt.messages, [image.image for image in opened])
        except RowFault as fault:
            return [_error(row, key, facts, fault) for key in keys]
        except MemoryError:
            memory = RowFault(Stage.DECODE, "MemoryError", "the row needs more than engine.worker_memory_bytes")
            return [_error(row, key, facts, memory) for key in keys]
        facts = replace(
            facts,
            num_prompt_tokens=encoded.num_prompt_tokens,
            num_image_tokens=encoded.num_image_tokens,
            warnings=(*facts.warnings, *encoded.warnings),
        )
        room = self._room(encoded.num_prompt_tokens, cap)
        return [
            EncodedSample(key, row.id, encoded.tensors, facts, room, encoded.image_key, encoded.compact, choices)
            for key in keys
        ]

    def _image_facts(self, facts: PromptFacts, prompt: Prompt, images: Sequence[OpenedImage]) -> PromptFacts:
        sha256 = tuple(image.sha256 for image in images)
        content = json.dumps([self._options.fingerprint, prompt.messages, sha256], sort_keys=True)
        return replace(
            facts,
            row_key=hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest(),
            image_sha256=sha256,
            image_width=tuple(image.width for image in images),
            image_height=tuple(image.height for image in images),
            warnings=(*facts.warnings, *(warning for image in images for warning in image.warnings)),
        )

    def _cap(self, row: Row) -> int | None:
        column = self._options.max_new_tokens_column
        if column is None:
            return None
        value = row.columns.get(column)
        if value is None:
            return None  # this row has no cap of its own
        try:
            cap = float(value)  # CSV has only text, and pandas makes 20.0 of 20 where a column has nulls
        except (TypeError, ValueError):
            cap = math.nan
        if isinstance(value, bool) or not cap.is_integer() or cap < 1:
            message = f"{column} is {value!r}; expected a whole number of tokens, at least 1"
            raise RowFault(Stage.TEMPLATE, "TokenCap", message)
        return int(cap)

    def _choices(self, row: Row) -> tuple[str, ...]:
        column = self._options.choices_column
        if column is None:
            return ()
        value = row.columns.get(column)
        if isinstance(value, str):  # CSV has only text
            with suppress(ValueError):
                value = json.loads(value)
        choices = [str(one) for one in value] if isinstance(value, (list, tuple)) and None not in value else []
        if problem := choices_problem(choices):
            raise RowFault(Stage.TEMPLATE, "Choices", f"{column} is {value!r:.200}: {problem}")
        return tuple(choices)

    def _room(self, num_prompt_tokens: int, cap: int | None) -> int:
        """Tokens that the answer may take: its caps, and what the prompt leaves of the model's context."""
        limits = [self._options.max_new_tokens]
        if cap is not None:
            limits.append(cap)
        if self._options.processor.max_tokens is not None:
            limits.append(self._options.processor.max_tokens - num_prompt_tokens)
        return min(limits)


class _Images:
    """The images of one row: K prompts about one image open it once, and fail on it once.

    Rows about one image that follow each other read its bytes, and decode them once.
    """

    def __init__(self, options: PreparationOptions) -> None:
        self._options = options
        self._opened: dict[ImageRef, OpenedImage | RowFault] = {}
        self._data: dict[ImageRef, bytes] = {}  # as they were read, where they are kept
        self._decoded: dict[str, OpenedImage] = {}  # by the digests of their bytes: those of the row before

    def begin_row(self) -> None:
        """The images opened since are those of the row before."""
        opened = [image for image in self._opened.values() if isinstance(image, OpenedImage)]
        small = sum(image.width * image.height for image in opened) <= _KEPT_PIXELS
        self._decoded = {image.sha256: image for image in opened} if small else {}
        self._opened, self._data = {}, {}

    def open(self, ref: ImageRef) -> OpenedImage:
        if ref not in self._opened:
            try:
                self._opened[ref] = self._decode(ref)
            except RowFault as fault:
                self._opened[ref] = fault
        found = self._opened[ref]
        if isinstance(found, RowFault):
            raise found
        return found

    def data(self, ref: ImageRef) -> bytes | None:
        """The encoded bytes of an image of the row, whether or not they could be decoded; None if it was not read."""
        return self._data.get(ref)

    def _decode(self, ref: ImageRef) -> OpenedImage:
        data = image_bytes(ref, allow_urls=self._options.allow_urls)
        if self._options.keep_images:
            self._data[ref] = data
        known = self._decoded.get(hashlib.sha256(data).hexdigest())
        if known is not None:
            return known
        self._decoded = {}  # what another row left takes no memory from this one's image
        return decode_image(ref, data, max_image_pixels=self._options.max_image_pixels)


def errors(task: Task, fault: RowFault) -> list[EncodedSample | Answer]:
    """The error records of a task that nothing is known of but its fault."""
    facts = PromptFacts(num_images=len(task.row.images))
    return [_error(task.row, key, facts, fault) for key in task.keys]


def _error(row: Row, key: RecordKey, facts: PromptFacts, fault: RowFault) -> Answer:
    return Answer(key, row.id, facts, fault=Fault(fault.stage, fault.kind, fault.message))
