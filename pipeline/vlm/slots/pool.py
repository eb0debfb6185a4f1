"""Slots of one capacity, and the rows' keys and values in them.

Shapes: N slots of a pool, S cells of each, H heads of keys and values, D of a head, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

# Of some tokens: keys and values [H, T, D] in each layer.
KeysAndValues = Sequence[tuple[torch.Tensor, torch.Tensor]]

_TOKEN_BY_TOKEN = {"cuda"}  # devices whose storage is [N, S, H, D]
_GENERATIONS = itertools.count()


class Pool:
    """One tensor of keys and one of values for each layer. A slot's cells are filled from the first one on."""

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self.num_slots = 0
        self.keys_NHSD: list[torch.Tensor] = []  # of each layer; none before the first row
        self.values_NHSD: list[torch.Tensor] = []
        self.free: list[int] = []  # sorted, so that live slots gather at the front
        self.generation = next(_GENERATIONS)  # another number for other storage

    @property
    def num_live(self) -> int:
        return self.num_slots - len(self.free)

    @property
    def num_allocated_cells(self) -> int:
        return self.num_slots * self.num_cells

    def grow(self, num_slots: int) -> None:
        """Make room for so many slots; what is there stays."""
        for tensors in (self.keys_NHSD, self.values_NHSD):
            for layer, old_NHSD in enumerate(tensors):
                new_NHSD = self.storage(old_NHSD[0], num_slots)
                new_NHSD[: self.num_slots] = old_NHSD
                tensors[layer] = new_NHSD
        self.free += range(self.num_slots, num_slots)
        self.num_slots, self.generation = num_slots, next(_GENERATIONS)

    def storage(self, like_HTD: torch.Tensor, num_slots: int) -> torch.Tensor:
        """Keys or values of a layer [N, H, S, D]; on CUDA token by token, as flash attention reads them.

        Zeros: what no row wrote is masked, but 0 times infinity is not 0.
        """
        num_heads, _, width = like_HTD.shape
        if like_HTD.device.type in _TOKEN_BY_TOKEN:
            return like_HTD.new_zeros(num_slots, self.num_cells, num_heads, width).transpose(1, 2)
        return like_HTD.new_zeros(num_slots, num_heads, self.num_cells, width)

    def write(self, index: int, first_cell: int, tokens: KeysAndValues) -> int:
        """Fill cells of a slot; returns the first one behind them."""
        if not self.keys_NHSD:
            self.keys_NHSD = [self.storage(keys_HTD, self.num_slots) for keys_HTD, _ in tokens]
            self.values_NHSD = [self.storage(values_HTD, self.num_slots) for _, values_HTD in tokens]
        end = first_cell + tokens[0][0].shape[1]
        for layer, (keys_HTD, values_HTD) in enumerate(tokens):
            self.keys_NHSD[layer][index, :, first_cell:end] = keys_HTD
            self.values_NHSD[layer][index, :, first_cell:end] = values_HTD
        return end

    def wipe(self, index: int) -> None:
        """Zeros in all cells of a slot."""
        for tensor_NHSD in (*self.keys_NHSD, *self.values_NHSD):
            tensor_NHSD[index] = 0
