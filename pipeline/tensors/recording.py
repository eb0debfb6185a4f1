"""An image processor's recipe, found by running it on images that say where each of their pixels is.

The image processor's own code runs, for every new size of image, with two things replaced: Pillow's resize is written
down and gives a picture made for the purpose, and rescaling and normalising are left out. What then arrives in the
tensors tells where it came from. Once more with rescaling and normalising, and it tells what they make of the levels.

    random bytes     which resizes there are; whether a recipe found for images of another size holds for this one
    places, bytewise where each element of a tensor comes from
    complements      which elements are constants: those that do not turn

Nothing here knows a single image processor. What does not fit is refused, with the reason, and its own output is used.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.tensors.layout import Irregular, Layout, layout_of
from pipeline.tensors.memo import ImageCall
from pipeline.tensors.numbering import (
    Numbers,
    as_bytes,
    mask_layout,
    numbered,
    renumber,
    shown_places,
    with_constants,
)
from pipeline.tensors.recipe import Recipe, Source, Step
from pipeline.tensors.resize import Unmatched, matched
from pipeline.tensors.tracing import Bytes, Painter, Trace, Unrepeatable, random_bytes, traced

log = logging.getLogger(__name__)

_MAX_KNOWN = 4096  # image sizes, and patterns, that are kept: some kilobytes each
_MAX_ELEMENTS = 1 << 26  # of all sources of a row, at several bytes each
_MAX_REFUSALS = 8  # sizes in a row without a single recipe: the image processor is no case for it
_SMALL_BYTES = 4096  # of a tensor without pixels that is shipped as it is
_MAX_VALUE_RUNS = 64
_MEETINGS = 4  # recording took 4 to 5 times as long as an image of SmolVLM's


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What images of several sizes have in common: all of a recipe but their sizes."""

    inputs: tuple[int | Layout, ...]  # of the resizes; images are numbered -1, -2, ...
    raw: Mapping[str, Layout]  # tensors of pixels, with constants as they are before rescaling
    final: Mapping[str, Layout]  # the same after it, and large tensors without pixels
    dtypes: Mapping[str, str]
    shown: tuple[int, ...]  # places of the sources that the tensors show
    shown_sizes: tuple[tuple[int, int], ...]  # their height and width: those of the others do not matter
    levels: Numbers


