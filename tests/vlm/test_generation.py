"""The effective generation settings, and what generation.extra does: as transformers' generate() on each row alone."""

from __future__ import annotations

from typing import Any

import pytest
from test_static import CAP, NEVER, Stop, answers_of, engine_of, ragged, words
from tiny_models import EOS, batch_of_one, family, samples

from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.records import FinishReason
from pipeline.vlm.generation import GenerationSettings, SamplingSettings, effective_settings
from pipeline.vlm.options import GreedyConfig, SampleConfig

# Which settings hold -------------------------------------------------------------------------------------------------


def test_the_checkpoints_settings_hold_where_the_options_are_null() -> None:
    checkpoint = {"temperature": 0.1, "top_p": 0.5, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    assert effective_settings(SampleConfig(), checkpoint).sampling == SamplingSettings(True, 0.1, 0.5, 20, 1.05)


def test_an_option_overrides_the_checkpoint() -> None:
    checkpoint = {"temperature": 0.1, "top_p": 0.5, "top_k": 20, "repetition_penalty": 1.05}
    options = SampleConfig(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    assert effective_settings(options, checkpoint).sampling == SamplingSettings(True, 1.0, 1.0, 0, 1.0)
    options = GreedyConfig(extra={"no_repeat_ngram_size": 2})
    assert effective_settings(options, {"no_repeat_ngram_size": 3}).processors == {"no_repeat_ngram_size": 2}


def test_what_neither_names_has_no_effect() -> None:
    assert effective_settings(SampleConfig(), {"temperature": None}) == GenerationSettings(SamplingSettings(True))


def test_greedy_stays_greedy_whatever_the_checkpoint_says_and_keeps_its_penalty() -> None:
    checkpoint = {"do_sample": True, "temperature": 0.1, "repetition_penalty": 1.05, "min_p": 0.1}
    settings = effective_settings(GreedyConfig(), checkpoint)
    assert settings == GenerationSettings(SamplingSettings(do_sample=False, repetition_penalty=1.05))


def test_the_checkpoints_beams_hold_for_greedy_and_not_for_sampling() -> None:
    checkpoint = {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 3}
    assert effective_settings(GreedyConfig(), checkpoint).processors == checkpoint
    assert effective_settings(SampleConfig(), checkpoint).processors == {"no_repeat_ngram_size": 3}
    assert effective_settings(GreedyConfig(extra={"num_beams": 1}), checkpoint).num_beams == 1


def test_the_fingerprint_holds_what_is_in_effect_wherever_it_comes_from() -> None:
    checkpoint = {"temperature": 0.5, "no_repeat_ngram_size": 3}
    from_checkpoint = effective_settings(SampleConfig(), checkpoint).fingerprint
    named = SampleConfig(temperature=0.5, extra={"no_repeat_ngram_size": 3})
    assert effective_settings(named, {}).fingerprint == from_checkpoint
    assert effective_settings(SampleConfig(), {}).fingerprint != from_checkpoint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GreedyConfig(extra={"temperature": 0.5}), "generation=sample generation.temperature"),
        (GreedyConfig(extra={"max_length": 5}), r"generation\.max_new_tokens"),
        (GreedyConfig(extra={"min_p": 0.5}), "needs generation=sample"),
        (SampleConfig(extra={"num_beams": 2}), "needs generation=greedy"),
        (GreedyConfig(extra={"num_beams": 0}), "whole number"),
        (GreedyConfig(extra={"custom_generate": "org/code"}), "the engine decides"),
        (GreedyConfig(extra={"no_repeat_ngram_size": "abc"}), "no_repeat_ngram_size='abc': expected 0"),
        (GreedyConfig(extra={"bad_words_ids": [5]}), "bad_words_ids=.*list of lists"),
        (GreedyConfig(extra={"sequence_bias": {"a": 1}}), "sequence_bias=.*bias"),
        (GreedyConfig(extra={"input_ids": 3}), "the engine decides"),
        (GreedyConfig(extra={"no_repeat_ngram_size": 1}), "2 and more"),
        (SampleConfig(extra={"min_p": 5}), "min_p=5: expected a number from 0 to 1"),
        (GreedyConfig(stop=["END", ""]), r"generation\.stop holds an empty text"),
        (GreedyConfig(extra={"no_repeat_ngram": 3}), "Did you mean 'no_repeat_ngram_size'"),
    ],
)
def test_an_extra_that_cannot_be_honoured_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        effective_settings(options, {})


@pytest.mark.parametrize(
    ("name", "value"), [("repetition_penalty", "abc"), ("repetition_penalty", 0), ("num_beams", "4")]
)
def test_a_damaged_value_of_the_checkpoint_is_named_where_it_would_hold(name: str, value: Any) -> None:
    with pytest.raises(RunFailed, match=rf"generation_config\.json of the model: {name}="):
        effective_settings(GreedyConfig(), {name: value})
    assert effective_settings(GreedyConfig(), {"top_k": -1, "suppress_tokens": []}) == GenerationSettings()
    off = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": 0.0}
    assert effective_settings(SampleConfig(), off) == GenerationSettings(SamplingSettings(True))
    sequence_bias = {"sequence_bias": [[[5, 6], -1.5]]}
    assert effective_settings(GreedyConfig(), sequence_bias).processors == sequence_bias


