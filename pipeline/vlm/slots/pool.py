"""Slots of one capacity, and the rows' keys and values in them.

Shapes: N slots of a pool, K blocks of S cells each, H heads of keys and values, D of a head, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

# Of some tokens: keys and values [H, T, D] in each layer.
KeysAndValues = Sequence[tuple[torch.Tensor, torch.Tensor]]

_TOKEN_BY_TOKEN = {"cuda"}  # devices whose storage is [K, N, S, H, D]
# A block is an eighth of a slot, so that what is read beyond a row's end is little; and no less than about this: with
# blocks of 64 a step of 16 rows of 310 cells took 1.1 times as long, though it reads less.
_BLOCK_CELLS, _BLOCKS = 128, 8
_GENERATIONS = itertools.count()


class Pool:
    """One tensor of keys and one of values for each layer. A slot's cells are filled from the first one on.

    Args:
        num_cells: of a slot.
        in_blocks: lay the same cells of all slots together, block by block. What a step reads, some blocks of the first
            slots, is then contiguous: oneDNN's batched products copy matrices between whose rows or batches there is a
            gap, and a copy of all keys took longer than the product. Otherwise there is one block.
    """

    def __init__(self, num_cells: int, *, in_blocks: bool = False) -> None:
        self.num_cells, self._in_blocks = num_cells, in_blocks
        self.num_blocks = min(_BLOCKS, -(-num_cells // _BLOCK_CELLS)) if in_blocks else 1
        self.num_block_cells = -(-num_cells // self.num_blocks)
        self.num_slots = 0
        self.keys_KNHSD: list[torch.Tensor] = []  # of each layer; none before the first row
        self.values_KNHSD: list[torch.Tensor] = []
        self.free: list[int] = []  # sorted, so that live slots gather at the front
        self.generation = next(_GENERATIONS)  # another number for other storage

    @property
    def num_live(self) -> int:
        return self.num_slots - len(self.free)

    @property
    def num_allocated_cells(self) -> int:
        return self.num_slots * self.num_blocks * self.num_block_cells

    def num_read_cells(self, num_cells: int) -> int:
        """Of each slot, where the longest row has filled `num_cells`: blocks are read as wholes."""
        if not self._in_blocks:
            return num_cells
        return -(-num_cells // self.num_block_cells) * self.num_block_cells

    def grow(self, num_slots: int) -> None:
        """Make room for so many slots; what is there stays."""
        for tensors in (self.keys_KNHSD, self.values_KNHSD):
            for layer, old_KNHSD in enumerate(tensors):
                new_KNHSD = self.storage(old_KNHSD[0, 0], num_slots)
                new_KNHSD[:, : self.num_slots] = old_KNHSD
                tensors[layer] = new_KNHSD
        self.free += range(self.num_slots, num_slots)
        self.num_slots, self.generation = num_slots, next(_GENERATIONS)

    def storage(self, like_HTD: torch.Tensor, num_slots: int) -> torch.Tensor:
        """Keys or values of a layer [K, N, H, S, D]; on CUDA token by token, as flash attention reads them.

        Zeros: what no row wrote is masked, but 0 times infinity is not 0.
        """
        num_heads, _, width = like_HTD.shape
        if like_HTD.device.type in _TOKEN_BY_TOKEN:
            shape = (self.num_blocks, num_slots, self.num_block_cells, num_heads, width)
            return like_HTD.new_zeros(shape).transpose(2, 3)
        return like_HTD.new_zeros(self.num_blocks, num_slots, num_heads, self.num_block_cells, width)

    def write(self, index: int, first_cell: int, tokens: KeysAndValues) -> int:
        """Fill cells of a slot; returns the first one behind them."""
        if not self.keys_KNHSD:
            self.keys_KNHSD = [self.storage(keys_HTD, self.num_slots) for keys_HTD, _ in tokens]
            self.values_KNHSD = [self.storage(values_HTD, self.num_slots) for _, values_HTD in tokens]
        end = first_cell + tokens[0][0].shape[1]
        size = self.num_block_cells
        for block in range(first_cell // size, -(-end // size)):
            start, stop = max(first_cell, block * size), min(end, (block + 1) * size)
            cells, part = slice(start - block * size, stop - block * size), slice(start - first_cell, stop - first_cell)
            for layer, (keys_HTD, values_HTD) in enumerate(tokens):
                self.keys_KNHSD[layer][block, index, :, cells] = keys_HTD[:, part]
                self.values_KNHSD[layer][block, index, :, cells] = values_HTD[:, part]
        return end

    def wipe(self, index: int) -> None:
        """Zeros in all cells of a slot."""
        for tensor_KNHSD in (*self.keys_KNHSD, *self.values_KNHSD):
            tensor_KNHSD[:, index] = 0
