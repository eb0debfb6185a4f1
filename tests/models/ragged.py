"""Ragged samples of an architecture, through our Processor where its class can be had; an engine over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_checkpoints import ARCHITECTURES, BOS, PAD, built

from pipeline.errors import RowFault
from pipeline.records import Answer, EncodedSample, PromptFacts, RecordKey
from pipeline.tensors.batch import Batcher
from pipeline.tensors.processor import Processor, ProcessorSource
from pipeline.vlm.answer import Ending
from pipeline.vlm.generation import GenerationSettings, SamplingSettings
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.options import SlotsConfig
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.slots.engine import SlotsEngine
from pipeline.vlm.static import StaticEngine

# The eight rows: (width, height) of the image in pixels, how often the question is said, tokens of the answer.
SIZES = ((40, 40), (120, 60), (60, 120), (56, 44), (90, 40), (200, 50), (43, 77), (64, 64))
_REPEATS = (1, 6, 4, 2, 7, 5, 3, 1)
_CAPS = (6, 2, 4, 6, 3, 5, 6, 1)
_NUM_ROWS, _NUM_STEPS = len(SIZES), max(_CAPS)
_NO_END_TOKEN = 299_999


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For the module that imports it. Tiny kernels: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Measurement:
    """One architecture, eight rows: what docs/models.md says of it."""

    several_images: bool
    text_only: bool
    counts_image_tokens: bool
    own_loop: bool  # transformers' loop generates
    pads_tokens: bool
    pads_images: bool
    error: float  # largest logit difference to batches of one, of the largest logit
    slots: bool  # the slots engine serves all these rows itself
    slots_error: float  # the same through engine=auto, be it in slots or in padded batches
    image_effect: float  # what another image changes, of the largest logit
    largest_batch: int


@cache
def measured(name: str) -> Measurement:
    """Eight rows in batches against each alone: images of many sizes, some rows about two; then rows without any."""
    several, text_only = takes(name, 2), takes(name, 0)
    given = [sample(name, row, num_images=2 if several and row % 3 == 2 else 1) for row in range(_NUM_ROWS)]
    if text_only:
        given += [sample(name, row, num_images=0, number=_NUM_ROWS + row) for row in range(_NUM_ROWS)]
    engine, slots = Observed(name), Observed(name, engine="slots")
    error, slots_error = engine.error(given), slots.error(given)
    one, other = (alone(name, sample(name, 0, seed=seed))[0] for seed in (0, 1))
    return Measurement(
        several_images=several,
        text_only=text_only,
        counts_image_tokens=given[0].facts.num_image_tokens is not None,
        own_loop=engine.own_loop,
        pads_tokens=engine.batcher.may_pad_tokens,
        pads_images=engine.batcher.may_pad_images,
        error=error,
        slots=slots.serves(given),
        slots_error=slots_error,
        image_effect=difference(one, other),
        largest_batch=engine.largest_batch,
    )


def takes(name: str, num_images: int) -> bool:
    """Whether a row may have that many images: the processor takes it, and the model answers it."""
    try:
        given = sample(name, 0, num_images=num_images)
    except RowFault:
        return False
    [answer] = Observed(name).answers([given])
    return answer.fault is None


def sample(name: str, row: int, *, num_images: int = 1, seed: int = 0, number: int | None = None) -> EncodedSample:
    """A row's prompt and images; the seed changes the images alone. number: the row's own, where it is not `row`."""
    random = np.random.default_rng([seed, row])
    question = "What is it? " * _REPEATS[row]
    if built(name).processor is None:
        tensors, num_image_tokens = _by_hand(name, question, row, num_images, random)
    else:
        width, height = SIZES[row]
        images = [picture(random, *size) for size in ((width, height), (height, width))[:num_images]]
        encoded = processor_of(name).encode(conversation(name, question, num_images), images)
        tensors, num_image_tokens = dict(encoded.tensors), encoded.num_image_tokens
    facts = PromptFacts(num_image_tokens=num_image_tokens)
    number = row if number is None else number
    image_key = f"{name} {row} {num_images} {seed}" if num_images else None
    return EncodedSample(RecordKey(number, "default", 0), f"row {number}", tensors, facts, _CAPS[row], image_key)


def questions(name: str, row: int, num_questions: int) -> list[EncodedSample]:
    """Several prompts about one image that differ in some letters of the question, which is said several times."""
    found = []
    one = sample(name, row)
    for number in range(num_questions):
        tensors = {key: array.copy() for key, array in one.tensors.items()}
        letters = tensors["input_ids"][0]
        places = np.flatnonzero(letters == built(name).tokenizer("t").input_ids[-1])
        letters[places[len(places) // 2 :]] += number  # from the middle of the question on
        key = RecordKey(row, f"question {number}", 0)
        found.append(replace(one, key=key, tensors=tensors))
    return found


def conversation(name: str, question: str, num_images: int) -> list[dict[str, Any]]:
    """A question in the family's form, images first."""
    plain = ARCHITECTURES[name].plain
    text = question if plain is None else plain.format(question=question)
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(num_images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text, "verbatim": plain is not None}]}]


@cache
def processor_of(name: str) -> Processor:
    """Our processor around the family's, without a folder: its class may need what is not installed to be loaded."""
    with mock.patch.object(transformers.AutoProcessor, "from_pretrained", return_value=built(name).processor):
        return Processor(ProcessorSource(name, plain=ARCHITECTURES[name].plain is not None))


