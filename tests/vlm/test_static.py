"""The static engine: a batch never changes an answer, and nothing that goes wrong costs a neighbour."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    EOS,
    PAD,
    batch_of_one,
    family,
    samples,
    stream,
    tokenizer,
)

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, FinishReason, RecordKey
from pipeline.tensors.batch import Batcher
from pipeline.vlm.answer import Ending
from pipeline.vlm.generation import GenerationSettings, SamplingSettings
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.static import StaticEngine

CAP = 12
CAPS = (12, 3, 7, 12, 4, 9)  # of the ragged rows
TOLERANCE = 1e-5  # of the largest logit


@dataclass
class Stop:
    """A request to stop, or none."""

    requested: bool = False
    expired: bool = False


class Recorder(Sampler):
    """A sampler that keeps the logits it was shown, by row and step."""

    def __init__(self, settings: SamplingSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.seen: dict[tuple[int, int], torch.Tensor] = {}

    def choose(
        self,
        logits_BV: torch.Tensor,
        samples: Sequence[EncodedSample],
        steps: Sequence[int],
        seen_BV: torch.Tensor | None = None,
        allowed_BV: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for logits_V, sample, step in zip(logits_BV, samples, steps, strict=True):
            self.seen.setdefault((sample.key.row_index, step), logits_V.clone())
        return super().choose(logits_BV, samples, steps, seen_BV, allowed_BV)


def engine_of(
    model: Any,
    *,
    max_rows: int = 8,
    max_tokens: int = 100_000,
    eos_ids: Sequence[int] = (EOS,),
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    settings: SamplingSettings | None = None,
    signal: Stop | None = None,
    is_encoder_decoder: bool = False,
    processors: dict[str, Any] | None = None,
    forward: dict[str, Any] | None = None,
) -> StaticEngine:
    loaded = LoadedModel(model, tokenizer(), torch.device("cpu"), tuple(eos_ids), PAD, is_encoder_decoder)
    batcher = Batcher(max_rows=max_rows, max_tokens=max_tokens, max_new_tokens=CAP, pad_id=PAD)
    sampling = settings or SamplingSettings(do_sample=False)
    engine = StaticEngine(
        loaded,
        batcher,
        Recorder(sampling, seed=7),
        Ending(tokenizer(), eos_ids=eos_ids, stop=stop, ignore_eos=ignore_eos),
        settings=GenerationSettings(sampling, processors or {}, forward or {}),
        max_new_tokens=CAP,
        stop=signal or Stop(),
    )
    if isinstance(model, Faulty):  # its calls are counted
        engine._fit._try = lambda group: None  # type: ignore[method-assign]
    return engine


def answers_of(engine: StaticEngine, given: list[EncodedSample]) -> list[Answer]:
    """In the order of the rows; each row has exactly one."""
    answers = sorted(engine.answers(stream(given)), key=lambda answer: answer.key)
    assert [answer.key for answer in answers] == [sample.key for sample in given]
    return answers


def logits_of(engine: StaticEngine) -> dict[tuple[int, int], torch.Tensor]:
    recorder = engine._choose._sampler
    assert isinstance(recorder, Recorder)
    return recorder.seen


def ragged(name: str, **options: Any) -> list[EncodedSample]:
    return [replace(sample, max_new_tokens=cap) for sample, cap in zip(samples(name, **options), CAPS, strict=True)]


@cache
def alone(name: str) -> tuple[list[list[int]], list[torch.Tensor]]:
    """transformers' own generate() for each row by itself: tokens, and logits [steps, V]. No end token is obeyed."""
    tokens, logits = [], []
    for sample in samples(name):
        found = family(name).model.generate(
            **batch_of_one(sample),
            do_sample=False,
            max_new_tokens=CAP,
            eos_token_id=NEVER,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(found.sequences[0, -CAP:].tolist())
        logits.append(torch.cat(found.logits))
    return tokens, logits


NEVER = 299_999  # no token has this number


def words(tokens: Sequence[int]) -> str:
    return str(tokenizer().decode(list(tokens), skip_special_tokens=True)).strip()


# A batch never changes an answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_ragged_batch_gives_the_tokens_and_logits_of_generate_on_each_row_alone(name: str) -> None:
    tokens, logits = alone(name)
    # Rows also end by an end token, each at its own step.
    eos_ids = sorted({tokens[0][5], tokens[3][8]})
    engine = engine_of(family(name).model, eos_ids=eos_ids)
    answers = answers_of(engine, ragged(name))
    seen = logits_of(engine)
    for row, (answer, cap) in enumerate(zip(answers, CAPS, strict=True)):
        ends = [step + 1 for step, token in enumerate(tokens[row][:cap]) if token in eos_ids]
        length = min([cap, *ends])
        assert answer.fault is None
        assert answer.response == words(tokens[row][:length])
        assert answer.num_generated_tokens == length
        assert answer.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
        for step in range(length):
            error = (seen[row, step] - logits[row][step]).abs().max()
            assert error <= TOLERANCE * logits[row].abs().max(), (row, step)
    assert engine.counts.num_batches == 1


@pytest.mark.parametrize("name", ["smolvlm", "idefics2", "qwen2_5_vl"])
@pytest.mark.parametrize("text_only", [False, True])
def test_batches_of_one_and_three_and_all_give_the_same(name: str, text_only: bool) -> None:
    """Fault 52: batches of 1, 3 and 6 ragged rows in float32 give the same answers."""
    given = ragged(name, text_only=text_only)
    results = [answers_of(engine_of(family(name).model, max_rows=rows), given) for rows in (1, 3, 6)]
    assert results[0] == results[1] == results[2]


def test_rows_with_and_without_images_are_answered_side_by_side() -> None:
    without = [replace(one, key=one.key._replace(row_index=10 + i)) for i, one in enumerate(samples("llava", 3))]
    text = samples("llava", 3, text_only=True)
    both = [*text, *without]
    assert answers_of(engine_of(family("llava").model), both) == [
        *answers_of(engine_of(family("llava").model), text),
        *answers_of(engine_of(family("llava").model), without),
    ]


def test_finished_rows_leave_the_batch() -> None:
    engine = engine_of(family("smolvlm").model, ignore_eos=True)
    answers_of(engine, ragged("smolvlm"))
    steps = max(CAPS) - 1
    assert engine.counts.num_decode_steps == steps
    # Without leaving it would be 6 * steps; leaving at once, the sum of what each row needs.
    needed = sum(cap - 1 for cap in CAPS)
    assert needed <= engine.counts.num_decode_rows <= needed + 4
    assert engine.counts.num_decode_rows < 6 * steps
    assert engine.counts.num_generated_tokens == sum(CAPS)


def test_counts_tell_prompt_tokens_from_padding() -> None:
    engine = engine_of(family("llava").model)
    given = samples("llava")
    answers_of(engine, given)
    lengths = [sample.num_tokens for sample in given]
    assert engine.counts.num_prompt_tokens == sum(lengths)
    assert engine.counts.num_padded_prompt_tokens == 6 * max(lengths)


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
def test_repetition_penalty_is_that_of_each_row_alone(name: str) -> None:
    penalty = 1.7
    settings = SamplingSettings(do_sample=False, repetition_penalty=penalty)
    answers = answers_of(engine_of(family(name).model, settings=settings, ignore_eos=True), samples(name))
    plain = answers_of(engine_of(family(name).model, ignore_eos=True), samples(name))
    for sample, answer in zip(samples(name), answers, strict=True):
        found = family(name).model.generate(
            **batch_of_one(sample),
            do_sample=False,
            max_new_tokens=CAP,
            eos_token_id=NEVER,
            repetition_penalty=penalty,
        )
        assert answer.response == words(found[0, -CAP:].tolist())
    assert [answer.response for answer in answers] != [answer.response for answer in plain]


def test_repetition_penalty_does_not_count_padding() -> None:
    # Every row wants to say the padding token first; in a batch the shorter ones are padded with it.
    model = family("smolvlm").model
    settings = SamplingSettings(do_sample=False, repetition_penalty=5.0)
    given = samples("smolvlm")
    together, apart = engine_of(model, settings=settings), engine_of(model, settings=settings, max_rows=1)
    for engine in (together, apart):
        engine._batcher.pad_id = alone("smolvlm")[0][0][0]  # type: ignore[attr-defined]
    assert answers_of(together, given) == answers_of(apart, given)


def test_the_users_cache_setting_in_a_checkpoint_does_not_matter() -> None:
    model = family("llava").model
    expected = answers_of(engine_of(model), samples("llava"))
    before = model.generation_config
    try:
        model.generation_config = replace_settings(before, use_cache=False, num_beams=3, num_return_sequences=2)
        assert answers_of(engine_of(model), samples("llava")) == expected
        model.generation_config = replace_settings(before, cache_implementation="static", do_sample=True, top_k=3)
        assert answers_of(engine_of(model), samples("llava")) == expected
    finally:
        model.generation_config = before


def replace_settings(settings: Any, **changes: Any) -> Any:
    changed = type(settings).from_dict(settings.to_dict())
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.parametrize("max_rows", [1, 6])
def test_an_encoder_decoder_answers_as_its_generate_does(max_rows: int) -> None:
    model = family("t5gemma2").model
    given = ragged("t5gemma2")
    engine = engine_of(model, is_encoder_decoder=True, max_rows=max_rows, ignore_eos=True)
    answers = answers_of(engine, given)
    for sample, answer in zip(given, answers, strict=True):
        found = model.generate(
            **batch_of_one(sample), do_sample=False, max_new_tokens=sample.max_new_tokens, eos_token_id=NEVER
        )
        assert answer.response == words(found[0, 1:].tolist())
        assert answer.num_generated_tokens == sample.max_new_tokens
        assert answer.finish_reason is FinishReason.LENGTH


def test_an_encoder_decoder_samples_and_stops_by_the_same_rules() -> None:
    model = family("t5gemma2").model
    settings = SamplingSettings(do_sample=True, temperature=2.0, repetition_penalty=1.3)
    given = ragged("t5gemma2")
    results = [
        answers_of(engine_of(model, is_encoder_decoder=True, max_rows=rows, settings=settings), given)
        for rows in (1, 6)
    ]
    assert results[0] == results[1]
    greedy = answers_of(engine_of(model, is_encoder_decoder=True), given)
    assert [one.response for one in results[0]] != [one.response for one in greedy]


# Where an answer ends ------------------------------------------------------------------------------------------------


def test_the_end_token_counts_and_is_not_part_of_the_text() -> None:
    tokens = alone("smolvlm")[0][0]
    eos = tokens[3]
    assert eos not in tokens[:3]
    [answer] = answers_of(engine_of(family("smolvlm").model, eos_ids=[eos, EOS]), samples("smolvlm", 1))
    assert answer.finish_reason is FinishReason.STOP
    assert answer.num_generated_tokens == 4
    [ended] = answers_of(engine_of(family("smolvlm").model, ignore_eos=True, eos_ids=[eos]), samples("smolvlm", 1))
    assert ended.finish_reason is FinishReason.LENGTH
    assert ended.num_generated_tokens == CAP


def test_an_end_token_at_the_cap_is_a_stop() -> None:
    tokens = alone("smolvlm")[0][0]
    [answer] = answers_of(engine_of(family("smolvlm").model, eos_ids=[tokens[3]]), samples("smolvlm", 1, cap=4))
    assert (answer.finish_reason, answer.num_generated_tokens) == (FinishReason.STOP, 4)


def test_a_stop_string_ends_the_answer_and_is_cut_off() -> None:
    tokens = alone("smolvlm")[0][0]
    engine = engine_of(family("smolvlm").model, stop=[f"w{tokens[2]} w{tokens[3]}"], ignore_eos=True)
    [answer] = answers_of(engine, samples("smolvlm", 1))
    assert answer.response == words(tokens[:2])
    assert answer.finish_reason is FinishReason.STOP
    assert answer.num_generated_tokens == 4


# What goes wrong -----------------------------------------------------------------------------------------------------


class Faulty:
    """A model whose generate() first asks `check` whether it may, given the batch."""

    def __init__(self, model: Any, check: Callable[[dict[str, torch.Tensor]], None]) -> None:
        self._model, self._check = model, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **arguments: Any) -> Any:
        self._check(arguments)
        return self._model.generate(**arguments)


