"""Turns as the model's chat template writes them.

Templates differ in what they take: most a list of parts for every turn, some plain text for the system's turn, for the
assistant's, or for all, with the model's image token in it. Given the other kind, a template may raise, lose the
question or print a Python list; probe.py finds out which kind is wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

from jinja2 import TemplateError

from pipeline.errors import RowFault
from pipeline.records import Stage
from pipeline.tensors.time_limit import time_limit

_MOST_SECONDS = 10.0  # for a conversation; templates take milliseconds

Turn = Mapping[str, Any]  # {"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}

# What chat templates and processors were seen to raise on a row they do not like: an image of 1 x 5000 divides by zero,
# a template raises an error of its own where roles do not alternate.
ROW_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    StopIteration,  # more places for images in the text than images
    TemplateError,
    TypeError,
    ValueError,
)
# Stands where the answer begins, so that a template cannot trim the blanks before it. No template looks into a text.
_END = "|answer-begins-here|"
_clock = threading.Lock()


class PromptForm(Protocol):
    """How turns become the text that the processor takes."""

    def text(self, turns: Sequence[Turn]) -> str: ...


class ChatForm:
    """A chat template, given the content of its turns in one of the ways that templates want.

    Args:
        template: text of the Jinja template.
        date: what `strftime_now` says, as 2026-01-31; None = today.
        string_roles: roles whose content is given as one text; the others' is a list of parts.
        placeholder: what stands for an image in such a text; "" where the processor puts images in by itself.
    """

    def __init__(
        self,
        processor: Any,
        template: str,
        *,
        date: str | None = None,
        string_roles: frozenset[str] = frozenset(),
        placeholder: str = "",
    ) -> None:
        self._processor, self.template, self._date = processor, template, date
        self.string_roles, self._placeholder = string_roles, placeholder

    def text(self, turns: Sequence[Turn]) -> str:
        """The prompt with the generation prompt at its end.

        Where the assistant has the last turn, the prompt ends with that turn's text, blanks included, for the model to
        go on from.
        """
        if turns[-1]["role"] != "assistant":
            return self.rendered(turns, add_generation_prompt=True)
        *before, last = turns
        prefix = text_of(last)
        marked = {"role": "assistant", "content": [{"type": "text", "text": prefix + _END}]}
        try:
            head, found, _ = self.rendered([*before, marked], add_generation_prompt=False).rpartition(_END)
        except ROW_ERRORS:
            if not before:
                raise
            found = ""
        if found and head.endswith(prefix.lstrip()):
            return head
        return self.rendered(before, add_generation_prompt=True) + prefix  # it refuses or rewrites such a turn

    def rendered(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        return rendered(
            self._processor,
            self.template,
            [self._given(turn) for turn in turns],
            add_generation_prompt=add_generation_prompt,
            date=self._date,
        )

    def _given(self, turn: Turn) -> Turn:
        if turn["role"] not in self.string_roles:
            return turn
        return {"role": turn["role"], "content": _as_string(turn["content"], self._placeholder)}


class PlainForm:
    """Turns without a template: the bare text.

    A turn begins on a line of its own, the assistant's follows the question after a blank: "Question: Is it red?
    Answer: no" and on the next line the next question. An image is written as `placeholder`, where the turn's own text
    does not hold it already.

    Args:
        placeholder: "" where the processor puts images in by itself; None where it is not known.
        tokens: texts that count as a place for an image when the user wrote them.
    """

    def __init__(self, placeholder: str | None, tokens: Sequence[str] = ()) -> None:
        self._placeholder, self._tokens = placeholder, tokens

    def text(self, turns: Sequence[Turn]) -> str:
        written = ""
        for turn in turns:
            said = self._said(turn["content"])
            if written and said and not (written[-1].isspace() or said[0].isspace()):
                written += " " if turn["role"] == "assistant" else "\n"
            written += said
        return written

    def _said(self, parts: Sequence[Mapping[str, str]]) -> str:
        if not self._placeholder:
            return "".join(part["text"] for part in parts if part["type"] == "text")
        texts = [part["text"] for part in parts if part["type"] == "text"]
        num_written = max(sum(text.count(token) for text in texts) for token in (self._placeholder, *self._tokens))
        said = []
        for part in parts:
            if part["type"] == "text":
                said.append(part["text"])
            elif num_written:
                num_written -= 1  # images that a template does not place come first
            else:
                said.append(self._placeholder)
        return "".join(said)


def rendered(
    processor: Any, template: str, messages: Sequence[Turn], *, add_generation_prompt: bool, date: str | None
) -> str:
    """One rendering of a chat template by transformers, whose sandbox it runs in, on the given day.

    Raises:
        RowFault: it does not come to an end; the sandbox forbids much, and no loop within a loop.
    """
    endless = RowFault(Stage.TEMPLATE, "TemplateTimeout", f"the chat template took more than {_MOST_SECONDS:g} s")
    with _today(date), time_limit(_MOST_SECONDS, endless):
        text = processor.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    return str(text)


def text_of(turn: Turn) -> str:
    """A turn's text, image places left out."""
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _as_string(parts: Sequence[Mapping[str, str]], placeholder: str) -> str:
    """Parts as one text. Images before all text get lines of their own, as LLaVA was trained."""
    said: list[str] = []
    for part in parts:
        if part["type"] == "text":
            said.append(part["text"])
        elif placeholder:
            leading = all(text == f"{placeholder}\n" for text in said)
            said.append(f"{placeholder}\n" if leading else placeholder)
    return "".join(said)


class _Day:
    """Stands in for the datetime class of transformers' renderer, which asks it nothing but now()."""

    def __init__(self, date: str) -> None:
        self._day = datetime.fromisoformat(date)

    def now(self) -> datetime:
        return self._day


@contextmanager
def _today(date: str | None) -> Iterator[None]:
    """`strftime_now` of a chat template says this date: a run that is resumed tomorrow asks what it asked today.

    transformers offers no way to set it (a function given to the template becomes text), so its clock is replaced while
    it renders. probe.py checks that this works.
    """
    from transformers.utils import chat_template_utils

    if date is None:
        yield
        return
    with _clock:
        real = chat_template_utils.datetime
        chat_template_utils.datetime = _Day(date)
        try:
            yield
        finally:
            chat_template_utils.datetime = real
