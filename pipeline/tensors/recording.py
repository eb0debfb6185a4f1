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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from pipeline.tensors.layout import Constant, Irregular, Layout, layout_of
from pipeline.tensors.memo import ImageCall
from pipeline.tensors.recipe import Recipe, Source, Step
from pipeline.tensors.resize import Unmatched, matched

log = logging.getLogger(__name__)

Bytes = np.ndarray[Any, Any]
Numbers = np.ndarray[Any, Any]
# (number of the source, its height and width) -> picture [height, width, 3] uint8. Images are numbered -1, -2, ...
Painter = Callable[[int, int, int], Bytes]

_MAX_KNOWN = 4096  # image sizes whose recipe is kept: some kilobytes each
_MAX_ELEMENTS = 1 << 26  # of all sources of a row, at several bytes each
_MAX_CONSTANTS = 64
_MAX_REFUSALS = 8  # sizes in a row without a single recipe: the image processor is no case for it
_SMALL_BYTES = 4096  # of a tensor without pixels that is shipped as it is
_MAX_VALUE_RUNS = 64
_MEETINGS = 4  # recording took 4 to 5 times as long as an image of SmolVLM's
_POOL = 1 << 24


class Unrepeatable(Exception):
    """The image processor does something else with pixels than resizing, scaling and moving them."""


@dataclass(frozen=True, slots=True)
class _Resized:
    picture: Bytes  # [height, width, 3]: what it was given
    width: int
    height: int
    filter: int


@dataclass(frozen=True, slots=True)
class _Trace:
    """One run of the image processor on painted images."""

    resizes: tuple[_Resized, ...]
    result: Any  # BatchFeature

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.result.items() if isinstance(value, torch.Tensor)}

    @property
    def others(self) -> dict[str, Any]:
        return {name: value for name, value in self.result.items() if not isinstance(value, torch.Tensor)}


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
            if self._num_refused >= _MAX_REFUSALS and not self._patterns:
                return None
            try:
                found = self._found(call)
            except (Unrepeatable, Irregular, Unmatched, MemoryError) as problem:
                self._refuse(problem)
                found = None
            else:
                if found is None:
                    return None  # it may come again
            if len(self._known) >= _MAX_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[signature] = found
        return self._known[signature]

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
        trace = self._trace(call, _random)
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

    def _pattern(self, call: ImageCall, trace: _Trace, inputs: Sequence[int | None]) -> _Pattern:
        sources = _sources(call, trace)
        digits, turned = self._digits(call, sources)
        given: dict[int, Numbers] = {}
        for place, number in enumerate(inputs):
            if number is None:
                pictures = [run.resizes[place].picture for run in digits]
                given[place] = _numbers(pictures, turned.resizes[place].picture, f"what is resized ({place + 1})")
        pixels: dict[str, Numbers] = {}
        final: dict[str, Layout] = {}
        dtypes: dict[str, str] = {}
        for name, tensor in turned.tensors.items():
            runs = [run.tensors[name] for run in digits]
            if any(not torch.equal(run, tensor) for run in runs):
                pixels[name] = _numbers([_bytes(run, name) for run in runs], _bytes(tensor, name), name)
                dtypes[name] = "float32"
            elif tensor.nbytes > _SMALL_BYTES:
                final[name], dtypes[name] = _without_pixels(tensor, name), str(tensor.dtype).removeprefix("torch.")
        if any(run.others != turned.others for run in digits) or not pixels:
            raise Unrepeatable("no tensor shows pixels, or something else than tensors hangs on them")
        shown = _shown(sources, pixels.values())
        moved = _sources(call, trace, shown)
        for numbers in (*given.values(), *pixels.values()):
            _move(numbers, sources, moved)
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

    def _digits(self, call: ImageCall, sources: Sequence[Source]) -> tuple[list[_Trace], _Trace]:
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
            self._trace(call, painter(digit, 0)) for digit in range(max(1, (num_elements - 1).bit_length() + 7 >> 3))
        ]
        return runs, self._trace(call, painter(0, 255))

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
                return _random(number, height, width, seed)

            run = self._trace(call, paint, scaled=True)
            entries = _buffer(sources, num_steps, paint).astype(np.int16)
            entries.reshape(-1, 3)[:] += np.arange(0, 768, 256, dtype=np.int16)
            for name, layout in raw.items():
                value = run.tensors[name].numpy()
                if value.dtype != np.float32 or value.shape != layout.shape:
                    raise Unrepeatable(f"{name} is {value.dtype}, expected float32")
                entry = layout.filled(torch.empty(layout.shape, dtype=torch.int16), torch.from_numpy(entries)).numpy()
                if name not in final:
                    final[name] = _with_constants(layout, pixels[name], constant[name], value, name)
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

    def _trace(self, call: ImageCall, paint: Painter, *, scaled: bool = False) -> _Trace:
        """One run, on images that `paint` makes."""
        images = [
            Image.fromarray(np.ascontiguousarray(paint(-1 - number, image.height, image.width)))
            for number, image in enumerate(call.images)
        ]
        resizes: list[_Resized] = []
        with ExitStack() as stack:
            stack.enter_context(_recorded(resizes, paint))
            if not scaled:
                stack.enter_context(_unscaled(self._image_processor))
            try:
                nested = _nested(call.nesting, images)
                result = self._run(self._image_processor, nested, *call.positional, **call.keywords)
            except (Unrepeatable, MemoryError):
                raise
            except Exception as problem:  # its code was never meant to run this way
                raise Unrepeatable(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}") from problem
        if not isinstance(getattr(result, "data", None), dict):
            raise Unrepeatable("its result is no BatchFeature")
        return _Trace(tuple(resizes), result)


