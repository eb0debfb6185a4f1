"""Elements of tensors as numbers: each its place in a flat buffer, or the constant that it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.tensors.layout import Constant, Layout, layout_of
from pipeline.tensors.recipe import Source
from pipeline.tensors.tracing import Bytes, Unrepeatable

Numbers = np.ndarray[Any, Any]

_MAX_CONSTANTS = 64


def as_bytes(tensor: torch.Tensor, name: str) -> Bytes:
    """A tensor of whole numbers from 0 to 255, as such."""
    values = tensor.numpy()
    if values.dtype == np.uint8:
        return values
    with np.errstate(invalid="ignore"):
        found = values.astype(np.uint8)
    if not np.array_equal(found, values):
        raise Unrepeatable(f"{name} has other values than its pixels: it computes with them in a way of its own")
    return found


def numbered(digits: Sequence[Bytes], turned: Bytes, name: str) -> Numbers:
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


def mask_layout(tensor: torch.Tensor, name: str) -> Layout:
    """A mask: few values, in rectangles."""
    low, high = tensor.min().item(), tensor.max().item()
    if low == high:
        return Layout(tuple(tensor.shape), Constant(low))
    values = np.unique(tensor.numpy())
    if len(values) > _MAX_CONSTANTS:
        raise Unrepeatable(f"{name} has more than {_MAX_CONSTANTS} values")
    numbers = -1 - np.searchsorted(values, tensor.numpy()).astype(np.int32)
    return layout_of(numbers, values.tolist())


def with_constants(layout: Layout, numbers: Numbers, constant: Numbers, value: Numbers, name: str) -> Layout:
    """The layout with constants as they are in the tensor `value`."""
    if not constant.any():
        return layout
    values, which = np.unique(value[constant], return_inverse=True)
    if len(values) > _MAX_CONSTANTS:
        raise Unrepeatable(f"{name} has more than {_MAX_CONSTANTS} values beside its pixels")
    numbers = numbers.copy()
    numbers[constant] = -1 - which.astype(np.int32)
    return layout_of(numbers, values.tolist())


def shown_places(sources: Sequence[Source], pixels: Iterable[Numbers]) -> tuple[int, ...]:
    """Places of the sources that tensors show."""
    num_elements = sum(source.num_elements for source in sources)
    found: set[int] = set()
    for numbers in pixels:
        used = np.zeros(num_elements + 256, dtype=bool)  # at whose end constants are
        used[numbers] = True
        found |= {place for place, source in enumerate(sources) if used[source.offset :][: source.num_elements].any()}
    return tuple(sorted(found))


def renumber(numbers: Numbers, before: Sequence[Source], after: Sequence[Source]) -> None:
    """Numbers of a buffer with another order of the same sources."""
    moves = [(source.offset, other.offset - source.offset) for source, other in zip(before, after, strict=True)]
    if any(move for _, move in moves):
        starts = np.array([start for start, _ in moves])
        shifts = np.array([move for _, move in moves], dtype=numbers.dtype)
        pixel = numbers >= 0
        places = numbers[pixel]
        numbers[pixel] = places + shifts[np.searchsorted(starts, places, side="right") - 1]
