"""Slots of one capacity, and the rows' keys and values in them.

Keys and values of a layer are [K, N, H, S, D]; the keys of a pool in blocks are [K, N, H, D, S].

Shapes: N slots of a pool, K blocks of S cells each, H heads of keys and values, D of a head, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

# Of some tokens: keys and values [H, T, D] in each layer.
KeysAndValues = Sequence[tuple[torch.Tensor, torch.Tensor]]

_TOKEN_BY_TOKEN = {"cuda"}  # devices where these lie as [K, N, S, H, D], as flash attention reads them
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
            gap, and a copy of all keys took longer than the product. And a component of the keys is one vector over the
            cells of a block, so that scores are weighted sums of vectors (row_attention.py). Otherwise there is one
            block.
    """

    def __init__(self, num_cells: int, *, in_blocks: bool = False) -> None:
        self.num_cells, self.in_blocks = num_cells, in_blocks
        self.num_blocks = min(_BLOCKS, -(-num_cells // _BLOCK_CELLS)) if in_blocks else 1
        self.num_block_cells = -(-num_cells // self.num_blocks)
        self.num_slots = 0
        self.keys: list[torch.Tensor] = []  # of each layer; none before the first row
        self.values: list[torch.Tensor] = []
        self.free: list[int] = []  # sorted, so that live slots gather at the front
        self.generation = next(_GENERATIONS)  # another number for other storage

    @property
    def num_live(self) -> int:
        return self.num_slots - len(self.free)

    @property
    def num_slot_cells(self) -> int:
        """Allocated for each slot: whole blocks."""
        return self.num_blocks * self.num_block_cells

    @property
    def num_allocated_cells(self) -> int:
        return self.num_slots * self.num_slot_cells

    @property
    def one_key_H1D(self) -> torch.Tensor:
        """Of the first layer: for its dtype, device and size."""
        return self.by_cell(self.keys[0][0, 0])[:, :1]

    def num_read_cells(self, num_cells: int) -> int:
        """Of each slot, where the longest row has filled `num_cells`: blocks are read as wholes."""
        return self._num_read_blocks(num_cells) * self.num_block_cells if self.in_blocks else num_cells

    def key_blocks(self, keys: torch.Tensor, num_cells: int) -> list[torch.Tensor]:
        """What is read of a layer's keys, block by block: [N, H, D, S] each."""
        if self.in_blocks:
            return list(keys[: self._num_read_blocks(num_cells)])
        return [keys[0, :, :, :num_cells].transpose(-1, -2)]

    def value_blocks(self, values_KNHSD: torch.Tensor, num_cells: int) -> list[torch.Tensor]:
        """What is read of a layer's values: [N, H, S, D] each."""
        if self.in_blocks:
            return list(values_KNHSD[: self._num_read_blocks(num_cells)])
        return [values_KNHSD[0, :, :, :num_cells]]

    def by_cell(self, keys: torch.Tensor) -> torch.Tensor:
        """A view of keys, or of some of them, as [..., S, D]."""
        return keys.transpose(-1, -2) if self.in_blocks else keys

    def grow(self, num_slots: int) -> None:
        """Make room for so many slots; what is there stays."""
        for layer, (old_keys, old_values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys, values = self.storage(self.by_cell(old_keys[0, 0]), old_values[0, 0], num_slots)
            keys[:, : self.num_slots], values[:, : self.num_slots] = old_keys, old_values
            self.keys[layer], self.values[layer] = keys, values
        self.free += range(self.num_slots, num_slots)
        self.num_slots, self.generation = num_slots, next(_GENERATIONS)

    def storage(
        self, like_keys_HTD: torch.Tensor, like_values_HTD: torch.Tensor, num_slots: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer.

        Zeros: what no row wrote is masked, but 0 times infinity is not 0.
        """
        keys_KNHSD, values_KNHSD = (self._zeros(like_HTD, num_slots) for like_HTD in (like_keys_HTD, like_values_HTD))
        if not self.in_blocks:
            return keys_KNHSD, values_KNHSD
        num_heads, _, width = like_keys_HTD.shape
        return keys_KNHSD.view(self.num_blocks, num_slots, num_heads, width, self.num_block_cells), values_KNHSD

    def write(self, index: int, first_cell: int, tokens: KeysAndValues) -> int:
        """Fill cells of a slot; returns the first one behind them."""
        if not self.keys:
            both = [self.storage(keys_HTD, values_HTD, self.num_slots) for keys_HTD, values_HTD in tokens]
            self.keys, self.values = [keys for keys, _ in both], [values for _, values in both]
        end = first_cell + tokens[0][0].shape[1]
        size = self.num_block_cells
        for block in range(first_cell // size, -(-end // size)):
            start, stop = max(first_cell, block * size), min(end, (block + 1) * size)
            cells, part = slice(start - block * size, stop - block * size), slice(start - first_cell, stop - first_cell)
            for layer, (keys_HTD, values_HTD) in enumerate(tokens):
                self.by_cell(self.keys[layer][block, index])[:, cells] = keys_HTD[:, part]
                self.values[layer][block, index, :, cells] = values_HTD[:, part]
        return end

    def wipe(self, index: int) -> None:
        """Zeros in all cells of a slot."""
        for tensor in (*self.keys, *self.values):
            tensor[:, index] = 0

    def _num_read_blocks(self, num_cells: int) -> int:
        return -(-num_cells // self.num_block_cells)

    def _zeros(self, like_HTD: torch.Tensor, num_slots: int) -> torch.Tensor:
        num_heads, _, width = like_HTD.shape
        if like_HTD.device.type in _TOKEN_BY_TOKEN and not self.in_blocks:
            shape = (self.num_blocks, num_slots, self.num_block_cells, num_heads, width)
            return like_HTD.new_zeros(shape).transpose(2, 3)
        return like_HTD.new_zeros(self.num_blocks, num_slots, num_heads, self.num_block_cells, width)
