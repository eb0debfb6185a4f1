"""Where each element of a tensor lies in a flat buffer, as few strided views.

What a processor does with pixels after resizing only moves them: it crops, pads, cuts into tiles or patches, stacks.
Given the tensor's elements as numbers (of the buffer, or of a constant), `layout_of` finds the views, and `filled`
copies them, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

Numbers = np.ndarray[Any, Any]

_MAX_PARTS = 2048  # views of a tensor: each is a copy of its own on the device


class Irregular(Exception):
    """A tensor is no small number of strided views."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value everywhere."""

    value: float


@dataclass(frozen=True, slots=True)
class View:
    """Elements of the buffer at an offset, with one stride for each dimension."""

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Parts one after the other along a dimension."""

    dim: int
    lengths: tuple[int, ...]
    parts: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """A dimension as two, the inner one `length` long."""

    dim: int
    length: int
    part: Tree


Tree = Constant | View | Split | Factor


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor, as what it is made of."""

    shape: tuple[int, ...]
    tree: Tree

    def filled(self, out: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """`out`, contiguous and of this shape, with the elements of a flat buffer and the constants."""
        _fill(self.tree, out, buffer)
        return out


def layout_of(numbers: Numbers, constants: Sequence[float]) -> Layout:
    """The layout of a tensor.

    Args:
        numbers: integers of the tensor's shape: places in the buffer, or -1 - n for the n-th constant.

    Raises:
        Irregular: it takes too many views.
    """
    finder = _Finder(constants, int(numbers.max(initial=0)) + 1, numbers.dtype)
    return Layout(numbers.shape, finder.tree(numbers))


def _fill(tree: Tree, out: torch.Tensor, buffer: torch.Tensor | None) -> None:
    match tree:
        case Constant(value):
            out.fill_(value)
        case View(offset, strides):
            assert buffer is not None
            out.copy_(buffer.as_strided(out.shape, strides, offset))
        case Split(dim, lengths, parts):
            for piece, part in zip(torch.split(out, list(lengths), dim), parts, strict=True):
                _fill(part, piece, buffer)
        case Factor(dim, length, part):
            _fill(part, torch.unflatten(out, dim, (-1, length)), buffer)


class _Finder:
    def __init__(self, constants: Sequence[float], num_places: int, dtype: Any) -> None:
        self._constants = constants
        self._places = np.arange(num_places, dtype=dtype)
        self._num_parts = 0

    def tree(self, numbers: Numbers) -> Tree:
        if leaf := self._leaf(numbers):
            self._num_parts += 1
            if self._num_parts > _MAX_PARTS:
                raise Irregular(f"its pixels lie in more than {_MAX_PARTS} pieces")
            return leaf
        for lines in (_some_lines, _all_lines):  # cuts show in a few lines already, or else in one of them all
            for dim in range(numbers.ndim):
                lengths = _lengths(lines(numbers, dim))
                if len(lengths) > 1:
                    return self._cut(numbers, dim, lengths)
        # Steps that are even along each line, but not the same in all: tiles of different widths, for one.
        uneven = [dim for dim in range(numbers.ndim) if len(np.unique(np.diff(_all_lines(numbers, dim)))) > 1]
        dim = min(uneven, key=lambda dim: numbers.shape[dim])
        return self._cut(numbers, dim, [1] * numbers.shape[dim])

    def _cut(self, numbers: Numbers, dim: int, lengths: list[int]) -> Tree:
        groups = _groups(lengths)
        if len(groups) == 1 and lengths[0] > 1:
            shape = (*numbers.shape[:dim], -1, lengths[0], *numbers.shape[dim + 1 :])
            return Factor(dim, lengths[0], self.tree(numbers.reshape(shape)))
        extents = tuple(lengths) if len(groups) == 1 else tuple(groups)
        if len(extents) > _MAX_PARTS:
            raise Irregular(f"its pixels lie in more than {_MAX_PARTS} pieces")
        stops = np.cumsum(extents)[:-1]
        return Split(dim, extents, tuple(self.tree(piece) for piece in np.split(numbers, stops, axis=dim)))

    def _leaf(self, numbers: Numbers) -> Constant | View | None:
        """The single constant or view that these numbers are, if they are."""
        origin = (0,) * numbers.ndim
        first, last = int(numbers[origin]), int(numbers[(-1,) * numbers.ndim])
        if first < 0:
            if last != first or not (numbers == first).all():
                return None
            return Constant(self._constants[-1 - first])
        strides = tuple(
            int(numbers[(*origin[:dim], 1, *origin[dim + 1 :])]) - first if extent > 1 else 0
            for dim, extent in enumerate(numbers.shape)
        )
        expected = first + sum(stride * (extent - 1) for stride, extent in zip(strides, numbers.shape, strict=True))
        if min(strides, default=0) < 0 or last != expected or last >= len(self._places):
            return None
        item = self._places.itemsize
        view = np.lib.stride_tricks.as_strided(
            self._places[first:], numbers.shape, [stride * item for stride in strides], writeable=False
        )
        return View(first, strides) if np.array_equal(view, numbers) else None


def _some_lines(numbers: Numbers, dim: int) -> Numbers:
    """[lines, extent]: through first, middle and last place of the other dimensions."""
    others = [sorted({0, extent // 2, extent - 1}) for place, extent in enumerate(numbers.shape) if place != dim]
    chosen = np.ix_(*others[:dim], np.arange(numbers.shape[dim]), *others[dim:])
    return _all_lines(numbers[chosen], dim)


def _all_lines(numbers: Numbers, dim: int) -> Numbers:
    return np.moveaxis(numbers, dim, -1).reshape(-1, numbers.shape[dim])


def _lengths(lines: Numbers) -> list[int]:
    """Lengths of the segments, along all lines at once, within which numbers grow by the same step."""
    extent = lines.shape[1]
    if extent < 2:
        return [extent]
    steps = np.diff(lines, axis=1)
    # No step leads down (views have no negative strides), nor from a constant to anything else.
    parted = ((steps < 0) | (((lines[:, 1:] < 0) | (lines[:, :-1] < 0)) & (steps != 0))).any(axis=0)
    changed = np.ones(extent - 1, dtype=bool)
    changed[1:] = (steps[:, 1:] != steps[:, :-1]).any(axis=0)
    starts = [0]
    for place in np.flatnonzero(parted | changed).tolist():
        # A segment's first step is its own; the next one that differs ends it.
        if parted[place] or place > starts[-1]:
            starts.append(place + 1)
    return [stop - start for start, stop in pairwise([*starts, extent])]


def _groups(lengths: list[int]) -> list[int]:
    """Sums over runs of equal lengths."""
    runs = np.flatnonzero(np.diff(lengths)) + 1
    return [sum(run.tolist()) for run in np.split(np.asarray(lengths), runs)]
