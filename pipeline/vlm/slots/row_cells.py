"""What the rows of a decode step look at, row by row: which cells of which pools are each row's.

Computed once for all layers of a step. Several rows may look at one slot, that of their prefix.

Shapes: B rows, P of them in one part, K blocks of S cells each, L cells that are looked at, H heads of keys and values,
T queries of each, D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pipeline.vlm.slots.share import PrefixShare, Share
from pipeline.vlm.slots.sums import Sums


@dataclass(slots=True)
class RowPart:
    """Cells of one pool in blocks, which some rows look at.

    rows: these rows among all of the step.
    index_P, used_P: of each its slot, and how many cells of it, from the first one on.
    first: where the cells begin among all that a row looks at.
    """

    share: Share | PrefixShare
    rows: slice | torch.Tensor
    index_P: torch.Tensor
    used_P: torch.Tensor
    first: int
    _sums: dict[object, Sums] = field(default_factory=dict)

    @property
    def cells(self) -> slice:
        """Where they are among all that a row looks at; as many as the longest row has."""
        return slice(self.first, self.first + self.share.num_cells)

    def scores(self, query_PHTD: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[P, H, T, num_cells]. keys: as they lie in the pool (Pool.keys)."""
        num_blocks = self.share.pool.num_read_cells(self.share.num_cells) // self.share.pool.num_block_cells
        weights = query_PHTD.unsqueeze(3).expand(-1, -1, -1, num_blocks, -1)
        sums = self._key_sums(keys, query_PHTD.shape[2], num_blocks)
        return sums(keys, weights.flatten()).view(*query_PHTD.shape[:3], -1)[..., : self.share.num_cells]

    def mixed(self, shares_PHTL: torch.Tensor, values_KNHSD: torch.Tensor) -> torch.Tensor:
        """[P, H, T, D]. shares: of these cells, 0 for those that a row does not look at."""
        sums = self._value_sums(values_KNHSD, shares_PHTL.shape[2])
        return sums(values_KNHSD, shares_PHTL.flatten()).view(*shares_PHTL.shape[:3], -1)

    def _key_sums(self, keys: torch.Tensor, num_queries: int, num_blocks: int) -> Sums:
        """For each row, head, query and block the sum of D vectors over its cells.

        Blocks that a row has not begun are computed from its first one, which is at hand, and masked.
        """
        _, _, num_heads, width, size = keys.shape
        if ("keys", num_heads, num_queries) not in self._sums:
            per_block, per_slot, per_head, per_width = (stride // size for stride in keys.stride()[:4])
            block_K = self._count(num_blocks)
            block_PK = torch.where(block_K * size < self.used_P[:, None], block_K, 0)
            vector_PHKD = (
                (self.index_P * per_slot).int()[:, None, None, None]
                + (self._count(num_heads) * per_head)[:, None, None]
                + (block_PK * per_block)[:, None, :, None]
                + self._count(width) * per_width
            )
            self._sums["keys", num_heads, num_queries] = Sums.of(vector_PHKD, num_queries)
        return self._sums["keys", num_heads, num_queries]

    def _value_sums(self, values_KNHSD: torch.Tensor, num_queries: int) -> Sums:
        """For each row, head and query the sum of its cells' vectors.

        For cells that a row has not filled stands its first one.
        """
        num_heads, size, width = values_KNHSD.shape[2:]
        if ("values", num_heads, num_queries) not in self._sums:
            per_block, per_slot, per_head, per_cell = (stride // width for stride in values_KNHSD.stride()[:4])
            cell_L = self._count(self.share.num_cells)
            place_L = cell_L // size * per_block + cell_L % size * per_cell
            place_PL = torch.where(cell_L < self.used_P[:, None], place_L, 0)
            vector_PHL = (
                (self.index_P * per_slot).int()[:, None, None]
                + (self._count(num_heads) * per_head)[:, None]
                + place_PL[:, None]
            )
            self._sums["values", num_heads, num_queries] = Sums.of(vector_PHL, num_queries)
        return self._sums["values", num_heads, num_queries]

    def _count(self, number: int) -> torch.Tensor:
        return torch.arange(number, dtype=torch.int32, device=self.used_P.device)


class RowCells:
    """All that the rows of a step look at.

    Args:
        own: each row's own cells; together they are of all rows, in order.
        prefixes: what rows begin with.
    """

    def __init__(self, own: Sequence[RowPart], prefixes: Sequence[RowPart], num_rows: int) -> None:
        self.own, self.prefixes, self.num_rows = own, prefixes, num_rows
        self.num_cells = max(part.cells.stop for part in own)
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None = None) -> torch.Tensor:
        """What the queries may not look at, True there: [B, 1, 1, L]. Windows are over a row's own cells."""
        if window not in self._masks:
            hidden_BL = torch.ones(self.num_rows, self.num_cells, dtype=torch.bool, device=self.own[0].used_P.device)
            for part in (*self.own, *self.prefixes):
                cell_L = torch.arange(part.share.num_cells, device=part.used_P.device)
                hidden_PL = cell_L >= part.used_P[:, None]
                if window is not None:
                    hidden_PL |= cell_L < part.used_P[:, None] - window
                hidden_BL[part.rows, part.cells] = hidden_PL
            self._masks[window] = hidden_BL[:, None, None]
        return self._masks[window]
