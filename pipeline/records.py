"""The words of the program, in the order in which they appear.

    Row -> Prompt -> EncodedSample -> (Batch) -> Answer        every RecordKey of the plan ends in exactly one Answer

Laws: a record is never changed, the next one is made. A bad row is an Answer with a fault; a bad program is an
exception. Images travel as references (ImageRef) until a worker opens them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Stage(StrEnum):
    """Where a row failed: the values of the column error_stage."""

    READ = "read"
    DECODE = "decode"
    TEMPLATE = "template"
    ENCODE = "encode"
    GENERATE = "generate"
    WRITE = "write"


class FinishReason(StrEnum):
    """Why an answer ended: the values of the column finish_reason."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"


class RecordKey(NamedTuple):
    """What an answer is asked for: one row, one of its prompts, one of its samples. Unique in a plan."""

    row_index: int
    prompt_name: str
    sample_index: int


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that nobody has opened yet: encoded bytes, or the path or fsspec URL of a file. Exactly one is set."""

    data: bytes | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row has no answer: the columns error_stage, error_type and error_message."""

    stage: Stage
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the dataset. `columns` holds its values by name, image bytes left out, nothing decoded."""

    index: int  # position in the plan
    id: str
    images: tuple[ImageRef, ...]
    columns: Mapping[str, Any]
    messages: tuple[Mapping[str, Any], ...] | None = None  # a ready-made conversation, from dataset.messages_column
    fault: Fault | None = None  # the row could not be read (null image, torn line ...): it becomes an error record


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation about a row's images, rendered but not yet tokenised.

    `messages` are turns {"role": ..., "content": [{"type": "image"} | {"type": "text", "text": ...}, ...]}; content is
    always a list, because real chat templates drop a bare string. The n-th image part of all turns is `images[n]`.
    """

    row_index: int
    id: str
    prompt_name: str
    text: str  # the rendered user text of the last user turn: the column `prompt`
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[ImageRef, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What is known of a prompt whether or not it gets an answer: the provenance columns of the output."""

    prompt: str | None = None
    row_key: str | None = None  # hash of image bytes, rendered prompt and fingerprint
    num_prompt_tokens: int | None = None
    num_image_tokens: int | None = None
    num_images: int | None = None
    image_sha256: tuple[str, ...] = ()
    image_width: tuple[int, ...] = ()  # of the original image, in pixels
    image_height: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    image_bytes: tuple[bytes | None, ...] = ()  # encoded, of all images of the row, where the output keeps them


@dataclass(frozen=True, slots=True)
class CompactImages:
    """Image tensors as the 8-bit pixels that they are made of; pipeline.tensors.replay makes the tensors."""

    pixels: tuple[np.ndarray[Any, Any], ...]  # [height, width, 3] uint8
    recipe: Any  # pipeline.tensors.recipe.Recipe
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors, by name


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One prompt as the model's processor gives it, without padding.

    `tensors` holds the processor's output for this one sample by name (input_ids [1, T], pixel_values ...), as numpy
    arrays so that they cross a process border without torch. Those in `compact.shapes` are not among them: they have
    to be made first (pipeline.tensors.replay).
    """

    key: RecordKey
    id: str
    tensors: Mapping[str, np.ndarray[Any, Any]]
    facts: PromptFacts
    max_new_tokens: int | None = None  # this row's own cap, from generation.max_new_tokens_column
    image_key: str | None = None  # samples with equal keys give the model equal images; None without images
    compact: CompactImages | None = None
    choices: tuple[str, ...] = ()  # this row's own, from generation.choices_column: the answer is one of them

    @property
    def num_tokens(self) -> int:
        """Prompt tokens, image tokens included."""
        return int(self.tensors["input_ids"].shape[-1])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that the model will be given, by name and in its order; compact ones too."""
        shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in self.tensors.items()}
        return dict(sorted((shapes | dict(self.compact.shapes if self.compact else {})).items()))

    @property
    def num_bytes(self) -> int:
        """What the sample's arrays hold."""
        arrays = [*self.tensors.values(), *(self.compact.pixels if self.compact else ())]
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a RecordKey: a response, or the fault that stands in its place."""

    key: RecordKey
    id: str
    facts: PromptFacts = field(default_factory=PromptFacts)
    response: str | None = None
    finish_reason: FinishReason | None = None
    num_generated_tokens: int | None = None
    fault: Fault | None = None
    response_json: str | None = None  # of a constrained answer that came to be what it has to be
    parse_ok: bool | None = None  # whether it did; None where answers are free


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows start <= row_index < stop: the unit of publication and of resume."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}"
