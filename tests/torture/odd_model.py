"""The fake model with odd habits: it answers with its prompt, and its decoder fails where the name of a file says how.

    PYTHONPATH=tests/torture python -c "import odd_model; odd_model.start()" run dataset=images dataset.path=...

FAILURES has the first words of such names: `loop-3.png`. Where a prompt has LONE or NUL, the answer has in its place
what a prompt cannot have, because it is cleaned of it.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import fake_model
from fake_model import FakeEngine
from PIL import Image

from pipeline import preparation, run
from pipeline.__main__ import main
from pipeline.preparation import Preparation, PreparationOptions
from pipeline.prompt.image import OpenedImage, decode_image
from pipeline.records import Answer, EncodedSample, ImageRef

LONE, NUL = "<a lone surrogate>", "<NUL>"


def loop() -> None:
    """As a decoder that is caught in a circle of offsets."""
    while True:
        pass


def wait() -> None:
    """As a read from a file system that does not answer."""
    time.sleep(3600)


def hold() -> None:
    """As one that computes in C and lets no other thread of Python run, so that no signal is heeded either."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def crash() -> None:
    """As one that writes where it must not."""
    ctypes.string_at(0)


def eat() -> None:
    """As one that believes a size in the file."""
    bytes(1 << 40)


def fill() -> None:
    """As one that grows until it is stopped."""
    held = []
    while True:
        held.append(bytearray(16 << 20))


FAILURES = {"loop": loop, "wait": wait, "hold": hold, "crash": crash, "eat": eat, "fill": fill}


def failing_decode(ref: ImageRef, data: bytes, *, max_image_pixels: int) -> OpenedImage:
    failure = FAILURES.get(Path(ref.path or "").name.partition("-")[0])
    if failure is not None:
        failure()
    return decode_image(ref, data, max_image_pixels=max_image_pixels)


def echo(images: Sequence[Image.Image], prompt: str) -> str:
    return prompt


def odd_preparation(options: PreparationOptions) -> Preparation:
    """Built in a worker process."""
    preparation.decode_image = failing_decode  # type: ignore[attr-defined]
    fake_model.right_answer = echo
    return fake_model.fake_preparation(options)


class OddEngine(FakeEngine):
    """Says what its input cannot hold."""

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        for answer in super().answers(samples):
            said = (answer.response or "").replace(LONE, "\ud800").replace(NUL, "\0")
            yield replace(answer, response=said)


def start() -> None:
    """What `python -m pipeline` does, with the odd model."""
    fake_model.install()
    run.workers = partial(fake_model.fake_workers, prepare=odd_preparation)  # type: ignore[assignment, attr-defined]
    run.build_engine = lambda config, identity, batcher, stop, settle: OddEngine(stop)  # type: ignore[assignment, attr-defined, return-value]
    sys.exit(main())
