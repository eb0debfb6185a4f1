"""A conversation over images: turns from standard input, answers as they come."""

from __future__ import annotations

import importlib
import os.path
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, TextIO

from pipeline.assembly import preparation_options
from pipeline.config import RunConfig
from pipeline.errors import RowFault, UsageError
from pipeline.preparation import Preparation, Task
from pipeline.preview.options import PreviewOptions
from pipeline.preview.speaker import Speaker
from pipeline.preview.terminal import LABEL_WIDTH, Terminal
from pipeline.prompt.image import open_image
from pipeline.prompt.template import DEFAULT_NAME, PromptFormat
from pipeline.records import Answer, ImageRef, RecordKey, Row
from pipeline.vlm.identity import identify

_WORDS = "/image PATH adds an image to the next turn, /reset starts over, /quit ends"


def chat(config: RunConfig, options: PreviewOptions, terminal: Terminal, turns: TextIO) -> int:
    """Answer the user's turns until they end; the exit code, 1 where turns were asked and none was answered.

    Raises:
        UsageError: an image cannot be opened, or the settings cannot work without a dataset.
        RunFailed: the model cannot be loaded.
    """
    if config.prompt.format is PromptFormat.plain:
        raise UsageError("chat=true needs the model's chat template; prompt.format=plain leaves it out.")
    conversation = _Conversation(config)
    for path in options.image:
        try:
            conversation.add_image(path)
        except RowFault as fault:
            raise UsageError(f"image={fault.message}") from None
    # A turn is a row that brings its own conversation, so that it goes the way of every other row. The other options
    # of the prompt are about rows of a dataset; prompt.system is about any conversation.
    prompt = replace(config.prompt, user="", variants={}, examples=[], assistant_prefix=None)
    identity = identify(config.vlm)
    template = prompt.build((), has_messages=True)
    generation = replace(config.generation, max_new_tokens_column=None)  # a column of rows
    config = replace(config, prompt=prompt, generation=generation)
    preparation = Preparation(preparation_options(config, identity, template, "chat"))
    speaker = Speaker(config, identity, preparation.processor, terminal)
    speaker.load()
    terminal.line("chat", _WORDS)
    num_asked = num_answered = 0
    for text in _lines(turns, terminal):
        word, _, rest = text.partition(" ")
        if word == "/quit":
            break
        if word == "/reset":
            conversation = _Conversation(config)
            terminal.line("chat", "starting over, without images")
        elif word == "/image":
            try:
                terminal.line("image", conversation.add_image(rest.strip()))
            except RowFault as fault:
                terminal.line("error", fault.message)
        elif re.fullmatch("/[a-z]+", word):
            terminal.line("error", f"there is no {word}; {_WORDS}")
        else:
            num_asked += 1
            num_answered += conversation.asked(text, preparation, speaker)
    return 0 if num_answered or not num_asked else 1


class _Conversation:
    """Turns and images so far. A turn that gets no answer is forgotten, its images are not."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._turns: list[dict[str, Any]] = []
        self._images: list[ImageRef] = []
        self._num_placed = 0

    def add_image(self, path: str) -> str:
        """Put an image before the text of the next turn; its size and path.

        Raises:
            RowFault: it cannot be opened.
        """
        ref = ImageRef(path=os.path.expanduser(path))
        opened = open_image(
            ref, max_image_pixels=self._config.prompt.max_image_pixels, allow_urls=self._config.dataset.allow_urls
        )
        self._images.append(ref)
        return f"{opened.width} x {opened.height} pixels, {path}"

    def asked(self, text: str, preparation: Preparation, speaker: Speaker) -> bool:
        """Stream the answer to the next turn; whether there is one."""
        places = [{"type": "image"} for _ in self._images[self._num_placed :]]
        turn = {"role": "user", "content": [*places, {"type": "text", "text": text}]}
        messages = (*self._turns, turn)
        row = Row(len(self._turns), f"turn {len(self._turns)}", tuple(self._images), {}, messages=messages)
        (item,) = preparation(Task(row, (RecordKey(row.index, DEFAULT_NAME, 0),)))
        if isinstance(item, Answer):
            assert item.fault is not None
            speaker.fault(item.fault)
            return False
        response = speaker.answer(item).response
        if response is None:
            return False
        self._turns += [turn, {"role": "assistant", "content": [{"type": "text", "text": response}]}]
        self._num_placed = len(self._images)
        return True


def _lines(turns: TextIO, terminal: Terminal) -> Iterator[str]:
    """The user's turns, without blank ones. Piped turns are repeated, so that the output reads as a conversation."""
    if turns is sys.stdin and turns.isatty():
        with suppress(ImportError):
            importlib.import_module("readline")  # gives input() arrow keys and a history
        with suppress(EOFError):
            while True:
                if text := input("user".ljust(LABEL_WIDTH)).strip():
                    yield text
        terminal.end()
        return
    for line in turns:
        if text := line.strip():
            terminal.line("user", text)
            yield text
