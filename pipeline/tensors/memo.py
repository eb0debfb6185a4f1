"""The image half of a processor, run once for all prompts about the same images.

A processor calls its image processor as `self.image_processor(images, ...)`. The image processor's instance gets a
subclass of its own class whose call remembers the last result, so that nothing is known of the processor around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.records import CompactImages
    from pipeline.tensors.recipe import Recipe

Pixels = np.ndarray[Any, Any]
# What stands for the image processor's result, and how that is made; None where the image processor has to be called.
Substitute = Callable[["ImageCall"], "tuple[Mapping[str, Any], Recipe] | None"]


@dataclass(slots=True)
class ImageCall:
    """One call of an image processor: what it was given, and what it gave."""

    images: tuple[Image.Image, ...]
    nesting: Any  # the images' numbers, nested in tuples as the images were in lists
    arguments: tuple[Any, ...]  # all others, in a form that can be compared
    keywords: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[Any, ...] = ()
    result: Any = None
    recipe: Recipe | None = None  # set where the result is a stand-in for what the recipe makes of the pixels
    compact: CompactImages | None = None
    _arrays: dict[int, tuple[Any, Pixels]] = field(default_factory=dict)
    _pixels: tuple[Pixels, ...] | None = None
    _key: str | None = None

    @property
    def signature(self) -> tuple[Any, ...]:
        """All but the pixels: equal signatures give tensors of equal shapes."""
        return (self.nesting, tuple((*image.size, image.mode) for image in self.images), self.arguments)

    @property
    def pixels(self) -> tuple[Pixels, ...]:
        """The images as arrays [height, width, channels], always the same objects."""
        if self._pixels is None:
            self._pixels = tuple(np.asarray(image) for image in self.images)
        return self._pixels

    @property
    def key(self) -> str:
        """Digest of everything that the image processor was given. Equal keys: equal results."""
        if self._key is None:
            digest = hashlib.sha256(repr(self.signature).encode())  # three times as fast as BLAKE2
            for array in self.pixels:
                digest.update(np.ascontiguousarray(array).data)
            self._key = digest.hexdigest()[:32]
        return self._key

    def same_as(self, other: ImageCall) -> bool:
        """Whether the images are the same objects, or hold the same pixels: Idefics2's processor copies them."""
        return self.signature == other.signature and (
            all(one is another for one, another in zip(self.images, other.images, strict=True))
            or all(map(np.array_equal, self.pixels, other.pixels))
        )

    def made(self, name: str, tensor: Any) -> Any | None:
        """The tensor of the result that a processor handed on under this name, as it is or copied."""
        own = self.result.get(name) if isinstance(self.result, Mapping) else None
        if own is tensor or (
            own is not None
            and hasattr(own, "dtype")
            and (own.shape, own.dtype) == (tensor.shape, tensor.dtype)
            and bool((own == tensor).all())
        ):
            return own
        return None

    def array(self, tensor: Any) -> Pixels:
        """A tensor of the result as an array; each time the same object, which pickle then writes once."""
        if id(tensor) not in self._arrays:
            self._arrays[id(tensor)] = (tensor, tensor.numpy())
        return self._arrays[id(tensor)][1]


class ImageMemo:
    """Remembers an image processor's last call.

    `last` is that call, None where there was none, or none that can be remembered; `used` is set by every call, so that
    a caller who cleared it knows whether there was one. `substitute` may answer in the image processor's place.
    """

    def __init__(self, processor: Any) -> None:
        self.last: ImageCall | None = None
        self.used = False
        self.substitute: Substitute | None = None
        self.run: Callable[..., Any] | None = None  # the image processor's call as its class has it; None = not watched
        self.image_processor = getattr(processor, "image_processor", None)
        if callable(self.image_processor):
            self._watch(self.image_processor)

    def forget(self) -> None:
        """Let go of the last call."""
        self.last = None

    def _watch(self, image_processor: Any) -> None:
        own = getattr(type(image_processor), "_watched_class", type(image_processor))

        def __call__(_: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            return self._answer(images, args, kwargs)

        named = {"__call__": __call__, "_watched_class": own, "__module__": own.__module__, "__doc__": own.__doc__}
        try:
            image_processor.__class__ = type(own.__name__, (own,), named)
        except TypeError:  # a class in C, or with slots
            return
        self.run = own.__call__

    def _answer(self, images: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.run is not None
        try:
            found: list[Image.Image] = []
            nesting = _nesting(images, found)
            call = ImageCall(tuple(found), nesting, _frozen([args, kwargs]), kwargs, args)
        except _Unknown:
            self.last = None
            return self.run(self.image_processor, images, *args, **kwargs)
        self.used = True
        if self.last is None or not self.last.same_as(call):
            self.last = None  # the row before may go, before memory is needed for this one
            found_substitute = self.substitute(call) if self.substitute else None
            if found_substitute is not None:
                call.result, call.recipe = found_substitute
            else:
                call.result = self.run(self.image_processor, images, *args, **kwargs)
            self.last = call
        return _fresh(self.last.result)


class _Unknown(Exception):
    """An argument that cannot be compared: a tensor, an array."""


def digest_of(tensors: Mapping[str, Pixels]) -> str:
    """Digest of arrays: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _nesting(images: Any, found: list[Image.Image]) -> Any:
    from PIL import Image

    if isinstance(images, Image.Image):
        found.append(images)
        return len(found) - 1
    if isinstance(images, (list, tuple)):
        return tuple(_nesting(image, found) for image in images)
    raise _Unknown


def _frozen(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, Enum)):
        return value
    if isinstance(value, Mapping):
        return tuple((name, _frozen(entry)) for name, entry in sorted(value.items(), key=lambda pair: str(pair[0])))
    if isinstance(value, Sequence):
        return tuple(_frozen(entry) for entry in value)
    fields = getattr(value, "__dict__", None) if hasattr(value, "__dataclass_fields__") else None
    if fields is not None:  # transformers' SizeDict
        return (type(value).__name__, _frozen(fields))
    raise _Unknown


def _fresh(value: Any) -> Any:
    """The result with containers of its own: processors take entries out, and write into lists."""
    if isinstance(value, list):
        return [_fresh(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _fresh(entry) for name, entry in value.items()}
    if hasattr(value, "data") and isinstance(value.data, dict):  # transformers' BatchFeature
        import copy

        fresh = copy.copy(value)
        fresh.data = _fresh(value.data)
        return fresh
    return value
