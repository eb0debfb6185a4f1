"""Rows whose prompts are computed before a slot is free: no slot waits, none is lost, and nothing is held back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_slots_engine import Stop, answers_of, engines_of, failing, many, tried  # noqa: F401
from tiny_models import samples

from pipeline.records import EncodedSample, RecordKey
from pipeline.vlm.slots import engine as engine_module
from pipeline.vlm.slots.fit import SlotsFit
from pipeline.vlm.slots.loop import Decoder, SlotLoop
from pipeline.vlm.slots.pool import Pool
from pipeline.vlm.slots.prefill import Prefill

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB"


def test_no_slot_is_empty_while_a_row_waits(failing: Any) -> None:  # noqa: F811
    slots, static = engines_of(num_slots=16, ending={"ignore_eos": True})
    given = many(count=83)
    wanted = answers_of(static, given)
    tried(slots, given)
    sizes: list[int] = []
    failing(Decoder, "__call__", lambda token_B, *_: sizes.append(len(token_B)))
    assert answers_of(slots, given) == wanted
    full = sizes.index(min(sizes))
    while full and sizes[full - 1] < 16:
        full -= 1
    assert full > 20 and sizes[:full] == [16] * full  # then the last rows
    assert sizes[full:] == sorted(sizes[full:], reverse=True) and sum(sizes) == slots.counts.num_decode_rows


def test_prompts_are_computed_together_however_few_slots_are_free(failing: Any) -> None:  # noqa: F811
    slots, _ = engines_of(num_slots=16, ending={"ignore_eos": True})
    given = many(count=80)
    tried(slots, given)
    sizes: list[int] = []
    failing(Prefill, "__call__", lambda waiting: sizes.append(len(waiting)))
    answers_of(slots, given)
    assert sum(sizes) == 80 and len(sizes) <= 80 / 16 + 2


def test_rows_that_end_with_their_first_token_do_not_wait_for_the_rest() -> None:
    slots, static = engines_of(num_slots=4)
    given = [replace(one, max_new_tokens=1) for one in many(count=200)]
    wanted = answers_of(static, given)
    tried(slots, given)
    num_read = 0

    def reading() -> Iterator[EncodedSample]:
        nonlocal num_read
        for one in given:
            num_read += 1
            yield one

    found = []
    for answer in slots.answers(reading()):
        found.append(answer)
        assert num_read <= len(found) + 2 * engine_module._WINDOW_SLOTS * 4
    assert sorted(found, key=lambda answer: answer.key) == wanted
    assert slots.counts.num_decode_steps == 0


def test_a_row_for_which_there_is_no_room_yet_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for two rows, though there are more slots: begun rows keep their order and their first tokens."""
    slots, static = engines_of(num_slots=8, max_slot_tokens=200)
    given = many()
    waited: list[int] = []
    seat = SlotLoop.seat

    def watching(self: SlotLoop, max_live: int) -> None:
        seat(self, max_live)
        waited.append(self.num_begun if self.num_live < max_live else 0)

    monkeypatch.setattr(SlotLoop, "seat", watching)
    assert answers_of(slots, given) == answers_of(static, given)
    assert max(waited) > 0


@pytest.mark.parametrize("time", [1, 7])
def test_out_of_memory_on_the_way_into_a_slot_takes_rows_out_and_loses_none(
    time: int,
    failing: Any,  # noqa: F811
) -> None:
    slots, static = engines_of(num_slots=8)
    given = many(count=40)
    wanted = answers_of(static, given)
    tried(slots, given)
    calls: list[int] = []

    def check(*_: Any) -> None:
        calls.append(1)
        if len(calls) == time + 1:  # the first time none is live, the seventh some are
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    failing(Pool, "write", check)
    assert answers_of(slots, given) == wanted
    assert slots.counts.num_out_of_memory == 1
    assert slots.fit._memory is not None and slots.fit._memory.num_live == 0


