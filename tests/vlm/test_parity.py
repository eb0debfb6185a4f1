"""The parity check: it finds what a batch does to answers, and pictures that never reach the model."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_static import PAD, answers_of, engine_of
from tiny_models import family, samples

from pipeline.errors import RunFailed
from pipeline.records import EncodedSample, PromptFacts
from pipeline.tensors.batch import Batcher
from pipeline.vlm.generation import SamplingSettings
from pipeline.vlm.parity import ParityCheck, check_parity
from pipeline.vlm.static import StaticEngine

NAMES = ("smolvlm", "idefics2", "llava", "qwen2_5_vl")


def with_images(name: str, count: int = 6) -> list[EncodedSample]:
    return [replace(sample, facts=PromptFacts(num_images=1)) for sample in samples(name, count)]


def engine_with(model: Any, batcher: Batcher) -> StaticEngine:
    engine = engine_of(model, ignore_eos=True)
    engine._batcher = batcher
    return engine


def budget(kind: type[Batcher] = Batcher) -> Batcher:
    return kind(max_rows=8, max_tokens=100_000, max_new_tokens=12, pad_id=PAD)


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_engine_passes_and_says_how_exact_it_is(name: str) -> None:
    engine = engine_of(family(name).model, ignore_eos=True)
    found = check_parity(engine, with_images(name))
    assert (found.num_rows, found.num_identical, found.first_difference) == (6, 6, None)
    assert found.logit_error is not None and 0 < found.logit_error <= 1e-5
    assert (found.dtype, found.num_pictures_changed) == ("float32", 3)
    assert engine.counts.num_batches == engine.counts.num_generated_tokens == 0


def test_an_encoder_decoder_and_a_beam_search_are_compared_too(caplog: pytest.LogCaptureFixture) -> None:
    found = check_parity(engine_of(family("t5gemma2").model, is_encoder_decoder=True), with_images("t5gemma2"))
    assert (found.num_identical, found.num_pictures_changed) == (6, 3)
    beams = engine_of(family("smolvlm").model, processors={"num_beams": 2}, ignore_eos=True)
    with caplog.at_level(logging.INFO):
        found = check_parity(beams, with_images("smolvlm"))
    assert "no logits to compare" in caplog.text
    assert (found.num_identical, found.logit_error, found.num_pictures_changed) == (6, None, None)


def test_sampled_rows_are_compared_with_the_draws_of_their_own() -> None:
    settings = SamplingSettings(do_sample=True, temperature=2.0)
    found = check_parity(engine_of(family("smolvlm").model, settings=settings), with_images("smolvlm"))
    assert found.num_identical == 6


class BlindToMask(Batcher):
    """Pads, and attends to the padding."""

    def collate(self, group: Any) -> dict[str, torch.Tensor]:
        batch = super().collate(group)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        return batch


class Swapping(Batcher):
    """Gives each row its neighbour's picture."""

    def collate(self, group: Any) -> dict[str, torch.Tensor]:
        batch = super().collate(group)
        batch["pixel_values"] = batch["pixel_values"].roll(1, 0)
        return batch


class Blindfolded(Batcher):
    """Shows every row the same grey."""

    def collate(self, group: Any) -> dict[str, torch.Tensor]:
        batch = super().collate(group)
        batch["pixel_values"] = torch.full_like(batch["pixel_values"], 0.5)
        return batch


def test_a_batch_that_changes_float32_answers_stops_the_run() -> None:
    with pytest.raises(RunFailed, match=r"in float32 .* otherwise in a batch than alone.*engine\.max_batch_rows=1"):
        check_parity(engine_with(family("llava").model, budget(BlindToMask)), with_images("llava"))


def test_in_half_precision_differences_are_reported_with_row_and_step(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(family("llava").model).to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        found = check_parity(engine_with(model, budget(BlindToMask)), with_images("llava"))
    assert found.num_identical < found.num_rows == 6
    assert found.first_difference is not None
    assert found.first_difference["id"] in caplog.text and "near tie" in caplog.text
    assert found.logit_error is not None and found.logit_error > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_that_go_to_the_wrong_rows_stop_the_run(dtype: torch.dtype) -> None:
    model = copy.deepcopy(family("llava").model).to(dtype)
    # Rows of one length: nothing else in the batch is wrong.
    given = [replace(sample, tensors=with_images("llava")[0].tensors) for sample in with_images("llava")[:1]]
    with pytest.raises(RunFailed, match="gets the picture of another row"):
        check_parity(engine_with(model, budget(Swapping)), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_that_never_reach_the_model_stop_the_run(dtype: torch.dtype) -> None:
    model = copy.deepcopy(family("llava").model).to(dtype)
    with pytest.raises(RunFailed, match="they do not reach it"):
        check_parity(engine_with(model, budget(Blindfolded)), with_images("llava"))


def test_one_blank_picture_among_others_is_no_alarm_and_text_has_none() -> None:
    given = with_images("llava", 3)
    given[0].tensors["pixel_values"][:] = 0
    assert check_parity(engine_of(family("llava").model), given).num_pictures_changed == 2
    assert check_parity(engine_of(family("llava").model), samples("llava", text_only=True)).num_pictures_changed is None


def test_rows_that_fail_are_left_out() -> None:
    given = with_images("smolvlm")
    given[2].tensors["pixel_values"][:] = np.nan
    engine = engine_of(family("smolvlm").model, ignore_eos=True)
    check = ParityCheck(engine, num_rows=4)
    check.check(given[: check.num_due])
    assert check.result is not None
    assert (check.result.num_rows, check.result.num_identical) == (3, 3)
    assert check.num_due == 0  # the next stream of the same run goes unchecked
    assert [answer.fault is None for answer in answers_of(engine, given)] == [True, True, False, True, True, True]


def test_a_first_token_that_is_forced_hides_no_picture() -> None:
    """As BART's checkpoints have it: the first step leaves no choice, whatever the picture."""
    engine = engine_of(family("t5gemma2").model, is_encoder_decoder=True, processors={"forced_bos_token_id": 5})
    found = check_parity(engine, with_images("t5gemma2"))
    assert (found.num_rows, found.num_identical, found.num_pictures_changed) == (6, 6, 3)


class Together(Batcher):
    """Cannot make a batch of several rows."""

    def collate(self, group: Any, **more: Any) -> dict[str, torch.Tensor]:
        if len(group) > 1:
            raise ValueError("too many")
        return super().collate(group, **more)


def test_batches_that_fail_are_told_and_their_rows_are_answered(caplog: pytest.LogCaptureFixture) -> None:
    engine, given = engine_with(family("llava").model, budget(Together)), with_images("llava")
    with caplog.at_level(logging.WARNING):
        found = check_parity(engine, given)
        answers = answers_of(engine, given)
    assert (found.num_rows, found.num_failed_in_batch, found.num_pictures_changed) == (0, 6, None)
    assert "6 rows that can be answered alone fail in a batch" in caplog.text
    assert caplog.text.count("a batch of 6 rows failed (ValueError: too many)") == 1
    assert all(answer.fault is None for answer in answers)
    assert engine.counts.num_failed_batches == 5  # 6, 3, 3, and a pair of each


def test_zero_rows_turn_it_off() -> None:
    check = ParityCheck(engine_of(family("smolvlm").model), num_rows=0)
    check.check(with_images("smolvlm")[: check.num_due])
    assert check.report == {}
