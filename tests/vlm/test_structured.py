"""Constrained decoding: every answer is of its form, in any batch and in either engine; a bad row costs itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_static import Stop
from tiny_models import EOS, PAD, family, samples, stream
from tiny_models import tokenizer as words_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UsageError
from pipeline.records import Answer, EncodedSample, FinishReason, PromptFacts, RecordKey, Stage
from pipeline.tensors.batch import Batcher
from pipeline.vlm.answer import Ending, Generation
from pipeline.vlm.choice import TokenChoice
from pipeline.vlm.constraint import constraint_of
from pipeline.vlm.generation import GenerationSettings, SamplingSettings
from pipeline.vlm.grammar import AnswerForm, Grammar, check_constraint, token_table, unpacked_on_device
from pipeline.vlm.load import LoadedModel
from pipeline.vlm.options import GenerationConfig, GreedyConfig, SlotsConfig
from pipeline.vlm.sampling import Sampler
from pipeline.vlm.slots.engine import SlotsEngine
from pipeline.vlm.static import StaticEngine

# Tokens that span several parts of a grammar, as those of real tokenizers do; the last ones are wider than a key.
MERGED = [
    '{"',
    '":',
    '",',
    '"}',
    "}]",
    "],",
    "[{",
    "Ġ{",
    '":Ġ',
    ",Ġ",
    '",Ġ"',
    "Ġ[",
    "tr",
    "ue",
    "true",
    "ye",
    "yes",
    "Ġyes",
]
NUM_TOKENS = 300  # of the tiny models' logits; the tokenizer has fewer
GREEDY = SamplingSettings(do_sample=False)
SAMPLED = SamplingSettings(do_sample=True, temperature=1.5, top_k=40, top_p=0.9, repetition_penalty=1.3)
BOX = {
    "type": "object",
    "properties": {
        "größe": {"enum": ["klein", "groß"]},
        "boxes": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
                "required": ["x", "ok"],
            },
            "minItems": 1,
            "maxItems": 2,
        },
        "note": {"type": "string", "maxLength": 5},
    },
    "required": ["größe", "boxes", "note"],
}
FORMS = {
    "schema": GreedyConfig(json_schema=json.dumps(BOX)),
    "choices": GreedyConfig(choices=["yes", "no", "not sure", "no way (x|y)", "ja/nein", "wörtlich"]),
    "regex": GreedyConfig(regex=r"[A-Z]{2}-\d{1,3}(/\d)?"),
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and some merged tokens, behind the special tokens of the tiny models."""
    vocabulary = {"<pad>": PAD, "<s>": 1, "</s>": EOS}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = []
    for text in MERGED:
        merges.append((text[:-1], text[-1]) if text[:-1] in vocabulary else (text[0], text[1:]))
        vocabulary[text] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[pair for pair in merges if pair[1] in vocabulary]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<pad>", "<s>", "</s>")])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", bos_token="<s>")
    assert len(found) < NUM_TOKENS
    return found


@cache
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As those of Llama 2 and Mistral: blanks are parts of tokens, and each byte has a token to fall back to."""
    vocabulary = {"<unk>": PAD, "<s>": 1, "</s>": EOS} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for text in ["\u2581", *'{}":,[]01789yesno', "ye", "yes", "\u2581yes", '{"', '\u2581{"', '":']:
        vocabulary[text] = len(vocabulary)
    merges = [("y", "e"), ("ye", "s"), ("\u2581", "yes"), ("{", '"'), ("\u2581", '{"'), ('"', ":")]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def parts(
    options: GenerationConfig,
    sampling: SamplingSettings = GREEDY,
    *,
    tokens: Callable[[], PreTrainedTokenizerFast] = tokenizer,
    **ends: Any,
) -> dict[str, Any]:
    """What an engine is given of an answer's form."""
    constraint = constraint_of(options)
    assert constraint is not None
    rules: dict[str, Any] = {"eos_ids": [EOS], "stop": (), "ignore_eos": False} | ends
    return {
        "sampler": Sampler(sampling, seed=7),
        "ending": Ending(tokens(), **rules, form=AnswerForm(constraint)),
        "grammar": Grammar(constraint, tokens(), rules["eos_ids"], num_threads=2),
        "stop": Stop(),
    }


