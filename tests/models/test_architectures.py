"""Every architecture: eight ragged rows in a batch give the logits of each row alone, at every step."""

from __future__ import annotations

import pytest
from ragged import Observed, measured, one_thread, sample  # noqa: F401
from tiny_checkpoints import ARCHITECTURES, built
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from pipeline.vlm import decode

BOUND = 1e-5  # of the largest logit


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_ragged_batch_gives_the_logits_of_each_row_alone(name: str) -> None:
    found = measured(name)
    assert found.error <= BOUND
    # Rows do share a batch: parity would be no feat otherwise. Of eight lengths two are equal where none is padded.
    assert found.largest_batch >= (4 if found.pads_tokens else 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_image_gives_other_logits(name: str) -> None:
    assert measured(name).image_effect > 1000 * measured(name).error


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_class_that_loads_every_model_knows_the_architecture(name: str) -> None:
    model = built(name).model
    assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(model.config)] is type(model)
    assert model.config.model_type == name


# What the trial of fit.py is for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "allowed"), [("kosmos-2", "may_pad_tokens"), ("mllama", "may_pad_images"), ("florence2", "pads_right")]
)
def test_without_the_trial_padding_would_change_answers(
    name: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Observed(name)
    monkeypatch.setattr(engine._static._fit, "_try", lambda group: None)
    setattr(engine.batcher, allowed, allowed != "pads_right")
    num_images = 2 if measured(name).several_images else 1
    given = [sample(name, row, num_images=num_images if row % 3 == 2 else 1) for row in range(8)]
    assert engine.error(given) > 100 * BOUND


def test_a_decode_loop_that_is_wrong_about_a_model_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    last_position = decode.last_position
    monkeypatch.setattr(decode, "last_position", lambda *given: last_position(*given) - 3)
    engine = Observed("llava")
    assert engine.error([sample("llava", row) for row in range(8)]) <= BOUND
    assert engine.own_loop


def test_rows_without_images_are_tried_for_themselves() -> None:
    # When it decodes, GIT widens the mask by the tokens of an image, whether there was one or not.
    engine = Observed("git")
    engine.answers([sample("git", row) for row in range(8)])
    assert engine.batcher.may_pad_tokens
    assert engine.error([sample("git", row, num_images=0, number=8 + row) for row in range(8)]) <= BOUND
    assert not engine.batcher.may_pad_tokens
