"""Slots on every architecture: rows that enter and leave at any time give the logits of each row alone."""

from __future__ import annotations

import pytest
from ragged import Observed, measured, one_thread, questions, sample  # noqa: F401
from tiny_checkpoints import ARCHITECTURES

from pipeline.vlm.slots import loop, prompt_attention, speedups
from pipeline.vlm.slots.engine import SlotsEngine

BOUND = 1e-5  # of the largest logit
# What keeps a model out of the slots, all else goes through them.
STATIC = {
    "mllama": "cross-attention to the images",
    "florence2": "an encoder-decoder",
    "kosmos-2": "a decoder that takes no positions",
    "git": "attention of its own, not transformers' interface",
    "qwen3_5": "layers of linear attention, whose state is no list of tokens",
    "lfm2_vl": "convolutions, whose state is no list of tokens",
}
# Prompts about one image begin with it, and with nothing that forbids to go on from there.
SHARING = (
    *("idefics2", "idefics3", "smolvlm", "llava", "llava_next", "llava_onevision", "vipllava", "qwen2_vl"),
    *("qwen2_5_vl", "qwen3_vl", "internvl", "mistral3", "got_ocr2", "glm4v", "deepseek_vl", "ovis2"),
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_in_slots_give_the_logits_of_each_row_alone(name: str) -> None:
    found = measured(name)
    assert found.slots_error <= BOUND
    assert found.slots == (name not in STATIC)


@pytest.mark.parametrize("way", prompt_attention.WAYS)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in STATIC])
def test_prompts_attended_to_some_queries_at_a_time_give_the_same(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_attention, "_QUERIES", dict.fromkeys(prompt_attention.WAYS, 8))
    monkeypatch.setattr(prompt_attention, "_QUERIES_OF_IMAGES", 8)
    monkeypatch.setattr(speedups, "fastest_way", lambda *args, **kwargs: way)
    observed = Observed(name, engine="slots")
    assert observed.error([sample(name, 0), sample(name, 2), *questions(name, 2, 3)]) <= BOUND
    assert observed.engine.numerics["prompt_attention"] == way


@pytest.mark.parametrize("name", SHARING)
def test_several_questions_go_on_from_one_prefix(name: str) -> None:
    given = questions(name, 2, 5) + questions(name, 4, 3) + [sample(name, 0)]
    together, apart = Observed(name, engine="slots"), Observed(name, engine="slots", reuse_prefixes=False)
    assert together.error(given) <= BOUND
    apart.answers(given)
    assert isinstance(together.engine, SlotsEngine) and isinstance(apart.engine, SlotsEngine)
    ours, theirs = together.engine.counts, apart.engine.counts
    assert ours.num_padded_prompt_tokens < 0.75 * theirs.num_padded_prompt_tokens
    assert 0 < ours.num_images_encoded <= 3  # of nine rows; some in the trial


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "aya_vision"])
def test_a_prompt_that_is_read_in_both_directions_or_in_windows_is_computed_whole(name: str) -> None:
    given = questions(name, 2, 5)
    observed = Observed(name, engine="slots")
    assert observed.error(given) <= BOUND
    assert isinstance(observed.engine, SlotsEngine)
    counts, features = observed.engine.counts, observed.engine.fit._speedups.features
    assert counts.num_padded_prompt_tokens >= counts.num_prompt_tokens == sum(one.num_tokens for one in given)
    assert counts.num_images_encoded <= 1  # it may have been in the trial
    assert features is not None and len(features._kept) == 1


def test_without_the_positions_of_the_prompt_the_trial_keeps_a_model_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loop.Decoder.__call__
    monkeypatch.setattr(
        loop.Decoder, "__call__", lambda self, token_B, at, cache: forward(self, token_B, at - 1, cache)
    )
    observed = Observed("qwen2_5_vl", engine="slots")
    assert observed.error([sample("qwen2_5_vl", row) for row in range(8)]) <= BOUND
    assert observed.engine.numerics["engine"] == "static"


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in STATIC])
def test_images_of_one_shape_are_encoded_together(name: str) -> None:
    given = [sample(name, 2, seed=seed, number=seed) for seed in range(5)]
    observed = Observed(name, engine="slots")
    assert observed.error(given) <= BOUND
    assert isinstance(observed.engine, SlotsEngine)
    features = observed.engine.fit._speedups.features
    # BLIP-2 keeps no images: encoded beforehand they give other logits, and the trial says so.
    assert features is None if name == "blip-2" else features is not None and len(features._kept) == 5