def engine_of(
    options: GenerationConfig,
    name: str = "llava",
    *,
    slots: bool = False,
    rows: int = 4,
    sampling: SamplingSettings = GREEDY,
    cap: int = 120,
    is_encoder_decoder: bool = False,
    processors: dict[str, Any] | None = None,
    **ends: Any,
) -> StaticEngine | SlotsEngine:
    given: dict[str, Any] = parts(options, sampling, **ends) | {
        "loaded": LoadedModel(family(name).model, tokenizer(), torch.device("cpu"), (EOS,), PAD, is_encoder_decoder),
        "batcher": Batcher(max_rows=rows, max_tokens=100_000, max_new_tokens=cap, pad_id=PAD),
        "settings": GenerationSettings(sampling, processors or {}, {}),
        "max_new_tokens": cap,
    }
    static = StaticEngine(**given)
    return SlotsEngine(**given, static=static, options=SlotsConfig(max_batch_rows=rows)) if slots else static


def answers_of(engine: StaticEngine | SlotsEngine, given: Sequence[EncodedSample]) -> list[Answer]:
    answers = sorted(engine.answers(stream(list(given))), key=lambda answer: answer.key)
    assert [answer.key for answer in answers] == [one.key for one in given]
    return answers


def check_form(answer: Answer, options: GenerationConfig) -> None:
    """An answer that was not cut is of the form, and says so; one that was may be (it could have gone on)."""
    assert answer.fault is None and answer.response is not None
    assert answer.parse_ok is (answer.response_json is not None)
    assert answer.parse_ok or answer.finish_reason is FinishReason.LENGTH, answer
    if not answer.parse_ok:
        return
    found = json.loads(answer.response_json or "")
    if options.json_schema is not None:
        jsonschema.validate(found, json.loads(options.json_schema))
        assert json.loads(answer.response) == found
    else:
        assert found == answer.response
    if options.choices is not None:
        assert answer.response in options.choices


# Without a model: logits drawn at random, and tokens in the hands of the grammar alone --------------------------------


def drawn(options: GenerationConfig, *, rows: int = 2, cap: int = 1500, seed: int = 0, **ends: Any) -> list[Answer]:
    """Answers of a model that finds all tokens equally likely, but those that do not exist the likeliest."""
    given, random = parts(options, **ends), np.random.default_rng(seed)
    choose = TokenChoice(given["sampler"], given["ending"], given["stop"], given["grammar"])
    generations = [Generation(sample_of(row), cap) for row in range(rows)]
    while not all(row.done for row in generations):
        logits_BV = torch.from_numpy(random.random((rows, NUM_TOKENS), dtype=np.float32))
        logits_BV[:, 294:] = 9  # neither tokenizer has as many
        choose(generations, logits_BV, None)
    assert all(row.matcher is None for row in generations)
    return [given["ending"].answer(row) for row in generations]


def sample_of(row: int = 0, choices: tuple[str, ...] = ()) -> EncodedSample:
    return EncodedSample(RecordKey(row, "default", 0), f"row {row}", {}, PromptFacts(), choices=choices)


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
leaves = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.tuples(st.integers(-(10**6), 10**6), st.integers(0, 10**6)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    ),
    st.tuples(st.integers(-1000, 1000), st.integers(1, 1000)).map(
        lambda pair: {"type": "number", "minimum": pair[0] / 8, "maximum": sum(pair) / 8}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda pair: {"type": "string", "minLength": pair[0], "maxLength": sum(pair)}
    ),
    st.lists(keys | st.integers() | st.booleans() | st.none(), min_size=1, max_size=4).map(lambda some: {"enum": some}),
    (keys | st.integers()).map(lambda value: {"const": value}),
    st.sampled_from([{"type": "string", "format": "date"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]),
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(keys, inner, max_size=4).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties)) if properties else st.nothing()).map(
            lambda required: {"type": "object", "properties": properties, "required": sorted(required)}
        )
    )


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        _objects(inner),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda given: {"type": "array", "items": given[0], "minItems": given[1], "maxItems": given[1] + given[2]}
        ),
        st.lists(inner, min_size=2, max_size=2).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(schemas, st.integers(0, 1000))
@example(BOX, 0)
@example({"type": "object", "properties": {'"\\\n': {"const": "::= // #"}}, "required": ['"\\\n']}, 0)
def test_random_logits_give_json_of_any_bounded_schema(schema: dict[str, Any], seed: int) -> None:
    options = GreedyConfig(json_schema=json.dumps(schema))
    for answer in drawn(options, seed=seed):
        assert answer.parse_ok, (answer.response, answer.fault)
        check_form(answer, options)


@settings(deadline=None, max_examples=30)
@given(st.lists(keys.map(str.strip).filter(bool), min_size=1, max_size=6, unique=True), st.integers(0, 1000))
@example(["1", "10", "100"], 0)
@example(["a/b", "a\nb", "\\", "[x]", "a b-c", "{}", "^$", "/", "#", "x // y"], 1)
def test_random_logits_give_one_of_any_choices(choices: list[str], seed: int) -> None:
    options = GreedyConfig(choices=choices)
    for answer in drawn(options, seed=seed):
        assert answer.parse_ok, (answer.response, answer.fault)
        check_form(answer, options)


