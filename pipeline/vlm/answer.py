"""Generated tokens as an Answer: where it ends, why, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.records import Answer, EncodedSample, Fault, FinishReason, Stage

_LONGEST_PERIOD = 64  # tokens of a sequence that is looked for


@dataclass(slots=True)
class Generation:
    """The tokens of one sample while they are generated."""

    sample: EncodedSample
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)  # the end token included
    finish_reason: FinishReason | None = None
    fault: Fault | None = None
    logits_SV: list[Any] | None = None  # kept where a list stands: one tensor [V] for each token
    num_alike: list[int] = field(default_factory=list)  # for each period: last tokens equal to those one period before
    matcher: Any = None  # of a constrained answer that has begun: what its tokens were told to (pipeline.vlm.grammar)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.fault is not None


class Form(Protocol):
    """What a constrained answer has to be (pipeline.vlm.grammar.AnswerForm)."""

    def json(self, text: str, sample: EncodedSample, /) -> str | None:
        """The answer as JSON; None where it did not come to be what it has to be."""
        ...


class Ending:
    """Decides when a generation ends, and decodes it. form: of answers that are constrained."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: Sequence[int],
        stop: Sequence[str],
        ignore_eos: bool,
        max_repeats: int | None = None,
        form: Form | None = None,
    ) -> None:
        self._tokenizer, self._max_repeats, self._form = tokenizer, max_repeats, form
        # Text is decoded without special tokens, so a stop string that is one of them is compared by its number.
        special = {text: number for text in stop if (number := _special_id(tokenizer, text)) is not None}
        self.eos_ids = (frozenset() if ignore_eos else frozenset(eos_ids)) | set(special.values())
        self._stop = tuple(text for text in stop if text not in special)
        # Some tokenizers take the blank out of " ," when they decode; in a form every sign counts.
        self._exactly: dict[str, Any] = {} if form is None else {"clean_up_tokenization_spaces": False}
        # A stop string of n bytes lies in the last n tokens (a token may be part of a character), one more for a token
        # that it begins in the middle of.
        self._num_tail_tokens = max((len(stop.encode()) for stop in self._stop), default=0) + 1

    def add(self, generation: Generation, token: int, *, finite: bool) -> None:
        """Give a generation its next token and end it where a rule says so."""
        if not finite:
            message = (
                f"the logits of step {len(generation.tokens)} are not finite (NaN or infinity); try another vlm.dtype"
            )
            generation.fault = Fault(Stage.GENERATE, "NonFiniteLogits", message)
            return
        generation.tokens.append(token)
        if token in self.eos_ids or (self._stop and self._stops(generation)):
            generation.finish_reason = FinishReason.STOP
        elif len(generation.tokens) >= generation.max_new_tokens:
            generation.finish_reason = FinishReason.LENGTH
        elif self._max_repeats is not None and self._repeats(generation, self._max_repeats):
            generation.finish_reason = FinishReason.REPETITION

    def answer(self, generation: Generation) -> Answer:
        """The finished answer: special tokens skipped, stop string cut off, surrounding white space removed."""
        sample = generation.sample
        if generation.fault:
            return Answer(sample.key, sample.id, sample.facts, fault=generation.fault)
        text = self._tokenizer.decode(generation.tokens, skip_special_tokens=True, **self._exactly)
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        text = text[: min(places)] if places else text
        found = None if self._form is None else self._form.json(text, sample)
        return Answer(
            sample.key,
            sample.id,
            sample.facts,
            response=text.strip(),
            finish_reason=generation.finish_reason,
            num_generated_tokens=len(generation.tokens),
            response_json=found,
            parse_ok=None if self._form is None else found is not None,
        )

    def _repeats(self, generation: Generation, max_repeats: int) -> bool:
        """Whether the answer ends in one sequence of up to 64 tokens, as many times over."""
        tokens, alike = generation.tokens, generation.num_alike
        if not alike:
            alike.extend([0] * _LONGEST_PERIOD)
        token, found = tokens[-1], False
        for period in range(1, min(_LONGEST_PERIOD, len(tokens) - 1) + 1):
            if token == tokens[-1 - period]:
                alike[period - 1] += 1
                found |= alike[period - 1] >= period * (max_repeats - 1)
            else:
                alike[period - 1] = 0
        return found

    def _stops(self, generation: Generation) -> bool:
        tail = self._tokenizer.decode(generation.tokens[-self._num_tail_tokens :], skip_special_tokens=True)
        return any(stop in tail for stop in self._stop)


def _special_id(tokenizer: Any, text: str) -> int | None:
    added = tokenizer.added_tokens_decoder.items()
    return next((number for number, token in added if token.special and token.content == text), None)