def test_out_of_memory_halves_the_batch_until_it_fits_and_the_budget_recovers() -> None:
    """Fault 48: out of memory halves the batch until it fits; later batches are of full size again."""
    sizes: list[int] = []

    def check(batch: dict[str, torch.Tensor]) -> None:
        sizes.append(len(batch["input_ids"]))
        if len(sizes) < 30 and sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    model = family("llava").model
    short = samples("llava", 4, cap=1)
    given = [replace(short[row % 4], key=RecordKey(row, "default", 0)) for row in range(200)]
    engine = engine_of(Faulty(model, check), max_rows=8, max_tokens=400)
    answers = answers_of(engine, given)
    assert answers == answers_of(engine_of(model, max_rows=8), given)
    assert sizes[:4] == [8, 4, 2, 2]
    assert sizes[-2] == 8  # full size again; the last batch is what is left
    assert engine.counts.num_out_of_memory == sum(size > 2 for size in sizes[:29])
    assert (engine._batcher.max_rows, engine._batcher.max_tokens) == (8, 400)


def test_a_row_that_never_fits_is_recorded_and_does_not_shrink_the_others_to_nothing() -> None:
    """Fault 48: a row that fits no memory is an error row; the others are answered as without it."""

    def check(batch: dict[str, torch.Tensor]) -> None:
        if (batch["input_ids"] == 285).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 900.00 GiB\nmore lines")

    model = family("llava").model
    given = poisoned(samples("llava", 8), 5)
    engine = engine_of(Faulty(model, check))
    answers = answers_of(engine, given)
    assert (answers[5].fault.kind, answers[5].fault.stage) == ("OutOfMemoryError", "generate")  # type: ignore[union-attr]
    assert answers[5].fault.message == "CUDA out of memory. Tried to allocate 900.00 GiB"  # type: ignore[union-attr]
    assert answers[5].response is answers[5].num_generated_tokens is None
    clean = answers_of(engine_of(model), samples("llava", 8))
    assert [a for a in answers if a.fault is None] == [a for a in clean if a.key.row_index != 5]
    assert engine._batcher.max_rows >= 1


