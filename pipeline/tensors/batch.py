"""Samples in groups of like length, and a group as one left-padded batch.

Shapes: B rows in a batch, T tokens of the longest prompt in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.records import EncodedSample

if TYPE_CHECKING:
    import torch

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
    """

    def __init__(self, *, max_rows: int, max_tokens: int, max_new_tokens: int, pad_id: int = 0) -> None:
        self.max_rows, self.max_tokens, self.pad_id = max_rows, max_tokens, pad_id
        self._max_new_tokens = max_new_tokens

    @property
    def num_window_rows(self) -> int:
        """The largest number of samples that are held to be sorted."""
        return self.max_rows * _WINDOW_BATCHES

    def groups(self, samples: Iterator[EncodedSample]) -> Iterator[list[EncodedSample]]:
        """Batches, longest first within a window. The first windows are small, so that work starts at once."""
        num_batches = 1
        while window := list(_window(samples, self.max_rows * num_batches)):
            # Longest first: what does not fit into memory shows in the window's first batch.
            window.sort(key=lambda sample: (_signature(sample), sample.num_tokens), reverse=True)
            yield from self._cut(window)
            num_batches = min(2 * num_batches, _WINDOW_BATCHES)

    def _cut(self, window: Sequence[EncodedSample]) -> Iterator[list[EncodedSample]]:
        group: list[EncodedSample] = []
        width = 0
        for sample in window:
            cost = sample.num_tokens + (sample.max_new_tokens or self._max_new_tokens)
            full = len(group) >= self.max_rows or max(width, cost) * (len(group) + 1) > self.max_tokens
            if group and (full or _names(sample) != _names(group[0])):
                yield group
                group, width = [], 0
            group.append(sample)
            width = max(width, cost)
        if group:
            yield group

    def collate(self, group: Sequence[EncodedSample]) -> dict[str, torch.Tensor]:
        """One batch: the token dimension is padded on the left, all others on the right, with zeros.

        A processor called with one sample returns [1, ...] for what it keeps per sample (input_ids, the images of
        Idefics) and [images, ...] or [patches, ...] for what it lists; joining along the first dimension is right for
        both. Samples of one group have the same tensors, so text-only rows never meet rows with images.
        """
        import torch

        num_tokens = max(sample.num_tokens for sample in group)
        batch: dict[str, torch.Tensor] = {}
        for name in group[0].tensors:
            arrays = [sample.tensors[name] for sample in group]
            if all(_along_tokens(sample, name) for sample in group):
                fill = self.pad_id if name == "input_ids" else 0
                arrays = [_padded_left(array, num_tokens, fill) for array in arrays]
            if len({array.shape[1:] for array in arrays}) > 1:
                shape = np.max([array.shape[1:] for array in arrays], axis=0)
                arrays = [_padded_right(array, shape) for array in arrays]
            batch[name] = torch.from_numpy(np.concatenate(arrays))
        return batch


def _window(samples: Iterator[EncodedSample], max_rows: int) -> Iterator[EncodedSample]:
    size_bytes = 0
    for sample in islice(samples, max_rows):
        yield sample
        size_bytes += sum(array.nbytes for array in sample.tensors.values())
        if size_bytes > _WINDOW_BYTES:
            return


def _names(sample: EncodedSample) -> tuple[str, ...]:
    return tuple(sorted(sample.tensors))


def _signature(sample: EncodedSample) -> tuple[Any, ...]:
    """Sorts like with like: the same tensors first, then images of the same number and shape."""
    shapes = tuple(sample.tensors[name].shape for name in _names(sample) if not _along_tokens(sample, name))
    return (_names(sample), sum(int(np.prod(shape)) for shape in shapes), shapes)


def _along_tokens(sample: EncodedSample, name: str) -> bool:
    shape = sample.tensors[name].shape
    return len(shape) >= 2 and shape[0] == 1 and shape[1] == sample.num_tokens and name not in _NOT_TOKENS


# Image tensors whose second dimension may equal the number of tokens by chance.
_NOT_TOKENS = frozenset({"pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw"})


def _padded_left(array: np.ndarray[Any, Any], num_tokens: int, fill: int) -> np.ndarray[Any, Any]:
    missing = num_tokens - array.shape[1]
    if not missing:
        return array
    widths = [(0, 0), (missing, 0), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, widths, constant_values=fill)


def _padded_right(array: np.ndarray[Any, Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
    widths = [(0, 0), *((0, int(wanted) - have) for wanted, have in zip(shape, array.shape[1:], strict=True))]
    return np.pad(array, widths)