def alone(name: str, given: EncodedSample) -> torch.Tensor:
    """transformers' own generate() on one row: logits [steps, V]."""
    batch = {key: torch.from_numpy(array.copy()) for key, array in given.tensors.items()}
    found = built(name).model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=_NUM_STEPS,
        eos_token_id=_NO_END_TOKEN,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(found.logits)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the first's largest logit."""
    return float((one - other).abs().max() / one.abs().max())


class Observed:
    """An engine over eight rows of an architecture, and the logits that its sampler was shown.

    Slots are five: fewer than rows, so that rows enter while others are in the middle of their answers.
    """

    def __init__(self, name: str, max_rows: int = _NUM_ROWS, engine: str = "static", **options: Any) -> None:
        self._name, found = name, built(name)
        self.batcher = Batcher(max_rows=max_rows, max_tokens=100_000, max_new_tokens=_NUM_STEPS, pad_id=PAD)
        sampling = SamplingSettings(do_sample=False)
        self._sampler = _Recorder(sampling, seed=7)
        is_encoder_decoder = bool(getattr(found.model.config, "is_encoder_decoder", False))
        loaded = LoadedModel(found.model, found.tokenizer, torch.device("cpu"), (), PAD, is_encoder_decoder)
        parts: dict[str, Any] = {
            "loaded": loaded,
            "batcher": self.batcher,
            "sampler": self._sampler,
            "ending": Ending(found.tokenizer, eos_ids=(), stop=(), ignore_eos=True),
            "settings": GenerationSettings(sampling, {}, {}),
            "max_new_tokens": _NUM_STEPS,
            "stop": _Going(),
        }
        self._static = StaticEngine(**parts)
        self.engine: StaticEngine | SlotsEngine = self._static
        if engine == "slots" and not is_encoder_decoder:
            config = SlotsConfig(max_batch_rows=5, **options)
            self.engine = SlotsEngine(**parts, static=self._static, options=config)

    def serves(self, given: Sequence[EncodedSample]) -> bool:
        """Whether the slots answered all of these."""
        if not isinstance(self.engine, SlotsEngine):
            return False
        return all(self.engine.fit.verdicts.get(frozenset(row.shapes), False) for row in given)

    @property
    def own_loop(self) -> bool:
        return self._static._fit.own_loop

    @property
    def largest_batch(self) -> int:
        return max(self._sampler.num_rows)

    def answers(self, given: Sequence[EncodedSample]) -> list[Answer]:
        """In the order in which they finish."""
        return list(self.engine.answers(iter(given)))

    def error(self, given: Sequence[EncodedSample]) -> float:
        """The largest difference to each row alone, over all steps up to the first that chose another token."""
        answers = {answer.key: answer for answer in self.answers(given)}
        worst = 0.0
        for row in given:
            assert answers[row.key].fault is None, answers[row.key].fault
            assert answers[row.key].num_generated_tokens == row.max_new_tokens
            for step, truth_V in enumerate(alone(self._name, row)[: row.max_new_tokens]):
                found_V = self._sampler.seen[row.key, step]
                worst = max(worst, difference(truth_V, found_V))
                if found_V.argmax() != truth_V.argmax():  # a tie, or the difference above tells
                    break
        return worst


class _Recorder(Sampler):
    """Keeps the logits it is shown, by row and step, and how many rows each batch had."""

    def __init__(self, settings: SamplingSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.seen: dict[tuple[RecordKey, int], torch.Tensor] = {}
        self.num_rows: list[int] = []

    def choose(
        self,
        logits_BV: torch.Tensor,
        samples: Sequence[EncodedSample],
        steps: Sequence[int],
        seen_BV: torch.Tensor | None = None,
        allowed_BV: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_rows.append(len(samples))
        for logits_V, one, step in zip(logits_BV, samples, steps, strict=True):
            self.seen.setdefault((one.key, step), logits_V.clone())
        return super().choose(logits_BV, samples, steps, seen_BV, allowed_BV)


class _Going:
    requested = expired = False


def picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A colour with noise."""
    colour = random.integers(40, 216, 3)
    pixels = colour + random.integers(-40, 40, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _by_hand(
    name: str, question: str, row: int, num_images: int, random: np.random.Generator
) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """What the family's processor would give, where its class cannot be imported: images first, then the question."""
    by_hand, tokenizer = ARCHITECTURES[name].by_hand, built(name).tokenizer
    assert by_hand is not None
    images = [by_hand(tokenizer, random, row + number) for number in range(num_images)]
    tokens = [BOS, *(token for image in images for token in image.tokens), *tokenizer(question).input_ids]
    input_ids = np.asarray([tokens])
    tensors = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
    for key in images[0].tensors if images else ():
        arrays = [image.tensors[key] for image in images]
        shape = np.max([array.shape for array in arrays], axis=0)
        padded = [
            np.pad(a, [(0, 0), *((0, w - h) for w, h in zip(shape[1:], a.shape[1:], strict=True))]) for a in arrays
        ]
        tensors[key] = np.concatenate(padded)
    return tensors, int((input_ids == tokens[2]).sum()) if images else 0
