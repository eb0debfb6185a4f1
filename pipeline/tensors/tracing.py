"""Runs of an image processor on painted images.

Pillow's resize writes itself down, and gives a picture painted for the purpose; rescaling and normalising can be left
out. Everything else is the image processor's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from pipeline.tensors.memo import ImageCall

Bytes = np.ndarray[Any, Any]
# (number of the source, its height and width) -> picture [height, width, 3] uint8. What the resizes make is numbered
# from 0, in their order; images are numbered -1, -2, ...
Painter = Callable[[int, int, int], Bytes]

_POOL = 1 << 24


class Unrepeatable(Exception):
    """The image processor does something else with pixels than resizing, scaling and moving them."""


@dataclass(frozen=True, slots=True)
class Resized:
    picture: Bytes  # [height, width, 3]: what it was given
    width: int
    height: int
    filter: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One run of the image processor on painted images."""

    resizes: tuple[Resized, ...]
    result: Any  # BatchFeature

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.result.items() if isinstance(value, torch.Tensor)}

    @property
    def others(self) -> dict[str, Any]:
        return {name: value for name, value in self.result.items() if not isinstance(value, torch.Tensor)}


def traced(
    image_processor: Any, run: Callable[..., Any], call: ImageCall, paint: Painter, *, scaled: bool = False
) -> Trace:
    """One run, on images and resized images that `paint` makes.

    Args:
        image_processor: an instance of transformers.
        run: calls it as its class does: (image_processor, images, *positional, **keywords).
        call: what it is called with, of which the images give their sizes alone.
        scaled: rescale and normalise as usual.

    Raises:
        Unrepeatable: it does what cannot be written down.
    """
    images = [
        Image.fromarray(np.ascontiguousarray(paint(-1 - number, image.height, image.width)))
        for number, image in enumerate(call.images)
    ]
    resizes: list[Resized] = []
    with ExitStack() as stack:
        stack.enter_context(_recorded(resizes, paint))
        if not scaled:
            stack.enter_context(_unscaled(image_processor))
        try:
            nested = _nested(call.nesting, images)
            result = run(image_processor, nested, *call.positional, **call.keywords)
        except (Unrepeatable, MemoryError):
            raise
        except Exception as problem:  # its code was never meant to run this way
            raise Unrepeatable(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}") from problem
    if not isinstance(getattr(result, "data", None), dict):
        raise Unrepeatable("its result is no BatchFeature")
    return Trace(tuple(resizes), result)


@contextmanager
def _recorded(resizes: list[Resized], paint: Painter) -> Iterator[None]:
    """Pillow's resize writes itself down, and gives what is painted for it. For one thread."""
    own = Image.Image.resize

    def resize(
        self: Image.Image, size: Any, resample: Any = None, box: Any = None, reducing_gap: float | None = None
    ) -> Image.Image:
        width, height = (int(extent) for extent in size)
        if box is not None and tuple(box) != (0, 0, *self.size):
            raise Unrepeatable("it resizes a part of an image")
        if self.size == (width, height) or resample == Image.Resampling.NEAREST:
            return own(self, size, resample)  # moves pixels
        if self.mode != "RGB" or reducing_gap is not None:
            raise Unrepeatable(f"it resizes {self.mode} images, or in two steps")
        filter = Image.Resampling.BICUBIC if resample is None else Image.Resampling(resample)
        resizes.append(Resized(np.asarray(self), width, height, int(filter)))
        return Image.fromarray(np.ascontiguousarray(paint(len(resizes) - 1, height, width)))

    with mock.patch.object(Image.Image, "resize", resize):
        yield


@contextmanager
def _unscaled(image_processor: Any) -> Iterator[None]:
    """Rescaling and normalising give back what they get."""
    own = vars(image_processor)
    names = [name for name in ("rescale", "normalize") if hasattr(image_processor, name)]
    with mock.patch.dict(own, dict.fromkeys(names, lambda image, *_, **__: image)):
        yield


def random_bytes(number: int, height: int, width: int, seed: int = 0) -> Bytes:
    """Bytes that differ from source to source, cut from a store: making them would take longer than the run."""
    pool = _pool()
    num_elements = height * width * 3
    start = ((number * 2 + 1) * 104_729 + seed * 15_485_863) % (len(pool) // 2)
    if num_elements > len(pool) - start:
        return np.resize(pool[start:], num_elements).reshape(height, width, 3)
    return pool[start : start + num_elements].reshape(height, width, 3)


_pools: list[Bytes] = []


def _pool() -> Bytes:
    if not _pools:
        _pools.append(np.random.default_rng(0).integers(0, 256, _POOL, dtype=np.uint8))
    return _pools[0]


def _nested(nesting: Any, images: Sequence[Image.Image]) -> Any:
    if isinstance(nesting, int):
        return images[nesting]
    return [_nested(part, images) for part in nesting]
