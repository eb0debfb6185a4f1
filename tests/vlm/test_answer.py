"""Tokens as an answer: where it ends, and what of it is text."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.records import Answer, EncodedSample, FinishReason, PromptFacts, RecordKey
from pipeline.vlm.answer import Ending, Generation

EOS = 1
SAMPLE = EncodedSample(RecordKey(0, "default", 0), "a", {}, PromptFacts(prompt="What is it?"))


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, as byte-level tokenizers fall back to."""
    vocabulary = {"<pad>": 0, "</s>": EOS}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def ended(text: str, *, max_new_tokens: int = 100, stop: tuple[str, ...] = (), ignore_eos: bool = False) -> Answer:
    """The answer of a model that says `text` and then its end token, for ever."""
    ending = Ending(byte_tokenizer(), eos_ids=[EOS], stop=stop, ignore_eos=ignore_eos)
    generation = Generation(SAMPLE, max_new_tokens)
    tokens = byte_tokenizer()(text)["input_ids"]
    while not generation.done:
        ending.add(generation, tokens.pop(0) if tokens else EOS, finite=True)
    return ending.answer(generation)


def test_an_answer_ends_with_the_end_token_which_is_counted() -> None:
    answer = ended(" a cat ")
    assert (answer.response, answer.finish_reason, answer.num_generated_tokens) == ("a cat", FinishReason.STOP, 8)
    assert answer.facts.prompt == "What is it?"


def test_an_answer_may_be_empty() -> None:
    answer = ended("")
    assert (answer.response, answer.finish_reason, answer.num_generated_tokens) == ("", FinishReason.STOP, 1)


def test_an_answer_is_cut_at_its_cap() -> None:
    answer = ended("a cat", max_new_tokens=3)
    assert (answer.response, answer.finish_reason, answer.num_generated_tokens) == ("a c", FinishReason.LENGTH, 3)


def test_ignore_eos_goes_on_to_the_cap() -> None:
    answer = ended("cat", max_new_tokens=9, ignore_eos=True)
    assert (answer.response, answer.finish_reason, answer.num_generated_tokens) == ("cat", FinishReason.LENGTH, 9)


@pytest.mark.parametrize(
    ("text", "stop", "response", "num_tokens"),
    [
        ("one. two. three", (".",), "one", 4),
        ("one\n\ntwo", ("\n\n",), "one", 5),
        ("a###b", ("##", "###"), "a", 3),
        ("Answer: yes", ("zzz", " yes"), "Answer:", 11),
        ("猫です。犬です。", ("。",), "猫です", 12),
        ("これは猫です終わり", ("終わり",), "これは猫です", 27),
    ],
)
def test_a_stop_string_ends_the_answer_at_once_and_is_not_part_of_it(
    text: str, stop: tuple[str, ...], response: str, num_tokens: int
) -> None:
    answer = ended(text + " and much more of it", stop=stop)
    assert (answer.response, answer.finish_reason) == (response, FinishReason.STOP)
    assert answer.num_generated_tokens == num_tokens


def test_a_row_without_finite_logits_has_no_answer() -> None:
    ending = Ending(byte_tokenizer(), eos_ids=[EOS], stop=(), ignore_eos=False)
    generation = Generation(SAMPLE, 10)
    ending.add(generation, 5, finite=True)
    ending.add(generation, 5, finite=False)
    answer = ending.answer(generation)
    assert generation.done
    assert answer.fault is not None
    assert (answer.fault.stage, answer.fault.kind) == ("generate", "NonFiniteLogits")
    assert "step 1" in answer.fault.message
    assert (answer.response, answer.finish_reason, answer.num_generated_tokens) == (None, None, None)


@pytest.mark.parametrize("text", ["ab" * 50, "no, no, " * 30, "a" * 60])
def test_an_answer_that_repeats_itself_is_ended(text: str) -> None:
    ending = Ending(byte_tokenizer(), eos_ids=[EOS], stop=(), ignore_eos=False, max_repeats=4)
    generation = Generation(SAMPLE, 1000)
    for token in byte_tokenizer()(text)["input_ids"]:
        if not generation.done:
            ending.add(generation, token, finite=True)
    period = next(period for period in (1, 2, 4) if text[:period] * 4 == text[: 4 * period])
    assert generation.finish_reason is FinishReason.REPETITION
    assert len(generation.tokens) == 4 * period


def test_a_text_that_says_some_words_again_is_no_repetition() -> None:
    ending = Ending(byte_tokenizer(), eos_ids=[EOS], stop=(), ignore_eos=False, max_repeats=4)
    generation = Generation(SAMPLE, 1000)
    for token in byte_tokenizer()("a cat, a dog, a cat, a dog and a cat, a dog, a catalogue, and so on")["input_ids"]:
        ending.add(generation, token, finite=True)
    assert not generation.done
