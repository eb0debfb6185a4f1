"""What a decode step is of: its rows, and what their queries look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.vlm.slots.row_cells import RowCells, RowPart
from pipeline.vlm.slots.share import PrefixShare, Share

# Keys and values of a layer, as they lie in the pool of a share, up to its last live slot.
Stored = Callable[[Share | PrefixShare], tuple[torch.Tensor, torch.Tensor]]


@dataclass(slots=True)
class Step:
    """Some rows in the slots, for as long as they are the same ones.

    shares: which lie in which pool; together they are all rows, in order.
    prefix_shares: which of them begin with which prefixes.
    """

    shares: Sequence[Share] = ()
    prefix_shares: Sequence[PrefixShare] = ()
    _cells: RowCells | None = None  # of the step at hand

    def look_at(self, num_cells: Sequence[int]) -> None:
        """The next one begins. num_cells: of the longest row of each share, with this step's."""
        for share, number in zip(self.shares, num_cells, strict=True):
            share.look_at(number)
        self._cells = None

    def row_cells(self) -> RowCells:
        """The same, row by row: for kernels that are told where each row's cells lie."""
        if self._cells is None:
            num_rows = self.shares[-1].stop
            first = max((share.num_cells for share in self.prefix_shares), default=0)
            own = [
                RowPart(share, slice(share.start, share.stop), share.index_P, share.length_P + 1, first)
                for share in self.shares
            ]
            prefixes = []
            for prefix in self.prefix_shares:
                rows = slice(None) if len(prefix.row_P) == num_rows else prefix.row_P
                prefixes.append(RowPart(prefix, rows, prefix.index_P, prefix.used_P, 0))
            self._cells = RowCells(own, prefixes, num_rows)
        return self._cells
