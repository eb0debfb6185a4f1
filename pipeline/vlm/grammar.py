"""Constrained decoding: which tokens may come next in an answer that has to be of a form, and whether it came to be so.

The library is llguidance: one wheel for Linux, macOS and Windows and every Python from 3.9 (abi3) that needs no other
package, is maintained (vLLM, SGLang and llama.cpp use it), takes any tokenizer of the package tokenizers, knows nothing
of devices, and computes a mask when it is asked for one, so that a schema of any size is ready at once. xgrammar is as
fast, and asks for torch, triton and pydantic; outlines-core compiles a schema into an automaton over the vocabulary
before the first token, which takes seconds for a large one.

One grammar serves both engines. Each row has a matcher of its own, which is told the row's tokens, so a mask hangs on
nothing but the row's own answer. An answer whose form leaves nothing to add ends there, without an end token.

Shapes: B rows in the batch, V tokens of the vocabulary, W words of 32 bits, one bit for a token.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.errors import RunFailed, UsageError
from pipeline.records import EncodedSample, Fault, FinishReason, Stage
from pipeline.vlm.constraint import Constraint, canonical_json, parts_of, pattern_of

if TYPE_CHECKING:
    from pipeline.vlm.answer import Generation

log = logging.getLogger(__name__)

_MAX_THREADS = 8  # a mask takes some ten microseconds: more threads wait for each other
_NUM_ROW_RULES = 1024  # that are kept, where each row has choices of its own


def rule_of(constraint: Constraint, choices: Sequence[str] = ()) -> str:
    """The rule of an answer in llguidance's dialect of Lark, for a row with these choices of its own.

    A blank may stand before the answer: behind "Assistant:" the likely token of many a model begins with one. It is no
    part of the response, which has no white space around it.
    """
    if constraint.schema is not None:
        return _rule_of_schema(constraint.schema)
    pattern = pattern_of(choices or constraint.choices) if constraint.pattern is None else constraint.pattern
    in_slashes: str = _library().regex_to_lark(pattern, "d")  # \d means 0 to 9
    return f"start: / ?(?:{in_slashes})/"


def check_constraint(constraint: Constraint) -> None:
    """Refuse what cannot be compiled, before a model loads.

    Raises:
        UsageError: naming the key and the place; or llguidance is not installed.
    """
    if {"True", "False"} & set(constraint.choices):
        log.warning(
            "%s=%s: a YAML file reads yes, no, true and false as True and False unless they stand in quotes",
            constraint.key,
            list(constraint.choices),
        )
    if not constraint.is_shared:
        _library()
        return
    if (problem := _compile_problem(rule_of(constraint))) is None:
        return
    if constraint.schema is None:
        reason = re.split(r"error: | \(in regex\): ", problem)[-1].partition("; ")[0]
        raise UsageError(
            f"{constraint.key}={constraint.pattern or list(constraint.choices)} cannot be compiled: {reason}. Expected "
            "a regular expression in the syntax of Rust that the whole answer matches: without ^, $ and look-arounds."
        )
    place = ""
    for pointer, part in parts_of(json.loads(constraint.schema)):  # the innermost one with the same problem
        if pointer.count("/") > place.count("/") and _compile_problem(_rule_of_schema(json.dumps(part))) == problem:
            place = pointer
    raise UsageError(f"{constraint.key} cannot be compiled: {problem}, at #{place}.")


def token_table(constraint: Constraint, tokenizer: Any, eos_ids: Collection[int] = ()) -> Any:
    """What llguidance has to know of a tokenizer's tokens; some tenths of a second for 128,000 of them.

    eos_ids: tokens that end an answer; none = the tokenizer's own.

    Raises:
        UsageError: it cannot tell the text of the tokens.
    """
    _library()
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=sorted(eos_ids) or None)
    except ValueError as problem:
        raise UsageError(
            f"{constraint.key} needs a tokenizer of bytes or of sentencepiece, in the form of the package tokenizers "
            f"(tokenizer.json); this model's is a {type(tokenizer).__name__}: {_first_part(str(problem))}. Leave "
            f"{constraint.key} out, or take another model."
        ) from None


class AnswerForm:
    """Says of a finished answer whether it is of the form, and what it is in JSON."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        library = _library()
        tokenizer = library.LLTokenizer("byte")
        self._first = lru_cache(_NUM_ROW_RULES)(
            lambda choices: library.LLMatcher(tokenizer, rule_of(constraint, choices), log_level=0)
        )

    def json(self, text: str, sample: EncodedSample) -> str | None:
        """The answer as canonical JSON, a text where it is not JSON itself; None where it is not of the form.

        text: as generated, white space included.
        """
        matcher = self._first(sample.choices).deep_copy()
        if not matcher.consume_tokens(list(text.encode())) or not matcher.is_accepting():
            return None
        return canonical_json(text if self._constraint.is_json else json.dumps(text.strip()))


