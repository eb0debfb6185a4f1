"""Rows that wait for a slot: a window of the stream, longest prompt first, rows of one image beside each other.

A window is emptied before the next is filled, until the last: otherwise the shortest rows would wait to the end of the
run, and with them their shards.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.records import EncodedSample
from pipeline.vlm.base import Batcher

_WINDOW_BYTES = 1 << 29


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A sample, and how many tokens its prompt begins with that others about the same image begin with, too."""

    sample: EncodedSample
    num_shared: int = 0

    @property
    def num_own_tokens(self) -> int:
        return self.sample.num_tokens - self.num_shared


class Queue:
    """Held by a loop.

    Args:
        num_window_rows: samples that are sorted together.
        shared: of prompts about one image, how many tokens they begin with that may be computed once.
    """

    def __init__(
        self,
        samples: Iterator[EncodedSample],
        batcher: Batcher,
        *,
        num_window_rows: int,
        shared: SharedPrefix | None = None,
    ) -> None:
        self._samples, self._batcher, self._num_window_rows = samples, batcher, num_window_rows
        self._shared = shared
        self._window: deque[Waiting] = deque()
        self._arrived: list[EncodedSample] = []  # of the next window
        self._arrived_bytes = 0
        self._stream_ended = False

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more."""
        return self._stream_ended and not self._window and not self._arrived

    def gather(self, num_rows: int, *, wait: bool) -> bool:
        """Take in what is there; whether so many rows wait now, or all that are left.

        wait: whether to wait until it is so.
        """
        while len(self._arrived) < self._num_window_rows and self._arrived_bytes < _WINDOW_BYTES:
            enough = len(self._window) + len(self._arrived) >= num_rows
            if self._stream_ended or not (self._ready or (wait and not enough)):
                break
            sample = next(self._samples, None)
            if sample is None:
                self._end()
                break
            self._arrived.append(sample)
            self._arrived_bytes += sample.num_bytes
        return self._stream_ended or len(self._window) + len(self._arrived) >= num_rows

    def _end(self) -> None:
        """All that is left is one window: a long answer that came last would else begin last, and end alone."""
        self._stream_ended = True
        if self._arrived:
            self._arrived = [*(one.sample for one in self._window), *self._arrived]
            self._window.clear()

    def put_back(self, waiting: Iterable[Waiting]) -> None:
        """What was taken and could not be begun, in its order."""
        self._window.extendleft(reversed(list(waiting)))

    def take(self, num_rows: int, num_tokens: int) -> list[Waiting]:
        """Of those gathered, up to so many rows that may be computed together; one at least.

        num_tokens: of the prompts, padding included; and of the prefixes that they share, which are computed before.
        """
        if not self._window:
            self._sort()
        taken: list[Waiting] = []
        width = num_prefix_tokens = 0
        while self._window and len(taken) < num_rows:
            one = self._window[0]
            if taken and (
                bool(one.num_shared) != bool(taken[0].num_shared) or not self._batcher.fits(taken[0].sample, one.sample)
            ):
                break
            begins = bool(one.num_shared) and not (taken and _share_prefix(taken[-1], one))
            # A family is not divided between two batches unless it is alone: the rests of one lie beside each other.
            rows = self._family() if begins and taken else 1
            width = max(width, one.num_own_tokens)
            num_prefix_tokens += one.num_shared if begins else 0
            if taken and (
                len(taken) + rows > num_rows
                or width * (len(taken) + rows) > num_tokens
                or (begins and num_prefix_tokens > num_tokens)
            ):
                break
            taken.append(self._window.popleft())
        return taken

    def _family(self) -> int:
        """How many of the next rows share a prefix."""
        first = self._window[0]
        return sum(1 for _ in itertools.takewhile(lambda one: _share_prefix(first, one), self._window))

    def _sort(self) -> None:
        """What has arrived is the next window."""
        num_ready = self._num_ready()
        arrived, self._arrived = self._arrived[:num_ready], self._arrived[num_ready:]
        self._arrived_bytes = sum(sample.num_bytes for sample in self._arrived)
        families: dict[object, list[EncodedSample]] = {}
        for sample in self._batcher.sorted(arrived):  # a family stands where its longest prompt does
            families.setdefault(sample.image_key or id(sample), []).append(sample)
        # Where rows have caps of their own, those with long ones begin first: the last rows to end are short ones.
        for family in sorted(families.values(), key=lambda family: -_size_class(family[0].max_new_tokens or 0)):
            num_shared = self._shared(family) if self._shared else 0
            self._window.extend(Waiting(sample, num_shared) for sample in family)

    def _num_ready(self) -> int:
        """All that has arrived but the last family, of which more may come: divided, its prefix is computed twice."""
        if self._shared is None or self._stream_ended or not self._arrived:
            return len(self._arrived)
        last = self._arrived[-1].image_key
        num_last = sum(1 for _ in itertools.takewhile(lambda one: one.image_key == last, reversed(self._arrived)))
        if last is None or num_last == len(self._arrived):
            return len(self._arrived)
        return len(self._arrived) - num_last

    @property
    def _ready(self) -> bool:
        return bool(getattr(self._samples, "ready", True))


def _share_prefix(one: Waiting, other: Waiting) -> bool:
    return bool(one.num_shared and other.num_shared) and one.sample.image_key == other.sample.image_key


def _size_class(cap: int) -> int:
    """Caps within a factor of 1.4 are much the same."""
    return round(2 * math.log2(cap)) if cap else 0


class SharedPrefix:
    """What prompts about one image begin with: the image and the text around it, as long as they are alike.

    It does not end within an image, nor right after one where positions go on from there by more than one (M-RoPE), and
    all images lie in it. A model with sliding windows is left out, as padding between prefix and rest would shift its
    windows.

    Args:
        image_token_ids: the tokens that stand for images in a prompt.
        ends_after_images: whether it may end right after an image.
    """

    def __init__(self, image_token_ids: frozenset[int], *, ends_after_images: bool) -> None:
        self._image_token_ids = np.array(sorted(image_token_ids), dtype=np.int64)
        self._ends_after_images = ends_after_images

    def __call__(self, family: Sequence[EncodedSample]) -> int:
        """0 where sharing would save little."""
        if len(family) < 2 or family[0].image_key is None or len(self._image_token_ids) == 0:
            return 0
        prompts = [sample.tensors["input_ids"][0] for sample in family]
        first = prompts[0]
        alike = min(len(prompt) for prompt in prompts) - 1  # the last token's logits are each prompt's own
        for prompt in prompts[1:]:
            differs = np.flatnonzero(first[:alike] != prompt[:alike])
            alike = int(differs[0]) if len(differs) else alike
        if alike == min(map(len, prompts)) - 1 and len({prompt.tobytes() for prompt in prompts}) == 1:
            return 0  # one prompt, asked several times: computed once as it is
        is_image = np.isin(first, self._image_token_ids)
        while alike and is_image[alike - 1] and (is_image[alike] or not self._ends_after_images):
            alike -= 1
        if any(np.isin(prompt[alike:], self._image_token_ids).any() for prompt in prompts):
            return 0
        return alike if alike >= max(_LEAST_SHARED, len(first) // 4) else 0


_LEAST_SHARED = 16


def image_token_ids(config: object) -> frozenset[int]:
    """The tokens that stand for images, by the names that configurations give them."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return frozenset(number for number in found if isinstance(number, int))


def has_image_positions(config: Any) -> bool:
    """Whether tokens of an image have places in it for positions (M-RoPE), and what follows starts anew."""
    text = config.get_text_config(decoder=True)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "mrope_section" in scaling or any(
        isinstance(one, dict) and "mrope_section" in one for one in scaling.values()
    )


def has_windows(config: Any) -> bool:
    """Whether layers of the language model look at the last tokens alone."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True)
