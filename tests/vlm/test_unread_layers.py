"""Layers of a vision tower that nothing looks at: found by spoiling them, left out, and never where they matter."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import test_slots_engine
import torch
from test_slots_engine import answers_of, engines_of, many
from tiny_models import family
from transformers import LlavaForConditionalGeneration

from pipeline.vlm.slots import features
from pipeline.vlm.slots.unread_layers import left_out, unread_layers


def model_with(feature_layer: int | list[int]) -> Any:
    """LLaVA over a tower of four layers, whose features are those after some of them."""
    torch.manual_seed(0)
    config = copy.deepcopy(family("llava").model.config)
    config.vision_feature_layer, config.vision_config.num_hidden_layers = feature_layer, 4
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(10.0)  # so that small mistakes move the logits
    model.generation_config.update(**family("llava").model.generation_config.to_diff_dict())
    return model


def tower(model: Any) -> Any:
    return model.model.vision_tower.get_submodule("encoder").layers


def encoded(model: Any, pixels: torch.Tensor) -> Any:
    return model.model.get_image_features(pixel_values=pixels, return_dict=True)


def pixels_of(model: Any) -> torch.Tensor:
    size = model.config.vision_config.image_size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("feature_layer", "num_unread"), [(-1, 0), (-2, 1), (-3, 2), ([1, -2], 1), ([-2, -1], 0), (1, 3)]
)
@torch.inference_mode()
def test_what_the_features_do_not_depend_on_is_found_and_left_out(
    feature_layer: int | list[int], num_unread: int
) -> None:
    model = model_with(feature_layer)
    pixels = pixels_of(model)
    wanted = encoded(model, pixels).pooler_output
    layers = list(tower(model))
    found = unread_layers(model, lambda: encoded(model, pixels))
    assert found == layers[::-1][:num_unread]
    computed: list[int] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: computed.append(number))
    with left_out(found):
        assert all(map(torch.equal, encoded(model, pixels).pooler_output, wanted))
    assert computed == list(range(4 - num_unread))
    assert all(map(torch.equal, encoded(model, pixels).pooler_output, wanted))
    assert computed[-4:] == [0, 1, 2, 3]


@torch.inference_mode()
def test_a_tower_that_draws_random_numbers_is_computed_as_a_whole() -> None:
    model = model_with(-2)
    pixels = pixels_of(model)
    assert unread_layers(model, lambda: encoded(model, pixels + torch.rand(1))) == []


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl"])
@torch.inference_mode()
def test_layers_that_matter_are_all_computed(name: str) -> None:
    slots, _ = engines_of(name)
    answers_of(slots, many(name))
    found = slots.fit._speedups.features
    assert found is not None and found._unread_layers == []


@pytest.mark.parametrize("wrong", [False, True])
def test_answers_are_those_of_whole_towers(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a layer was left out that matters: the trial finds it, and gives that up alone."""
    monkeypatch.setattr(test_slots_engine, "family", lambda name: replace(family(name), model=model_with(-2)))
    slots, static = engines_of()
    given = many()
    wanted = answers_of(static, given)
    if wrong:
        monkeypatch.setattr(features, "unread_layers", lambda model, _: list(tower(model))[1:])
    assert answers_of(slots, given) == wanted
    found = slots.fit._speedups.features
    assert found is not None and len(found._unread_layers or ()) == (0 if wrong else 1)
    assert all(slots.fit.verdicts.values())
