"""The slots engine: the answers of padded batches in any order, and nothing that goes wrong costs a neighbour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_static import CAP, CAPS, Stop, alone, poisoned
from tiny_models import EOS, PAD, family, sample, samples, stream, tokenizer

from pipeline.errors import Interrupted, RunFailed
from pipeline.records import Answer, EncodedSample, RecordKey
from pipeline.tensors.batch import Batcher
from pipeline.vlm.answer import Ending
from pipeline.vlm.generation import GenerationSettings, SamplingSettings
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.options import DecodeAttention, SlotsConfig
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.slots import engine as engine_module
from pipeline.vlm.slots import speedups
from pipeline.vlm.slots.engine import SlotsEngine
from pipeline.vlm.slots.loop import Decoder, SlotLoop
from pipeline.vlm.slots.prefill import Prefill
from pipeline.vlm.static import StaticEngine

GREEDY = SamplingSettings(do_sample=False)
SAMPLED = SamplingSettings(do_sample=True, temperature=1.5, top_k=40, top_p=0.9, repetition_penalty=1.3)


def engines_of(
    name: str = "llava",
    *,
    num_slots: int = 4,
    sampling: SamplingSettings = GREEDY,
    signal: Stop | None = None,
    ending: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[SlotsEngine, StaticEngine]:
    """The slots, and padded batches with the same settings."""
    ends: dict[str, Any] = {"eos_ids": [EOS], "stop": (), "ignore_eos": False} | (ending or {})

    def parts() -> dict[str, Any]:
        return {
            "loaded": LoadedModel(family(name).model, tokenizer(), torch.device("cpu"), (EOS,), PAD, False),
            "batcher": Batcher(max_rows=num_slots, max_tokens=100_000, max_new_tokens=CAP, pad_id=PAD),
            "sampler": Sampler(sampling, seed=7),
            "ending": Ending(tokenizer(), **ends),
            "settings": GenerationSettings(sampling, {}, {}),
            "max_new_tokens": CAP,
            "stop": signal or Stop(),
        }

    ours = parts()
    slots = SlotsEngine(**ours, static=StaticEngine(**ours), options=SlotsConfig(max_batch_rows=num_slots, **options))
    return slots, StaticEngine(**parts())


def many(name: str = "llava", count: int = 18) -> list[EncodedSample]:
    """Six prompts with their images, again and again, with caps of their own."""
    given = samples(name)
    return [
        replace(given[row % 6], key=RecordKey(row, "default", 0), id=f"row {row}", max_new_tokens=CAPS[row % 5])
        for row in range(count)
    ]


def answers_of(engine: SlotsEngine | StaticEngine, given: list[EncodedSample]) -> list[Answer]:
    """In the order of the rows; each row has exactly one."""
    answers = sorted(engine.answers(stream(given)), key=lambda answer: answer.key)
    assert [answer.key for answer in answers] == sorted(one.key for one in given)
    return answers


def tried(engine: SlotsEngine, given: list[EncodedSample]) -> SlotsEngine:
    """After its trials, so that what follows can be counted."""
    assert all(answer.fault is None for answer in answers_of(engine, given[:2]))
    assert all(engine.fit.verdicts.values())
    engine.counts = type(engine.counts)()
    return engine


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str, Callable[..., None]], None]:
    """Has a method ask `check` first whether it may go on."""

    def install(owner: type, method: str, check: Callable[..., None]) -> None:
        original = getattr(owner, method)

        def asked(self: Any, *args: Any) -> Any:
            check(*args)
            return original(self, *args)

        monkeypatch.setattr(owner, method, asked)

    return install


# The answers of padded batches ---------------------------------------------------------------------------------------

stop_words = " ".join(f"w{token}" for token in alone("llava")[0][2][2:4])
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": SAMPLED},
    "a stop string": {"ending": {"stop": [stop_words], "ignore_eos": True}},
    "to the cap": {"ending": {"ignore_eos": True}},
    "repetitions end": {"ending": {"max_repeats": 2, "ignore_eos": True}},
    "one slot": {"num_slots": 1},
    "more slots than rows": {"num_slots": 40},
    "room for few tokens": {"max_slot_tokens": 300},
    "room for no row": {"max_slot_tokens": 8},
    "attention by products": {"decode_attention": DecodeAttention.matmul},
    "attention by sums of vectors": {"decode_attention": DecodeAttention.embedding_bag},
    "attention by SDPA": {"decode_attention": DecodeAttention.sdpa},
    "nothing reused": {"reuse_images": False, "reuse_prefixes": False, "fused_projections": False},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_answers_are_those_of_padded_batches(settings: str) -> None:
    slots, static = engines_of(**SETTINGS[settings])
    given = many()
    assert answers_of(slots, given) == answers_of(static, given)
    assert all(slots.fit.verdicts.values())
    assert slots.counts.num_generated_tokens == static.counts.num_generated_tokens


class Recorder:
    """In the place of CUDA graphs: a recorded step is run again, from the inputs that stand in its buffers."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.num_recorded += 1
        for _ in range(2):
            forward()

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return forward()

        return replay