class Recorder:
    """Recipes of an image processor, by what it is called with.

    Args:
        image_processor: an instance of transformers.
        run: calls it as its class does: (image_processor, images, *positional, **keywords).
        at_once: record a pattern when it is first met. Otherwise some images later: recording takes as long as the
            image processor takes for several, and a dataset may have a new pattern in every row.
    """

    def __init__(self, image_processor: Any, run: Callable[..., Any], *, at_once: bool = False) -> None:
        self._image_processor, self._run, self._at_once = image_processor, run, at_once
        self._known: dict[tuple[Any, ...], tuple[Recipe, Any] | None] = {}
        self._patterns: dict[tuple[Any, ...], list[_Pattern]] = {}
        self._met: Counter[tuple[Any, ...]] = Counter()
        self._levels: dict[Any, Numbers] = {}
        self._num_refused = 0
        self._said: set[str] = set()

    def recipe(self, call: ImageCall) -> tuple[Recipe, Any] | None:
        """The recipe for images of these sizes, and the result that the image processor's caller gets in its place.

        None: there is none, or not yet.
        """
        signature = call.signature
        if signature not in self._known:
            if self._num_refused >= _MAX_REFUSALS and not any(self._patterns.values()):
                return None
            try:
                found = self._found(call)
            except (Unrepeatable, Irregular, Unmatched, MemoryError) as problem:
                self._refuse(problem)
                found = None
            else:
                if found is None:
                    return None  # it may come again
            self._known[signature] = found
        for kept in (self._known, self._patterns, self._met):
            if len(kept) > _MAX_KNOWN:
                kept.pop(next(iter(kept)))  # the oldest
        return self._known.get(signature)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why images were refused."""
        return tuple(sorted(self._said))

    def _refuse(self, problem: BaseException) -> None:
        self._num_refused += 1
        reason = str(problem) or type(problem).__name__
        if reason not in self._said:
            self._said.add(reason)
            log.info("images are shipped as %s makes them: %s", type(self._image_processor).__name__, reason)

    def _found(self, call: ImageCall) -> tuple[Recipe, Any] | None:
        if any(image.mode != "RGB" for image in call.images):
            raise Unrepeatable("images are not RGB")
        trace = traced(self._image_processor, self._run, call, random_bytes)
        inputs = _whole_inputs(call, trace)
        geometry = (
            inputs,
            tuple(sorted((name, tuple(tensor.shape)) for name, tensor in trace.tensors.items())),
            call.arguments,
            call.signature if None in inputs else call.nesting,
        )
        patterns = self._patterns.setdefault(geometry, [])
        for pattern in patterns:
            if pattern.shown_sizes == _sizes(call, trace, pattern.shown):
                recipe = _recipe(call, trace, pattern)
                if _holds(recipe, trace, pattern):
                    return recipe, _stand_in(trace, recipe)
        met = (geometry, _sizes(call, trace, patterns[-1].shown if patterns else ()))
        self._met[met] += 1
        if not self._at_once and self._met[met] < _MEETINGS:
            return None
        pattern = self._pattern(call, trace, inputs)
        recipe = _recipe(call, trace, pattern)
        if not _holds(recipe, trace, pattern):
            raise Unrepeatable("it moves other pixels from one run to the next")
        patterns.append(pattern)
        return recipe, _stand_in(trace, recipe)

    def _pattern(self, call: ImageCall, trace: Trace, inputs: Sequence[int | None]) -> _Pattern:
        sources = _sources(call, trace)
        digits, turned = self._digits(call, sources)
        given: dict[int, Numbers] = {}
        for place, number in enumerate(inputs):
            if number is None:
                pictures = [run.resizes[place].picture for run in digits]
                given[place] = numbered(pictures, turned.resizes[place].picture, f"what is resized ({place + 1})")
        pixels: dict[str, Numbers] = {}
        final: dict[str, Layout] = {}
        dtypes: dict[str, str] = {}
        for name, tensor in turned.tensors.items():
            runs = [run.tensors[name] for run in digits]
            if any(not torch.equal(run, tensor) for run in runs):
                pixels[name] = numbered([as_bytes(run, name) for run in runs], as_bytes(tensor, name), name)
                dtypes[name] = "float32"
            elif tensor.nbytes > _SMALL_BYTES:
                final[name], dtypes[name] = mask_layout(tensor, name), str(tensor.dtype).removeprefix("torch.")
        if any(run.others != turned.others for run in digits) or not pixels:
            raise Unrepeatable("no tensor shows pixels, or something else than tensors hangs on them")
        shown = shown_places(sources, pixels.values())
        moved = _sources(call, trace, shown)
        for numbers in (*given.values(), *pixels.values()):
            renumber(numbers, sources, moved)
        raw = {name: layout_of(numbers, range(256)) for name, numbers in pixels.items()}
        levels = self._final(call, moved, raw, pixels, final)
        return _Pattern(
            inputs=tuple(
                layout_of(given[place], range(256)) if number is None else number for place, number in enumerate(inputs)
            ),
            raw=raw,
            final=final,
            dtypes=dtypes,
            shown=shown,
            shown_sizes=_sizes(call, trace, shown),
            levels=levels,
        )

    def _digits(self, call: ImageCall, sources: Sequence[Source]) -> tuple[list[Trace], Trace]:
        """Runs in which elements say one byte of their place in the buffer; one that says the first one's opposite."""
        num_elements = sum(source.num_elements for source in sources)
        if num_elements > _MAX_ELEMENTS:
            raise Unrepeatable(f"its images have more than {_MAX_ELEMENTS} elements in all")
        num_steps = len(sources) - len(call.images)
        places = [
            np.arange(source.offset, source.offset + source.num_elements, dtype="<u4").view(np.uint8)
            for source in sources
        ]

        def painter(digit: int, turn: int) -> Painter:
            def paint(number: int, height: int, width: int) -> Bytes:
                place = _place(number, num_steps)
                if sources[place].shape != (height, width, 3):
                    raise Unrepeatable("what it resizes hangs on the pixels")
                picture = places[place][digit::4].reshape(height, width, 3)
                return picture ^ np.uint8(turn) if turn else picture

            return paint

        runs = [
            traced(self._image_processor, self._run, call, painter(digit, 0))
            for digit in range(max(1, (num_elements - 1).bit_length() + 7 >> 3))
        ]
        return runs, traced(self._image_processor, self._run, call, painter(0, 255))

    def _final(
        self,
        call: ImageCall,
        sources: Sequence[Source],
        raw: Mapping[str, Layout],
        pixels: Mapping[str, Numbers],
        final: dict[str, Layout],
    ) -> Numbers:
        """What levels and constants become: fills `final`, and returns the levels [3, 256]."""
        num_steps = len(sources) - len(call.images)
        known = self._levels.get(call.arguments)
        table = np.full(3 * 256, np.nan, dtype=np.float32) if known is None else known.ravel().copy()
        constant = {name: numbers < 0 for name, numbers in pixels.items()}
        for seed in range(1, _MAX_VALUE_RUNS):

            def paint(number: int, height: int, width: int, seed: int = seed) -> Bytes:
                return random_bytes(number, height, width, seed)

            run = traced(self._image_processor, self._run, call, paint, scaled=True)
            entries = _buffer(sources, num_steps, paint).astype(np.int16)
            entries.reshape(-1, 3)[:] += np.arange(0, 768, 256, dtype=np.int16)
            for name, layout in raw.items():
                value = run.tensors[name].numpy()
                if value.dtype != np.float32 or value.shape != layout.shape:
                    raise Unrepeatable(f"{name} is {value.dtype}, expected float32")
                entry = layout.filled(torch.empty(layout.shape, dtype=torch.int16), torch.from_numpy(entries)).numpy()
                if name not in final:
                    final[name] = with_constants(layout, pixels[name], constant[name], value, name)
                if constant[name].any():
                    entry, value = entry[~constant[name]], value[~constant[name]]
                if np.isnan(table).any():
                    found = table.copy()
                    found[entry] = value
                    table = np.where(np.isnan(table), found, table)
                if not np.array_equal(table[entry].view(np.int32), value.view(np.int32)):
                    raise Unrepeatable(f"equal levels become different values in {name}")
            if not np.isnan(table).any():
                break
        else:
            raise Unrepeatable("not every level of the images is found in its tensors")
        self._levels[call.arguments] = table.reshape(3, 256)
        return self._levels[call.arguments]