def questions(num: int, picture: str = "picture") -> list[EncodedSample]:
    """About one picture, after many words that they share."""
    one = samples("llava")[0]
    found = []
    for number in range(num):
        ids = np.concatenate([one.tensors["input_ids"][0], np.full(20, 40), 50 + number + np.arange(5)])[None]
        tensors = {**one.tensors, "input_ids": ids, "attention_mask": np.ones_like(ids)}
        key = RecordKey(0, f"{picture} {number}", 0)
        found.append(replace(one, key=key, tensors=tensors, image_key=picture))
    return found


def test_a_prefix_is_kept_for_the_rest_of_its_family_and_no_longer(failing: Any) -> None:  # noqa: F811
    slots, static = engines_of(num_slots=4)
    given = [*questions(10, "one"), *questions(10, "two")]
    wanted = answers_of(static, given)
    tried(slots, given)
    kept: list[list[str]] = []
    whole: list[int] = []

    def check(*_: Any) -> None:
        assert slots.fit._prefill is not None
        kept.append([picture for picture, _ in slots.fit._prefill._prefixes])

    failing(Prefill, "_continued", check)
    failing(Prefill, "_whole", lambda of: whole.append(len(of)))
    assert answers_of(slots, given) == wanted
    assert whole == [1, 1]
    assert [len(pictures) for pictures in kept] == [0] + [1] * (len(kept) - 1) and len(kept) > 4


def test_out_of_memory_in_what_follows_a_prefix_makes_prompts_fewer_at_a_time(failing: Any) -> None:  # noqa: F811
    slots, static = engines_of(num_slots=8)
    given = questions(8)
    wanted = answers_of(static, given)
    tried(slots, given)
    sizes: list[int] = []

    def check(waiting: Any) -> None:
        sizes.append(len(waiting))
        assert len(sizes) < 40, "the same batch again and again"
        if len(waiting) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    failing(Prefill, "_continued", check)
    assert answers_of(slots, given) == wanted
    assert slots.counts.num_out_of_memory == sum(size > 2 for size in sizes) > 1


def test_questions_that_may_not_share_are_whole_prompts_to_the_budget(
    failing: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots, static = engines_of(num_slots=8)
    given = questions(8)
    wanted = answers_of(static, given)
    monkeypatch.setattr(SlotsFit, "_try_shared", lambda self, group: False)
    tried(slots, given)
    slots._max_prefill_tokens = slots._full_prefill_tokens = 3 * given[0].num_tokens
    sizes: list[int] = []
    failing(Prefill, "_whole", lambda of: sizes.append(len(of)))
    assert answers_of(slots, given) == wanted
    assert sizes == [3, 3, 2]


def test_a_row_that_never_gets_into_a_slot_is_an_error_row(failing: Any) -> None:  # noqa: F811
    slots, static = engines_of(num_slots=4)
    given = many()
    wanted = answers_of(static, given)
    tried(slots, given)
    calls: list[int] = []

    def check(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("keys of another shape")

    failing(Pool, "write", check)
    found = answers_of(slots, given)
    [failed] = [answer for answer in found if answer.fault is not None]
    assert failed.fault is not None and failed.fault.kind == "ValueError"
    assert slots.fit._memory is not None and slots.fit._memory.num_live == 0  # its slot is free again
    assert [answer for answer in found if answer is not failed] == [
        answer for answer in wanted if answer.key != failed.key
    ]


def test_rows_that_wait_for_a_slot_are_not_begun_again_after_a_stop(failing: Any) -> None:  # noqa: F811
    signal = Stop()
    slots, _ = engines_of(num_slots=4, signal=signal, ending={"ignore_eos": True})
    given = many(count=40)
    tried(slots, given)
    results = slots.answers(iter(given))
    next(results)
    signal.requested = True
    prompts: list[int] = []
    failing(Prefill, "__call__", lambda waiting: prompts.append(len(waiting)))
    assert len(list(results)) <= 4 and not prompts
