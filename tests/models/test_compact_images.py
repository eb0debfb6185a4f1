"""Compact images with every family's own image processor: its tensors, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ragged import SIZES, conversation, one_thread, picture, processor_of
from tiny_checkpoints import ARCHITECTURES, built

from pipeline.tensors.proof import compact_flaw
from pipeline.tensors.replay import PixelReplay, same_bits

__all__ = ["one_thread"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_of_compact_images_are_the_processors(name: str) -> None:
    if built(name).processor is None:
        pytest.skip("its processor cannot be imported here")
    processor, replay = processor_of(name), PixelReplay()
    assert compact_flaw(processor, replay) is None
    turns, random = conversation(name, "What is it?", 1), np.random.default_rng(0)
    pictures = [picture(random, *size) for size in SIZES]
    try:
        truths = [processor.encode(turns, [image]) for image in pictures]
        processor.ship("decoded", at_once=True)
        for image, truth in zip(pictures, truths, strict=True):
            found = processor.encode(turns, [image])
            made = {key: torch.from_numpy(array) for key, array in found.tensors.items()}
            made |= replay.tensors(found.compact) if found.compact else {}
            assert same_bits(made, {key: torch.from_numpy(array) for key, array in truth.tensors.items()})
            assert (found.image_key, found.num_image_tokens) == (truth.image_key, truth.num_image_tokens)
    finally:
        processor.ship("processed")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_several_prompts_about_an_image_share_its_tensors(name: str) -> None:
    if built(name).processor is None:
        pytest.skip("its processor cannot be imported here")
    processor, image = processor_of(name), picture(np.random.default_rng(0), 90, 40)
    texts = ("What is it?", "Where?")
    alone = []
    for text in texts:
        processor.ship("processed")  # forgets the image
        alone.append(processor.encode(conversation(name, text, 1), [image]))
    together = [processor.encode(conversation(name, text, 1), [image]) for text in texts]
    for one, other in zip(alone, together, strict=True):
        assert same_bits(
            {key: torch.from_numpy(array) for key, array in one.tensors.items()},
            {key: torch.from_numpy(array) for key, array in other.tensors.items()},
        )
        assert one.image_key == other.image_key
    assert together[0].tensors["pixel_values"] is together[1].tensors["pixel_values"]