# From runs to layouts ------------------------------------------------------------------------------------------------


def _sources(call: ImageCall, trace: Trace, first: Sequence[int] = ()) -> tuple[Source, ...]:
    """Where what the resizes make, and then the images, lie in the buffer; those in `first` before all others."""
    sizes = _sizes(call, trace, range(len(trace.resizes) + len(call.images)))
    offsets, offset = [0] * len(sizes), 0
    for place in (*first, *(place for place in range(len(sizes)) if place not in first)):
        offsets[place] = offset
        height, width = sizes[place]
        offset += height * width * 3
    return tuple(Source(offset, *size) for offset, size in zip(offsets, sizes, strict=True))


def _sizes(call: ImageCall, trace: Trace, places: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Height and width of sources."""
    sizes = [(resize.height, resize.width) for resize in trace.resizes]
    sizes += [(image.height, image.width) for image in call.images]
    return tuple(sizes[place] for place in places)


def _buffer(sources: Sequence[Source], num_steps: int, paint: Painter) -> Bytes:
    """Flat: what `paint` makes of each source, in its place."""
    buffer = np.empty(sum(source.num_elements for source in sources), dtype=np.uint8)
    for place, source in enumerate(sources):
        picture = paint(_number(place, num_steps), source.height, source.width)
        buffer[source.offset : source.offset + source.num_elements] = picture.ravel()
    return buffer


def _place(number: int, num_steps: int) -> int:
    """Of a source among all: images come after what the resizes make."""
    return number if number >= 0 else num_steps - 1 - number


def _number(place: int, num_steps: int) -> int:
    """The opposite of `_place`."""
    return place if place < num_steps else num_steps - 1 - place


def _whole_inputs(call: ImageCall, trace: Trace) -> tuple[int | None, ...]:
    """Of each resize the source that it was given whole, None where there is no such source."""
    candidates = {-1 - number: (image.height, image.width) for number, image in enumerate(call.images)}
    found: list[int | None] = []
    for place, resize in enumerate(trace.resizes):
        shape = resize.picture.shape[:2]
        found.append(
            next(
                (
                    number
                    for number, size in candidates.items()
                    if size == shape and np.array_equal(random_bytes(number, *shape), resize.picture)
                ),
                None,
            )
        )
        candidates[place] = (resize.height, resize.width)
    return tuple(found)


# From layouts to a recipe --------------------------------------------------------------------------------------------


def _recipe(call: ImageCall, trace: Trace, pattern: _Pattern) -> Recipe:
    sources = _sources(call, trace, pattern.shown)
    num_steps = len(trace.resizes)
    steps = []
    for place, (given, resize) in enumerate(zip(pattern.inputs, trace.resizes, strict=True)):
        height, width = resize.picture.shape[:2]
        steps.append(
            Step(
                _place(given, num_steps) if isinstance(given, int) else given,
                matched(width, height, resize.width, resize.height, resize.filter),
                place,
            )
        )
    return Recipe(
        sources=sources,
        given=tuple(range(num_steps, len(sources))),
        steps=tuple(steps),
        layouts=pattern.final,
        dtypes=pattern.dtypes,
        shown=pattern.shown,
        levels=pattern.levels,
    )


def _holds(recipe: Recipe, trace: Trace, pattern: _Pattern) -> bool:
    """Whether the pattern, perhaps found for images of other sizes, says what the run on random bytes shows."""
    num_steps = len(recipe.steps)
    buffer = torch.from_numpy(_buffer(recipe.sources, num_steps, random_bytes))
    for step, resize in zip(recipe.steps, trace.resizes, strict=True):
        if isinstance(step.input, Layout):
            shown = step.input.filled(torch.empty(step.input.shape, dtype=torch.uint8), buffer)
            if not np.array_equal(shown.numpy(), resize.picture):
                return False
    for name, tensor in trace.tensors.items():
        if name in pattern.raw:
            found = torch.from_numpy(as_bytes(tensor, name))
            expected = pattern.raw[name].filled(torch.empty(tensor.shape, dtype=torch.uint8), buffer)
        elif name in pattern.final:
            found = tensor
            expected = pattern.final[name].filled(torch.empty(tensor.shape, dtype=tensor.dtype))
        else:
            continue
        if not torch.equal(found, expected):
            return False
    return True


def _stand_in(trace: Trace, recipe: Recipe) -> Any:
    """The result with tensors that take no memory in place of those that the recipe makes."""
    result = trace.result
    for name, layout in recipe.layouts.items():
        result[name] = placeholder(layout.shape, getattr(torch, recipe.dtypes[name]))
    return result


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose entries along the first two dimensions have numbers of their own: a copy can be recognised."""
    leading = tuple(shape[:2])
    numbers = torch.arange(int(np.prod(leading)), dtype=torch.int64).remainder(251).to(dtype)
    return numbers.view(*leading, *(1 for _ in shape[2:])).expand(*shape)
