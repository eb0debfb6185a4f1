"""Rows that wait for a slot: a window of the stream, longest prompt first, rows of one image beside each other.

A window is emptied before the next is filled. Otherwise the shortest rows would wait to the end of the run, and with
them their shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from pipeline.records import EncodedSample
from pipeline.vlm.base import Batcher

_WINDOW_BYTES = 1 << 29


class Queue:
    """Held by a loop.

    Args:
        num_window_rows: samples that are sorted together.
    """

    def __init__(self, samples: Iterator[EncodedSample], batcher: Batcher, *, num_window_rows: int) -> None:
        self._samples, self._batcher, self._num_window_rows = samples, batcher, num_window_rows
        self._window: deque[EncodedSample] = deque()
        self._ended = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be taken without waiting for it."""
        return not self._window and (self._ended or not self._ready)

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more."""
        return self._ended and not self._window

    def put_back(self, samples: Iterable[EncodedSample]) -> None:
        """What was taken and could not be begun, in its order."""
        self._window.extendleft(reversed(list(samples)))

    def take(self, num_rows: int, num_tokens: int, *, wait: bool) -> list[EncodedSample]:
        """Up to so many samples that may be padded together to so many prompt tokens; always one where there is any.

        wait: whether to wait for the first one where none is ready.
        """
        if not self._window:
            self._fill(wait=wait)
        taken: list[EncodedSample] = []
        while self._window and len(taken) < num_rows:
            sample = self._window[0]
            width = max(sample.num_tokens, *(one.num_tokens for one in taken)) if taken else sample.num_tokens
            if taken and (width * (len(taken) + 1) > num_tokens or not self._batcher.fits(taken[0], sample)):
                break
            taken.append(self._window.popleft())
        return taken

    def _fill(self, *, wait: bool) -> None:
        found: list[EncodedSample] = []
        size_bytes = 0
        while len(found) < self._num_window_rows and size_bytes < _WINDOW_BYTES:
            if not self._ready and not (wait and not found):
                break
            sample = next(islice(self._samples, 1), None)
            if sample is None:
                self._ended = True
                break
            found.append(sample)
            size_bytes += sum(array.nbytes for array in sample.tensors.values())
        self._window.extend(self._batcher.sorted(found))

    @property
    def _ready(self) -> bool:
        return not self._ended and bool(getattr(self._samples, "ready", True))