def test_each_choice_is_reached_also_one_that_begins_another() -> None:
    answers = drawn(GreedyConfig(choices=["1", "10", "2"]), rows=60)
    assert {answer.response for answer in answers} == {"1", "10", "2"}
    # What can go no further ends by itself; "1" may go on, and takes an end token.
    lengths = {answer.response: answer.num_generated_tokens for answer in answers}
    assert lengths["2"] in (1, 2)  # a blank may stand before it
    assert all(answer.num_generated_tokens > 1 for answer in answers if answer.response == "1")


def test_a_pattern_is_matched_as_a_whole_and_digits_are_ascii() -> None:
    for answer in drawn(GreedyConfig(regex=r"\d{3}|(?i)no"), rows=40):
        assert answer.parse_ok and answer.response is not None
        assert answer.response.isascii() and (answer.response.isdigit() or answer.response.lower() == "no")


def test_an_answer_with_a_stop_string_in_it_is_cut_and_not_parsed() -> None:
    schema = '{"type": "array", "items": {"const": 7}, "minItems": 3, "maxItems": 3}'
    (answer,) = drawn(GreedyConfig(json_schema=schema), rows=1, stop=[",7", ", 7"])
    assert (answer.response, answer.finish_reason) == ("[7", FinishReason.STOP)
    assert (answer.response_json, answer.parse_ok) == (None, False)


def test_a_cut_answer_is_not_parsed_and_keeps_its_text() -> None:
    (answer,) = drawn(GreedyConfig(json_schema='{"const": "abcdefghij"}'), rows=1, cap=4)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.response and '"abcdefghij"'.startswith(answer.response)
    assert (answer.response_json, answer.parse_ok) == (None, False)


def test_json_that_is_cut_within_a_number_does_not_pass_for_whole() -> None:
    answers = drawn(GreedyConfig(json_schema='{"type": "integer", "minimum": 100, "maximum": 999}'), rows=8, cap=2)
    assert any(answer.response.isdigit() for answer in answers if answer.response)
    assert not any(answer.parse_ok for answer in answers)


def test_an_answer_that_is_whole_at_its_cap_is_no_cut_one() -> None:
    answers = drawn(GreedyConfig(choices=["a", "b"]), rows=20, cap=1)
    whole = [answer for answer in answers if answer.parse_ok]
    assert whole and all(answer.finish_reason is FinishReason.STOP for answer in whole)


@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_of_sentencepiece_gives_its_blanks_and_bytes(form: str) -> None:
    answers = drawn(FORMS[form], rows=20, tokens=sentencepiece_tokenizer)
    for answer in answers:
        assert answer.parse_ok, (answer.response, answer.fault)
        check_form(answer, FORMS[form])
    assert len({answer.response for answer in answers}) > 3


def test_rows_have_choices_of_their_own() -> None:
    constraint = constraint_of(GreedyConfig(choices_column="options"))
    assert constraint is not None
    given = parts(GreedyConfig(choices_column="options"))
    rows = [Generation(sample_of(0, ("red", "green")), 20), Generation(sample_of(1, ("A", "B")), 20)]
    choose = TokenChoice(given["sampler"], given["ending"], given["stop"], given["grammar"])
    while not all(row.done for row in rows):
        choose(rows, torch.rand(2, NUM_TOKENS), None)
    answers = [given["ending"].answer(row) for row in rows]
    assert answers[0].response in ("red", "green") and answers[1].response in ("A", "B")
    assert all(answer.parse_ok for answer in answers)


def test_bits_are_unpacked_on_a_device_as_on_the_host() -> None:
    words = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (3, 4), dtype=np.int64).astype(np.int32)
    for num_tokens in (100, 128, 131):
        truth = np.unpackbits(words.view(np.uint8), axis=1, count=num_tokens, bitorder="little").astype(bool)
        found = unpacked_on_device(torch.from_numpy(words), num_tokens)
        assert np.array_equal(found.numpy(), truth), num_tokens


class Wordy:
    """A tokenizer in Python."""

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(("tokens", "said"), [(Wordy, "a Wordy: Only fast"), (words_tokenizer, "decoder type: None")])
def test_a_tokenizer_whose_tokens_have_no_text_of_their_own_is_refused(tokens: Callable[[], Any], said: str) -> None:
    constraint = constraint_of(FORMS["choices"])
    assert constraint is not None
    with pytest.raises(UsageError, match=f"generation.choices needs a tokenizer of bytes or of sentencepiece.*{said}"):
        token_table(constraint, tokens())