# Runs ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _recorded(resizes: list[_Resized], paint: Painter) -> Iterator[None]:
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
        resizes.append(_Resized(np.asarray(self), width, height, int(filter)))
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


def _random(number: int, height: int, width: int, seed: int = 0) -> Bytes:
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


# From runs to layouts ------------------------------------------------------------------------------------------------


def _sources(call: ImageCall, trace: _Trace, first: Sequence[int] = ()) -> tuple[Source, ...]:
    """Where what the resizes make, and then the images, lie in the buffer; those in `first` before all others."""
    sizes = _sizes(call, trace, range(len(trace.resizes) + len(call.images)))
    offsets, offset = [0] * len(sizes), 0
    for place in (*first, *(place for place in range(len(sizes)) if place not in first)):
        offsets[place] = offset
        height, width = sizes[place]
        offset += height * width * 3
    return tuple(Source(offset, *size) for offset, size in zip(offsets, sizes, strict=True))


def _sizes(call: ImageCall, trace: _Trace, places: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Height and width of sources."""
    sizes = [(resize.height, resize.width) for resize in trace.resizes]
    sizes += [(image.height, image.width) for image in call.images]
    return tuple(sizes[place] for place in places)


def _shown(sources: Sequence[Source], pixels: Iterable[Numbers]) -> tuple[int, ...]:
    """Places of the sources that tensors show."""
    num_elements = sum(source.num_elements for source in sources)
    found: set[int] = set()
    for numbers in pixels:
        used = np.zeros(num_elements + 256, dtype=bool)  # at whose end constants are
        used[numbers] = True
        found |= {place for place, source in enumerate(sources) if used[source.offset :][: source.num_elements].any()}
    return tuple(sorted(found))


def _move(numbers: Numbers, before: Sequence[Source], after: Sequence[Source]) -> None:
    """Numbers of a buffer with another order of the same sources."""
    moves = [(source.offset, other.offset - source.offset) for source, other in zip(before, after, strict=True)]
    if any(move for _, move in moves):
        starts = np.array([start for start, _ in moves])
        shifts = np.array([move for _, move in moves], dtype=numbers.dtype)
        pixel = numbers >= 0
        places = numbers[pixel]
        numbers[pixel] = places + shifts[np.searchsorted(starts, places, side="right") - 1]


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


def _whole_inputs(call: ImageCall, trace: _Trace) -> tuple[int | None, ...]:
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
                    if size == shape and np.array_equal(_random(number, *shape), resize.picture)
                ),
                None,
            )
        )
        candidates[place] = (resize.height, resize.width)
    return tuple(found)


def _bytes(tensor: torch.Tensor, name: str) -> Bytes:
    """A tensor of whole numbers from 0 to 255, as such."""
    values = tensor.numpy()
    if values.dtype == np.uint8:
        return values
    with np.errstate(invalid="ignore"):
        found = values.astype(np.uint8)
    if not np.array_equal(found, values):
        raise Unrepeatable(f"{name} has other values than its pixels: it computes with them in a way of its own")
    return found


def _numbers(digits: Sequence[Bytes], turned: Bytes, name: str) -> Numbers:
    """Of each element its place in the buffer, or -1 - c where it is the constant c, 0 to 255, in these runs."""
    constant = digits[0] == turned
    if not np.array_equal(digits[0] ^ turned, np.where(constant, np.uint8(0), np.uint8(255))):
        raise Unrepeatable(f"{name} mixes pixels")
    numbers = np.zeros(turned.shape, dtype=np.int32)
    for place, digit in enumerate(digits):
        numbers |= digit.astype(np.int32) << np.int32(8 * place)
    values = turned[constant]
    if any(not np.array_equal(digit[constant], values) for digit in digits):
        raise Unrepeatable(f"{name} mixes pixels")
    numbers[constant] = -1 - values.astype(np.int32)
    return numbers


def _without_pixels(tensor: torch.Tensor, name: str) -> Layout:
    """A mask: few values, in rectangles."""
    low, high = tensor.min().item(), tensor.max().item()
    if low == high:
        return Layout(tuple(tensor.shape), Constant(low))
    values = np.unique(tensor.numpy())
    if len(values) > _MAX_CONSTANTS:
        raise Unrepeatable(f"{name} has more than {_MAX_CONSTANTS} values")
    numbers = -1 - np.searchsorted(values, tensor.numpy()).astype(np.int32)
    return layout_of(numbers, values.tolist())


def _with_constants(layout: Layout, numbers: Numbers, constant: Numbers, value: Numbers, name: str) -> Layout:
    """The layout with constants as they are in the tensor `value`."""
    if not constant.any():
        return layout
    values, which = np.unique(value[constant], return_inverse=True)
    if len(values) > _MAX_CONSTANTS:
        raise Unrepeatable(f"{name} has more than {_MAX_CONSTANTS} values beside its pixels")
    numbers = numbers.copy()
    numbers[constant] = -1 - which.astype(np.int32)
    return layout_of(numbers, values.tolist())


# From layouts to a recipe --------------------------------------------------------------------------------------------


def _recipe(call: ImageCall, trace: _Trace, pattern: _Pattern) -> Recipe:
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


def _holds(recipe: Recipe, trace: _Trace, pattern: _Pattern) -> bool:
    """Whether the pattern, perhaps found for images of other sizes, says what the run on random bytes shows."""
    num_steps = len(recipe.steps)
    buffer = torch.from_numpy(_buffer(recipe.sources, num_steps, _random))
    for step, resize in zip(recipe.steps, trace.resizes, strict=True):
        if isinstance(step.input, Layout):
            shown = step.input.filled(torch.empty(step.input.shape, dtype=torch.uint8), buffer)
            if not np.array_equal(shown.numpy(), resize.picture):
                return False
    for name, tensor in trace.tensors.items():
        if name in pattern.raw:
            found = torch.from_numpy(_bytes(tensor, name))
            expected = pattern.raw[name].filled(torch.empty(tensor.shape, dtype=torch.uint8), buffer)
        elif name in pattern.final:
            found = tensor
            expected = pattern.final[name].filled(torch.empty(tensor.shape, dtype=tensor.dtype))
        else:
            continue
        if not torch.equal(found, expected):
            return False
    return True


def _stand_in(trace: _Trace, recipe: Recipe) -> Any:
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