class Grammar:
    """The form in terms of a model's tokens.

    Args:
        eos_ids: tokens that end an answer; they may come where it is complete.
        num_threads: that fill masks side by side.

    Raises:
        UsageError: the tokenizer cannot be read.
    """

    def __init__(self, constraint: Constraint, tokenizer: Any, eos_ids: Collection[int], *, num_threads: int) -> None:
        began = time.perf_counter()
        library = _library()
        self._tokenizer = token_table(constraint, tokenizer, eos_ids)
        self._executor = library.LLExecutor(min(_MAX_THREADS, max(1, num_threads)))
        self._first = lru_cache(_NUM_ROW_RULES)(
            lambda choices: library.LLMatcher(self._tokenizer, rule_of(constraint, choices), log_level=0)
        )
        if constraint.is_shared and (problem := self._first(()).get_error()):
            raise RunFailed(f"{constraint.key} cannot be compiled for this model's tokens: {_first_part(problem)}")
        self._num_words = (self._tokenizer.vocab_size + 31) // 32
        seconds = time.perf_counter() - began
        if seconds > 1:
            log.info("%s: the tokenizer of %d tokens was read in %.1f s", constraint.key, len(tokenizer), seconds)

    @property
    def numerics(self) -> Mapping[str, str]:
        """Another version may allow other tokens: recorded in each shard."""
        return {"llguidance": importlib.metadata.version("llguidance")}

    def allowed(self, rows: Sequence[Generation], logits_BV: torch.Tensor) -> torch.Tensor:
        """The tokens that may come next, bool [B, V] on the device of the logits; all of them for a row that has ended.

        A row for which that cannot be said gets a fault.
        """
        from llguidance.numpy import fill_next_token_bitmask_par

        mask_BW = np.full((len(rows), self._num_words), -1, dtype=np.int32)
        at_work = []
        for place, row in enumerate(rows):
            if row.done:
                continue
            if row.matcher is None:
                row.matcher = self._first(row.sample.choices).deep_copy()
            at_work.append((row.matcher, place))
        fill_next_token_bitmask_par(self._executor, at_work, mask_BW)
        for matcher, place in at_work:
            if matcher.is_error():
                rows[place].fault = _fault(matcher)
        return _unpacked(mask_BW, logits_BV)

    def advance(self, row: Generation) -> None:
        """Tell a row's matcher the token that the row was given last; end the row where nothing may follow."""
        matcher, row.matcher = row.matcher, None
        if row.fault is not None or row.finish_reason is FinishReason.STOP:
            return
        if not matcher.consume_token(row.tokens[-1]):
            row.fault, row.finish_reason = _fault(matcher), None
        elif matcher.is_stopped():
            row.finish_reason = FinishReason.STOP
        elif row.finish_reason is None:
            row.matcher = matcher


def _unpacked(mask_BW: np.ndarray[Any, Any], logits_BV: torch.Tensor) -> torch.Tensor:
    """Bits as booleans. What the logits have beyond the tokenizer's tokens (a padded vocabulary) is not allowed."""
    num_tokens = logits_BV.shape[1]
    if logits_BV.device.type == "cpu":
        unpacked = np.unpackbits(mask_BW.view(np.uint8), axis=1, count=num_tokens, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    words_BW = torch.from_numpy(mask_BW)
    words_BW = words_BW.pin_memory() if logits_BV.is_cuda else words_BW
    return unpacked_on_device(words_BW.to(logits_BV.device, non_blocking=True), num_tokens)


def unpacked_on_device(words_BW: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The same where the bits lie."""
    bits_BW32 = (words_BW[:, :, None] >> torch.arange(32, device=words_BW.device, dtype=torch.int32)) & 1
    bits_BV = bits_BW32.flatten(1)[:, :num_tokens].bool()
    return torch.nn.functional.pad(bits_BV, (0, num_tokens - bits_BV.shape[1]))


def _fault(matcher: Any) -> Fault:
    problem = _first_part(matcher.get_error()) or f"no token fits ({matcher.stop_reason()})"
    return Fault(Stage.GENERATE, "GrammarError", problem)


def _rule_of_schema(schema: str) -> str:
    return f'start: " "? answer\nanswer: %json {schema}'


def _compile_problem(rule: str) -> str | None:
    is_error, messages = _library().LLMatcher.validate_grammar_with_warnings(rule)
    return _first_part(messages[0]) if is_error else None


def _first_part(message: str) -> str:
    """What the library says, without the grammar or the state that it shows behind it."""
    said = " ".join(re.split(r"\n +\d+ \| |\n<state>", message)[0].split())
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", said)[:400].rstrip(".")


def _library() -> Any:
    """llguidance.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as problem:
        raise UsageError(
            "generation.json_schema, choices and regex need the package llguidance: pip install "
            f"'vlm-batch[structured]' ({problem})."
        ) from None
    return llguidance
