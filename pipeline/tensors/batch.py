"""Samples in groups of like length, and a group as one padded batch.

Shapes: B rows in a batch, T tokens of the longest prompt in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.records import EncodedSample

if TYPE_CHECKING:
    import torch

    from pipeline.tensors.replay import PixelReplay

# A window is this many full batches: sorting it by length removes most padding, and an odd sample waits no longer.
_WINDOW_BATCHES = 8
_WINDOW_BYTES = 1 << 29


class Batcher:
    """Cuts a stream of samples into batches under a row and a token budget.

    Args:
        max_rows: rows in a batch.
        max_tokens: padded prompt tokens plus room for the answers, over all rows of a batch.
        max_new_tokens: what a row's answer may take at most, where the row has no cap of its own.
        pad_id: what input_ids are padded with (never attended to); known once the model is loaded.

    The engine sets what the model bears, once it knows:
        replay: makes the tensors of images that travel as pixels (EncodedSample.compact).
        pads_right: tokens are padded at the end. An encoder counts positions from the first column on; a decoder goes
            on from the last, so padding is in front.
        may_pad_tokens, may_pad_images: False lets only prompts of one length, or images of one shape, share a batch.
    """

    def __init__(self, *, max_rows: int, max_tokens: int, max_new_tokens: int, pad_id: int = 0) -> None:
        self.max_rows, self.max_tokens, self.pad_id = max_rows, max_tokens, pad_id
        self.replay: PixelReplay | None = None
        self.pads_right = False
        self.may_pad_tokens = self.may_pad_images = True
        self._max_new_tokens = max_new_tokens
        self._not_along_tokens: set[str] = set()

    @property
    def num_window_rows(self) -> int:
        """The largest number of samples that are held to be sorted."""
        return self.max_rows * _WINDOW_BATCHES

    def groups(self, samples: Iterator[EncodedSample]) -> Iterator[list[EncodedSample]]:
        """Batches, longest first within a window. The first windows are small, so that work starts at once."""
        num_batches = 1
        while window := list(_window(samples, self.max_rows * num_batches)):
            yield from self.split(window)
            num_batches = min(2 * num_batches, _WINDOW_BATCHES)

    def split(self, window: Sequence[EncodedSample]) -> Iterator[list[EncodedSample]]:
        """A window's batches; also a batch's own, where the budget or what may be padded changed since."""
        # Longest first: what does not fit into memory shows in the window's first batch.
        window = self.sorted(window)
        group: list[EncodedSample] = []
        width = 0
        for sample in window:
            cost = sample.num_tokens + (sample.max_new_tokens or self._max_new_tokens)
            full = len(group) >= self.max_rows or max(width, cost) * (len(group) + 1) > self.max_tokens
            if group and (full or not self._fits(group[0], sample)):
                yield group
                group, width = [], 0
            group.append(sample)
            width = max(width, cost)
        if group:
            yield group

    def sorted(self, window: Sequence[EncodedSample]) -> list[EncodedSample]:
        """Samples with like beside like, longest first."""
        self._learn(window)
        return sorted(window, key=self._order, reverse=True)

    def fits(self, first: EncodedSample, other: EncodedSample) -> bool:
        """Whether two samples may share a batch."""
        self._learn([first, other])
        return self._fits(first, other)

    def cut(self, sample: EncodedSample, num_tokens: int) -> EncodedSample:
        """A sample with the first tokens of its prompt alone; its images stay."""
        self._learn([sample])
        tensors = {
            name: array[:, :num_tokens] if self._along_tokens(sample, name) else array
            for name, array in sample.tensors.items()
        }
        return replace(sample, tensors=tensors)

    def pads_images(self, group: Sequence[EncodedSample]) -> bool:
        """Whether images of a group are padded, or whatever else does not run along the tokens."""
        self._learn(group)
        return len({self._shapes(sample) for sample in group}) > 1

    def collate(
        self, group: Sequence[EncodedSample], *, num_extra_tokens: int = 0, without: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """One batch: the token dimension is padded on its side, all others on the right, with zeros.

        A processor called with one sample returns [1, ...] for what it keeps per sample (input_ids, the images of
        Idefics) and [images, ...] or [patches, ...] for what it lists; joining along the first dimension is right for
        both. Samples of one group have the same tensors, so text-only rows never meet rows with images.

        num_extra_tokens: columns of padding that even the longest prompt gets, to try what a model makes of them.
        without: tensors whose content nobody will read; of their shape, all zeros, and without memory.
        """
        import torch

        self._learn(group)
        num_tokens = max(sample.num_tokens for sample in group) + num_extra_tokens
        batch: dict[str, torch.Tensor] = {}
        for name in group[0].tensors:
            arrays = [sample.tensors[name] for sample in group]
            if name in without:
                batch[name] = _stand_in([array.shape for array in arrays], torch.from_numpy(arrays[0][:0]).dtype)
                continue
            if self._along_tokens(group[0], name):
                fill = self.pad_id if name == "input_ids" else 0
                arrays = [_padded(array, num_tokens, fill, right=self.pads_right) for array in arrays]
            if len({array.shape[1:] for array in arrays}) > 1:
                shape = np.max([array.shape[1:] for array in arrays], axis=0)
                arrays = [_padded_right(array, shape) for array in arrays]
            batch[name] = torch.from_numpy(np.concatenate(arrays))
        return batch | self._made(group, without)

    def expanded(self, sample: EncodedSample) -> EncodedSample:
        """A sample whose images are tensors, as the processor alone would have given them."""
        return sample if self.replay is None else self.replay.expanded(sample)

    def _made(self, group: Sequence[EncodedSample], without: Collection[str]) -> dict[str, torch.Tensor]:
        """The tensors of compact images, made on the device."""
        import torch

        compacts = [sample.compact for sample in group if sample.compact is not None]
        if not compacts:
            return {}
        names = list(compacts[0].shapes)
        if all(name in without for name in names):
            return {name: _stand_in([compact.shapes[name] for compact in compacts], torch.float32) for name in names}
        assert self.replay is not None, "compact images need a batcher with a replay"
        made = [self.replay.tensors(compact) for compact in compacts]
        return {name: _joined([one[name] for one in made]) for name in names}

    def _learn(self, samples: Sequence[EncodedSample]) -> None:
        """Which tensors have one entry for each token shows in their shapes: a single deviation is the proof.

        Numbers with a fraction are images, whatever their shape: the second dimension of a list of patches may grow
        with the prompt.
        """
        for sample in samples:
            for name, array in sample.tensors.items():
                extent = array.shape[1] if array.ndim > 1 and array.shape[0] == 1 else None
                if extent != sample.num_tokens or array.dtype.kind == "f":
                    self._not_along_tokens.add(name)

    def _along_tokens(self, sample: EncodedSample, name: str) -> bool:
        return name in sample.tensors and name not in self._not_along_tokens

    def _shapes(self, sample: EncodedSample) -> tuple[tuple[int, ...], ...]:
        """What has to be equal in two samples, or padded: [1, tokens, ...] and [list, ...] without the first two."""
        return tuple(
            shape[2:] if self._along_tokens(sample, name) else shape[1:] for name, shape in sample.shapes.items()
        )

    def _fits(self, first: EncodedSample, other: EncodedSample) -> bool:
        return (
            _names(first) == _names(other)
            and (self.may_pad_tokens or first.num_tokens == other.num_tokens)
            and (self.may_pad_images or self._shapes(first) == self._shapes(other))
        )

    def _order(self, sample: EncodedSample) -> tuple[Any, ...]:
        """Sorts like with like: the same tensors, images of about one size (exactly one where it matters), length."""
        shapes = self._shapes(sample)
        exact = () if self.may_pad_images else shapes
        return (_names(sample), exact, [[_step(extent) for extent in shape] for shape in shapes], sample.num_tokens)


def _window(samples: Iterator[EncodedSample], max_rows: int) -> Iterator[EncodedSample]:
    size_bytes = 0
    for sample in islice(samples, max_rows):
        yield sample
        size_bytes += sample.num_bytes
        if size_bytes > _WINDOW_BYTES:
            return


def _names(sample: EncodedSample) -> tuple[str, ...]:
    return (*sample.shapes, "compact" if sample.compact else "")


def _stand_in(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the shape of several tensors joined."""
    import torch

    rest = [max(extents) for extents in zip(*(shape[1:] for shape in shapes), strict=True)]
    return torch.zeros((), dtype=dtype).expand(sum(shape[0] for shape in shapes), *rest)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension, all others padded on the right."""
    import torch
    from torch.nn import functional

    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        shape = np.max([tuple(tensor.shape[1:]) for tensor in tensors], axis=0)
        widths = [
            [
                width
                for wanted, have in zip(shape[::-1], tensor.shape[:0:-1], strict=True)
                for width in (0, wanted - have)
            ]
            for tensor in tensors
        ]
        tensors = [
            functional.pad(tensor, [int(one) for one in width]) for tensor, width in zip(tensors, widths, strict=True)
        ]
    return torch.cat(list(tensors))


def _step(extent: int) -> int:
    """Extents within a factor of 1.4 are much the same."""
    return round(2 * math.log2(extent)) if extent else 0


def _padded(array: np.ndarray[Any, Any], num_tokens: int, fill: int, *, right: bool) -> np.ndarray[Any, Any]:
    missing = num_tokens - array.shape[1]
    if not missing:
        return array
    widths = [(0, 0), (0, missing) if right else (missing, 0), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, widths, constant_values=fill)


def _padded_right(array: np.ndarray[Any, Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
    widths = [(0, 0), *((0, int(wanted) - have) for wanted, have in zip(shape, array.shape[1:], strict=True))]
    return np.pad(array, widths)