def test_an_extra_that_the_processor_makes_for_each_row_stops_the_run() -> None:
    engine = engine_of(family("idefics2").model, forward={"pixel_attention_mask": 1})
    with pytest.raises(RunFailed, match="the processor makes it"):
        answers_of(engine, samples("idefics2"))


def test_an_extra_that_neither_transformers_nor_the_model_knows_is_refused_before_anything_is_answered() -> None:
    with pytest.raises(RunFailed, match=r"vision_feature_sizes.*Did you mean 'vision_feature_layer'"):
        engine_of(family("llava").model, forward={"vision_feature_sizes": 1})


# What they do --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "processors",
    [
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 3},
        {"suppress_tokens": list(range(3, 160))},
        {"bad_words_ids": [[number] for number in range(160, 280)]},
        {"begin_suppress_tokens": list(range(3, 160)), "exponential_decay_length_penalty": (2, 1.5)},
    ],
    ids=lambda one: "+".join(one),
)
@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
def test_processors_act_on_each_row_as_if_it_were_alone(name: str, processors: dict[str, Any]) -> None:
    model, given = family(name).model, ragged(name)
    plain = answers_of(engine_of(model), given)
    eos = [EOS, *range(60, 120)]  # so that an answer ends early by itself
    answers = answers_of(engine_of(model, processors=processors, eos_ids=eos), given)
    for sample, answer in zip(given, answers, strict=True):
        found = model.generate(
            **batch_of_one(sample),
            do_sample=False,
            max_new_tokens=sample.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=0,
            **processors,
        )
        tokens = found[0, sample.num_tokens :].tolist()
        assert (answer.response, answer.num_generated_tokens) == (words(tokens), len(tokens))
    assert [one.response for one in answers] != [one.response for one in plain]


@pytest.mark.parametrize("name", ["smolvlm", "idefics2", "t5gemma2"])
@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_beams_give_what_generate_gives_for_each_row_alone(name: str, penalty: float) -> None:
    model, given = family(name).model, ragged(name)
    is_encoder_decoder = name == "t5gemma2"
    eos = [EOS, *range(60, 120)]
    settings = {"num_beams": 3, "length_penalty": 0.5}
    engine = engine_of(
        model,
        processors=settings,
        settings=SamplingSettings(do_sample=False, repetition_penalty=penalty),
        eos_ids=eos,
        is_encoder_decoder=is_encoder_decoder,
    )
    answers = answers_of(engine, given)
    assert engine.counts.num_batches == len({sample.max_new_tokens for sample in given})
    for sample, answer in zip(given, answers, strict=True):
        found = model.generate(
            **batch_of_one(sample),
            do_sample=False,
            max_new_tokens=sample.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=0,
            repetition_penalty=penalty,
            **settings,
        )
        tokens = found[0, 1 if is_encoder_decoder else sample.num_tokens :].tolist()
        ended = tokens[-1] in eos
        assert answer.fault is None
        assert (answer.response, answer.num_generated_tokens) == (words(tokens), len(tokens))
        assert answer.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
    greedy = answers_of(engine_of(model, eos_ids=eos, is_encoder_decoder=is_encoder_decoder), given)
    assert [one.response for one in answers] != [one.response for one in greedy]


def test_a_beam_search_ends_when_the_grace_period_does() -> None:
    engine = engine_of(family("smolvlm").model, processors={"num_beams": 2}, signal=Stop(expired=True))
    with pytest.raises(Interrupted):
        answers_of(engine, samples("smolvlm"))


def test_a_row_with_broken_logits_is_its_own_fault_in_a_beam_search() -> None:
    model, given = family("smolvlm").model, samples("smolvlm", 3)
    given[1].tensors["pixel_values"][:] = float("nan")
    answers = answers_of(engine_of(model, processors={"num_beams": 2}, eos_ids=[NEVER]), given)
    assert [answer.fault and answer.fault.kind for answer in answers] == [None, "NonFiniteLogits", None]
    assert answers[0].num_generated_tokens == CAP


def test_an_argument_of_the_models_forward_reaches_it() -> None:
    model, given = family("llava").model, samples("llava")
    plain = answers_of(engine_of(model), given)
    other = answers_of(engine_of(model, forward={"vision_feature_layer": -1}), given)
    assert [one.response for one in plain] != [one.response for one in other]
    found = model.generate(
        **batch_of_one(given[0]), do_sample=False, max_new_tokens=CAP, eos_token_id=NEVER, vision_feature_layer=-1
    )
    assert other[0].response == words(found[0, -CAP:].tolist())


def test_a_stop_string_that_is_a_special_token_ends_the_answer() -> None:
    """Its text never shows: answers are decoded without special tokens. Here every step wants to say it."""
    [answer] = answers_of(
        engine_of(
            family("smolvlm").model,
            eos_ids=[NEVER],
            stop=["</s>"],
            processors={"suppress_tokens": [number for number in range(300) if number != EOS], "min_new_tokens": 0},
        ),
        samples("smolvlm", 1),
    )
    assert (answer.finish_reason, answer.num_generated_tokens, answer.response) == (FinishReason.STOP, 1, "")