# With models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_alone_and_in_batches_both_engines_give_the_same_answers(form: str, sampling: SamplingSettings) -> None:
    """Promise 3, with a mask for each row."""
    given = [
        replace(one, key=RecordKey(2 * one.key.row_index + n, "default", n), max_new_tokens=cap)
        for one, cap in zip(samples("llava"), (120, 120, 5, 120, 120, 2), strict=True)
        for n in range(2)
    ]
    options = FORMS[form]
    alone = answers_of(engine_of(options, rows=1, sampling=sampling), given)
    for answer in alone:
        check_form(answer, options)
    assert any(answer.parse_ok for answer in alone)
    assert answers_of(engine_of(options, sampling=sampling), given) == alone
    slots = engine_of(options, slots=True, sampling=sampling)
    assert isinstance(slots, SlotsEngine)
    slots.fit.reads_late = True  # as on a GPU: a mask needs the token before it, and is not late
    assert answers_of(slots, given) == alone
    assert slots.numerics["engine"] == "slots" and slots.numerics["llguidance"][0].isdigit()


def test_samples_of_a_row_differ_and_each_is_of_the_form() -> None:
    one = samples("llava", 1)[0]
    given = [replace(one, key=RecordKey(0, "default", n)) for n in range(8)]
    answers = answers_of(engine_of(FORMS["regex"], slots=True, sampling=SAMPLED), given)
    for answer in answers:
        check_form(answer, FORMS["regex"])
        assert answer.parse_ok
    assert len({answer.response for answer in answers}) > 2


def test_an_encoder_decoder_is_constrained_within_the_loop_of_transformers() -> None:
    given = samples("t5gemma2", 4)
    for form, options in FORMS.items():
        together = answers_of(engine_of(options, "t5gemma2", is_encoder_decoder=True), given)
        for answer in together:
            check_form(answer, options)
        assert together == answers_of(engine_of(options, "t5gemma2", rows=1, is_encoder_decoder=True), given), form


def test_a_traced_answer_shows_the_logits_of_the_model() -> None:
    """The parity check compares what the model says, not what the grammar leaves of it."""
    engine = engine_of(FORMS["choices"], slots=True)
    (trace,) = engine.trace(samples("llava", 1))
    assert trace is not None and len(trace.tokens) == len(trace.logits_SV)
    assert all(logits_V.isfinite().all() for logits_V in trace.logits_SV)


def test_a_row_whose_grammar_fails_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [replace(one, choices=("yes", "no")) for one in samples("llava", 4)]
    given[2] = replace(given[2], choices=("broken",))
    for slots in (False, True):
        engine = engine_of(GreedyConfig(choices_column="options"), slots=slots)
        grammar = engine._choose._grammar
        assert grammar is not None
        first = grammar._first
        matcher = llguidance.LLMatcher(grammar._tokenizer, "start: /(/", log_level=0)
        monkeypatch.setattr(
            grammar, "_first", lambda choices, f=first, m=matcher: m if choices == ("broken",) else f(choices)
        )
        answers = answers_of(engine, given)
        fault = answers[2].fault
        assert fault is not None and (fault.stage, fault.kind) == (Stage.GENERATE, "GrammarError")
        assert "unclosed group" in fault.message and "\n" not in fault.message
        assert [answer.response in ("yes", "no") for answer in answers] == [True, True, False, True]


def test_a_token_that_the_form_needs_and_another_setting_bans_is_the_rows_error() -> None:
    letters = tokenizer().convert_tokens_to_ids(["n", "y", "ye", "yes", "Ġ", "Ġyes"])
    engine = engine_of(GreedyConfig(choices=["yes", "no"]), processors={"suppress_tokens": letters})
    for answer in answers_of(engine, samples("llava", 2)):
        assert answer.fault is not None and answer.fault.kind == "GrammarError"


def test_logits_that_are_not_finite_are_still_told() -> None:
    given = parts(FORMS["choices"])
    choose = TokenChoice(given["sampler"], given["ending"], given["stop"], given["grammar"])
    row = Generation(sample_of(), 5)
    logits_BV = torch.rand(1, NUM_TOKENS)
    logits_BV[0, 299] = torch.nan  # no token of the form
    choose([row], logits_BV, None)
    assert row.fault is not None and row.fault.kind == "NonFiniteLogits"


def test_every_form_of_this_file_compiles() -> None:
    for options in FORMS.values():
        constraint = constraint_of(options)
        assert constraint is not None
        check_constraint(constraint)
