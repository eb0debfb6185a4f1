"""What the families' processors give, and want, is met without knowing a family."""

from __future__ import annotations

import pytest
from ragged import processor_of, sample
from tiny_checkpoints import ARCHITECTURES, built

from pipeline.errors import RowFault


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("git", "kosmos-2")])
def test_the_tokens_that_the_models_image_features_replace_are_counted(name: str) -> None:
    found = sample(name, 1)
    config = built(name).model.config
    number = getattr(config, "image_token_id", None) or config.image_token_index
    assert found.facts.num_image_tokens == (found.tensors["input_ids"] == number).sum() > 0


@pytest.mark.parametrize("name", ["blip-2", "instructblip", "git", "kosmos-2"])
def test_a_second_image_that_the_prompt_has_no_place_for_is_an_error(name: str) -> None:
    with pytest.raises(RowFault, match="2 images, and this model takes one"):
        sample(name, 0, num_images=2)


def test_images_are_given_flat_where_the_processor_takes_no_nested_lists() -> None:
    one, two = sample("got_ocr2", 0), sample("got_ocr2", 0, num_images=2)
    assert two.facts.num_image_tokens == 2 * (one.facts.num_image_tokens or 0) > 0
    assert len(two.tensors["pixel_values"]) == 2


def test_labels_for_training_never_reach_a_model() -> None:
    assert "labels" in built("paligemma").processor.model_input_names
    assert "labels" not in sample("paligemma", 0).tensors


def test_a_processor_that_wants_an_image_makes_a_row_without_one_an_error() -> None:
    with pytest.raises(RowFault, match="images"):
        processor_of("paligemma").encode([{"role": "user", "content": [{"type": "text", "text": "answer en Hi"}]}], [])