def test_a_poison_row_is_isolated_and_its_neighbours_are_answered_as_ever() -> None:
    def check(batch: dict[str, torch.Tensor]) -> None:
        if (batch["input_ids"] == 285).any():
            raise ValueError("image features and image tokens do not match")

    model = family("qwen2_vl").model
    answers = answers_of(engine_of(Faulty(model, check)), poisoned(samples("qwen2_vl"), 2))
    assert answers[2].fault is not None
    assert (answers[2].fault.kind, answers[2].fault.message) == (
        "ValueError",
        "image features and image tokens do not match",
    )
    clean = answers_of(engine_of(model), samples("qwen2_vl"))
    assert [a for a in answers if a.fault is None] == [a for a in clean if a.key.row_index != 2]


def poisoned(given: list[EncodedSample], row: int) -> list[EncodedSample]:
    """One row's last word is 285, which no other row has."""
    input_ids = given[row].tensors["input_ids"].copy()
    input_ids[0, -1] = 285
    return [
        replace(one, tensors=dict(one.tensors) | {"input_ids": input_ids}) if number == row else one
        for number, one in enumerate(given)
    ]


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_finite_become_an_error_row_and_harm_nobody(do_sample: bool) -> None:
    """Fault 49: NaN logits are an error row that names the step; no text is stored, no neighbour changes."""
    model = family("smolvlm").model
    weight = model.get_input_embeddings().weight
    settings = SamplingSettings(do_sample=do_sample)
    clean = answers_of(engine_of(model, settings=settings), samples("smolvlm"))
    before = weight[285].clone()
    try:
        weight[285] = torch.nan
        answers = answers_of(engine_of(model, settings=settings), poisoned(samples("smolvlm"), 1))
    finally:
        weight[285] = before
    assert answers[1].fault is not None
    assert answers[1].fault.kind == "NonFiniteLogits"
    assert "step 0" in answers[1].fault.message
    assert answers[1].response is None
    assert [a for a in answers if a.fault is None] == [a for a in clean if a.key.row_index != 1]


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access was encountered", "device-side assert"])
def test_a_broken_accelerator_ends_the_run(message: str) -> None:
    def check(batch: dict[str, torch.Tensor]) -> None:
        raise RuntimeError(message)

    with pytest.raises(RunFailed, match=message):
        answers_of(engine_of(Faulty(family("llava").model, check)), samples("llava"))