@pytest.mark.parametrize("settings", ["greedy", "sampled", "a stop string", "to the cap", "room for few tokens"])
def test_tokens_read_late_are_the_same(settings: str) -> None:
    slots, static = engines_of(**SETTINGS[settings])
    slots.fit.reads_late = True
    given = many()
    assert answers_of(slots, given) == answers_of(static, given)
    late = slots.counts.num_decode_rows
    slots.fit.reads_late, slots.counts = False, type(slots.counts)()
    answers_of(slots, given)
    assert slots.counts.num_decode_rows < late <= slots.counts.num_decode_rows + len(given)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_5_vl"])
@pytest.mark.parametrize("late", [False, True])
def test_recorded_steps_give_the_same(name: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several capacities, in slots of which some are free."""
    record = Recorder()
    monkeypatch.setattr(speedups, "recorder", lambda device: record)
    slots, static = engines_of(name, num_slots=6)
    slots.fit.reads_late = late
    given = [replace(one, max_new_tokens=60) if number % 4 == 0 else one for number, one in enumerate(many(name, 60))]
    assert answers_of(slots, given) == answers_of(static, given)
    assert slots.numerics["decode_steps"] == "recorded"
    assert 0 < record.num_recorded < record.num_replayed / 3


def test_recorded_steps_that_go_wrong_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be recorded, and one that gives something else."""

    def refused(forward: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    def stale(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        logits_NV = forward()
        return lambda: logits_NV

    for record in (refused, stale):
        monkeypatch.setattr(speedups, "recorder", lambda device, record=record: record)
        slots, static = engines_of()
        assert answers_of(slots, many()) == answers_of(static, many())
        assert all(slots.fit.verdicts.values())
        assert "decode_steps" not in slots.numerics


def test_samples_of_one_prompt_are_computed_once_and_drawn_apart() -> None:
    slots, static = engines_of(sampling=SAMPLED, num_slots=8)
    [one] = samples("llava", 1)
    given = [replace(one, key=RecordKey(0, "default", number), image_key="picture") for number in range(6)]
    found = answers_of(tried(slots, samples("llava")), given)
    assert found == answers_of(static, given)
    assert len({answer.response for answer in found}) > 3
    assert slots.counts.num_images_encoded == 1
    assert slots.counts.num_padded_prompt_tokens == one.num_tokens


def test_rows_with_and_without_images_are_tried_for_themselves() -> None:
    slots, static = engines_of("smolvlm")
    texts = [
        replace(one, key=RecordKey(20 + row, "default", 0))
        for row, one in enumerate(samples("smolvlm", text_only=True))
    ]
    given = [one for pair in zip(samples("smolvlm"), texts, strict=True) for one in pair]
    given.sort(key=lambda one: one.key)
    assert answers_of(slots, given) == answers_of(static, given)
    assert list(slots.fit.verdicts.values()) == [True, True]


def test_a_slot_is_filled_again_at_once() -> None:
    slots, _ = engines_of(num_slots=4, ending={"ignore_eos": True})
    given = many(count=80)
    answers_of(tried(slots, given), given)
    ideal = sum(one.max_new_tokens - 1 for one in given if one.max_new_tokens) / 4
    assert ideal <= slots.counts.num_decode_steps <= 1.1 * ideal


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_out_of_memory_in_a_prompt_makes_prompts_fewer_at_a_time(failing: Any) -> None:
    slots, static = engines_of(num_slots=8)
    given = many()
    wanted = answers_of(static, given)
    tried(slots, given)
    sizes: list[int] = []

    def check(of: Any) -> None:
        sizes.append(len(of))
        if len(of) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    failing(Prefill, "_whole", check)
    assert answers_of(slots, given) == wanted
    assert slots.counts.num_out_of_memory == sum(size > 2 for size in sizes) < 6


def test_out_of_memory_in_a_step_takes_half_of_the_rows_out_and_the_slots_come_back(
    failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 48: out of memory in a decode step of the slots: the same answers, and all slots again later."""
    monkeypatch.setattr(engine_module, "_CALM_ANSWERS", 8)
    slots, static = engines_of(num_slots=8)
    given = many(count=60)
    wanted = answers_of(static, given)
    tried(slots, given)
    sizes: list[int] = []

    def check(token_B: torch.Tensor, *_: Any) -> None:
        sizes.append(len(token_B))
        if len(sizes) < 20 and len(token_B) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    failing(Decoder, "__call__", check)
    assert answers_of(slots, given) == wanted
    assert slots.counts.num_out_of_memory >= 1
    assert max(sizes[:20]) == 8 and max(sizes[20:]) == 8  # full again


def test_a_row_that_never_fits_is_an_error_row_and_its_neighbours_are_answered(failing: Any) -> None:
    """Fault 48: a row that fits no memory is an error row of the slots too; its neighbours are answered."""
    slots, static = engines_of()
    given = poisoned(samples("llava"), 3)
    wanted = answers_of(static, given)

    def check(of: Any) -> None:
        if any((one.tensors["input_ids"] == 285).any() for one in of):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 900.00 GiB\nmore lines")

    tried(slots, given)
    failing(Prefill, "_whole", check)
    found = answers_of(slots, given)
    assert found[3].fault is not None
    assert (found[3].fault.kind, found[3].fault.stage) == ("OutOfMemoryError", "generate")
    assert found[3].fault.message == "CUDA out of memory. Tried to allocate 900.00 GiB"
    assert found[:3] + found[4:] == wanted[:3] + wanted[4:]


def test_a_poison_row_is_isolated(failing: Any) -> None:
    slots, static = engines_of(num_slots=8)
    given = poisoned(samples("llava"), 2)
    wanted = answers_of(static, given)

    def check(of: Any) -> None:
        if any((one.tensors["input_ids"] == 285).any() for one in of):
            raise ValueError("image features and image tokens do not match")

    tried(slots, given)
    failing(Prefill, "_whole", check)
    found = answers_of(slots, given)
    assert found[2].fault is not None and found[2].fault.kind == "ValueError"
    assert found[:2] + found[3:] == wanted[:2] + wanted[3:]
    assert slots.counts.num_failed_batches >= 1


def test_a_step_that_fails_is_answered_in_padded_batches(failing: Any) -> None:
    slots, static = engines_of()
    given = many()
    wanted = answers_of(static, given)
    calls: list[int] = []

    def check(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("a kernel that does not know this shape")

    tried(slots, given)
    failing(Decoder, "__call__", check)
    assert answers_of(slots, given) == wanted
    assert slots.counts.num_failed_batches == 1


def test_logits_that_are_not_finite_are_an_error_row_and_harm_nobody() -> None:
    """Fault 49: NaN logits in a slot are an error row and harm no neighbour."""
    slots, static = engines_of()
    wanted = answers_of(static, samples("llava"))
    tried(slots, samples("llava"))
    weight = family("llava").model.get_input_embeddings().weight
    before = weight[285].clone()
    try:
        weight[285] = torch.nan
        found = answers_of(slots, poisoned(samples("llava"), 1))
    finally:
        weight[285] = before
    assert found[1].fault is not None and found[1].fault.kind == "NonFiniteLogits"
    assert found[:1] + found[2:] == wanted[:1] + wanted[2:]


@pytest.mark.parametrize("kernel", [DecodeAttention.matmul, DecodeAttention.embedding_bag, DecodeAttention.sdpa])
def test_a_slot_that_held_numbers_which_are_not_finite_harms_no_later_row(kernel: DecodeAttention) -> None:
    """Fault 49: a slot that held NaN harms no later row."""
    slots, static = engines_of(num_slots=2, ending={"ignore_eos": True}, decode_attention=kernel)
    given = samples("llava")
    wanted = answers_of(static, given)
    tried(slots, given)
    weight = family("llava").model.get_input_embeddings().weight
    before = weight[285].clone()
    try:
        weight[285] = torch.nan
        found = answers_of(slots, poisoned(given, 5))
    finally:
        weight[285] = before
    assert found[5].fault is not None
    assert found[:5] == wanted[:5]


@pytest.mark.parametrize("owner", [(Prefill, "_whole"), (Decoder, "__call__")])
def test_a_broken_accelerator_ends_the_run(owner: tuple[type, str], failing: Any) -> None:
    def check(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    slots, _ = engines_of()
    tried(slots, samples("llava"))
    failing(*owner, check)
    with pytest.raises(RunFailed, match="illegal memory access"):
        answers_of(slots, samples("llava"))


def test_a_trial_that_finds_other_logits_gives_up_one_thing_after_the_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = SlotLoop.step
    wrong = pytest.MonkeyPatch()

    def other(self: SlotLoop) -> None:
        assert self._rows is not None
        self._rows.position = self._rows.position + 1
        step(self)

    slots, static = engines_of()
    wrong.setattr(SlotLoop, "step", other)
    with caplog.at_level("INFO"):
        assert answers_of(slots, many()) == answers_of(static, many())
    wrong.undo()
    assert [word for word in ("images are encoded", "projections are left", "does not fit") if word in caplog.text]
    assert not any(slots.fit.verdicts.values())
    assert slots.numerics["engine"] == "static"


def test_encoded_images_that_are_anothers_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images reach the rows in their order; turned round, the trial sees it, and the model encodes them itself."""
    from pipeline.vlm.slots.features import ImageFeatures

    encoded = ImageFeatures.encoded
    monkeypatch.setattr(ImageFeatures, "encoded", lambda self, of: encoded(self, of)[::-1])
    slots, static = engines_of("llava")
    given = [sample("llava", np.random.default_rng(row), row) for row in range(6)]
    assert answers_of(slots, given) == answers_of(static, given)
    assert all(slots.fit.verdicts.values())
    assert slots.counts.num_images_encoded == 0


# Interruption --------------------------------------------------------------------------------------------------------


def test_after_a_stop_request_no_further_row_begins() -> None:
    signal = Stop()
    slots, _ = engines_of(num_slots=2, signal=signal, ending={"ignore_eos": True})
    given = many()
    tried(slots, given)
    results = slots.answers(stream(given))
    next(results)
    signal.requested = True
    assert 1 <= len(list(results)) <= 2  # of the two at work, and perhaps one that had come in


def test_an_expired_grace_period_gives_up_what_is_at_work() -> None:
    signal = Stop()
    slots, _ = engines_of(signal=signal)
    tried(slots, many())
    signal.expired = True
    with pytest.raises(Interrupted):
        answers_of(slots, many())


def test_a_vision_tower_whose_output_cannot_be_parted_encodes_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.vlm.slots import features

    monkeypatch.setattr(features, "_parted", lambda *_: None)
    slots, static = engines_of()
    given = [sample("llava", np.random.default_rng(row), row) for row in range(6)]
    assert answers_of(slots, given) == answers_of(static, given)
    slots.counts = type(slots.counts)()
    sizes: list[int] = []
    encode = features.ImageFeatures._encode
    monkeypatch.setattr(
        features.ImageFeatures, "_encode", lambda self, of: (sizes.append(len(of)), encode(self, of))[1]
    )
    answers_of(slots, given)
    assert sizes == [1] * 6
    assert slots.counts.num_images_encoded == 6
