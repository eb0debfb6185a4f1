"""One answer as text while it is generated, by whatever engine the run uses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import TextIteratorStreamer

from pipeline.errors import Interrupted
from pipeline.records import Answer, EncodedSample
from pipeline.vlm.base import Engine

_PATIENCE_SECONDS = 5.0


class Halt:
    """A StopSignal without a grace period: once set, the engine gives up at the next token."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    @property
    def expired(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Ask for the end."""
        self._event.set()


class AnswerStream:
    """Iterate over the pieces of the answer's text; `answer` is there when they end.

    The pieces together are the answer's response: what leads to a stop string is held back until it is sure not to be
    one, and so is white space that may turn out to be the end. Where they are not (`differs`), the library's piecewise
    decoding and the decoding of the whole do not agree; the response is right.

    Generation runs in a thread. Leaving the iteration early, by Ctrl-C say, sets `halt` and waits for the thread.

    Raises, while iterating:
        RunFailed, or whatever else the engine raises.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, sample: EncodedSample, *, stop_strings: Sequence[str], halt: Halt
    ) -> None:
        self.answer: Answer | None = None
        self.differs = False
        self.seconds = 0.0
        self.first_token_seconds: float | None = None  # None where the engine knows its tokens only at the end
        self._engine, self._sample, self._halt = engine, sample, halt
        self._streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
        self._text = _Text(stop_strings)
        self._problem: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        thread = threading.Thread(target=self._generate, name="generate", daemon=True)
        try:
            thread.start()
            for piece in self._streamer:
                if new := self._text.add(piece):
                    yield new
            thread.join()
        except BaseException:  # Ctrl-C, or the reader has gone: nobody waits for the rest
            self._halt.set()
            if thread.ident is not None:
                thread.join(_PATIENCE_SECONDS)
            if thread.is_alive():  # deep in a computation; a process that ends under it would crash
                os._exit(Interrupted.exit_code)
            raise
        if self._problem is not None:
            raise self._problem
        if self.answer is not None and self.answer.response is not None:
            shown = self._text.shown
            self.differs = not self.answer.response.startswith(shown)
            if not self.differs and len(shown) < len(self.answer.response):
                yield self.answer.response[len(shown) :]

    def _generate(self) -> None:
        started = time.monotonic()

        def on_token(sample: EncodedSample, token: int) -> None:
            if self.first_token_seconds is None:
                self.first_token_seconds = time.monotonic() - started
            self._streamer.put(np.array([token]))

        self._engine.on_token = on_token
        try:
            for answer in self._engine.answers(iter([self._sample])):
                self.answer = answer
        except BaseException as problem:  # handed to the thread that iterates
            self._problem = problem
        finally:
            self.seconds = time.monotonic() - started
            self._engine.on_token = None
            self._streamer.end()


class _Text:
    """What of a growing text is sure to be part of the answer."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop = tuple(stop_strings)
        self._held = ""
        self._stopped = False
        self.shown = ""

    def add(self, piece: str) -> str:
        """The next part that may be shown."""
        if self._stopped:
            return ""
        text = self._held + piece
        text = text if self.shown else text.lstrip()
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self._stopped = True
            text = text[: min(places)]
        sure = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)].rstrip()
        self._held = text[len(sure) :]
        self.shown += sure
        return sure


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