def test_a_failed_batch_leaves_no_tensors_behind() -> None:
    """Fault 48: after out of memory nothing holds the tensors of the failed batch."""
    held: list[weakref.ref[torch.Tensor]] = []

    def check(batch: dict[str, torch.Tensor]) -> None:
        held.append(weakref.ref(batch["pixel_values"]))
        raise torch.OutOfMemoryError("out of memory")

    engine = engine_of(Faulty(family("llava").model, check))
    results = engine.answers(stream(samples("llava", 2)))
    next(results)
    gc.collect()
    assert len(held) == 3
    assert [ref() for ref in held] == [None] * 3


# Interruption --------------------------------------------------------------------------------------------------------


def test_after_a_stop_request_no_further_batch_begins() -> None:
    signal = Stop()
    engine = engine_of(family("llava").model, max_rows=2, signal=signal)
    results = engine.answers(stream(samples("llava")))
    next(results)
    signal.requested = True
    assert len(list(results)) == 1  # the rest of the batch that was at work
    assert engine.counts.num_batches == 1


def test_an_expired_grace_period_gives_up_the_batch() -> None:
    with pytest.raises(Interrupted):
        answers_of(engine_of(family("llava").model, signal=Stop(expired=True)), samples("llava"))


def test_an_expired_grace_period_keeps_what_is_finished() -> None:
    engine = engine_of(family("llava").model, signal=Stop(expired=True))
    assert all(answer.response for answer in answers_of(engine, samples("llava", cap=1)))


def test_a_row_is_computed_in_the_models_arithmetic_whatever_its_image_came_in() -> None:
    given = samples("llava", 2)
    doubled = [
        replace(one, tensors=dict(one.tensors) | {"pixel_values": one.tensors["pixel_values"].astype(np.float64)})
        for one in given
    ]
    assert answers_of(engine_of(family("llava").model), doubled) == answers_of(engine_of(family("llava").model), given)
