"""What the queries of a decode step look at: the rows of each pool, and the prefixes that several rows begin with.

Shapes: B live rows, P of them in one pool, N slots of a pool up to its last live one, S cells of each that are read
(Pool.num_read_cells), K blocks of them, H heads of keys and values, R rows of the largest family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pipeline.vlm.slots.pool import Pool
from pipeline.vlm.slots.sums import table


@dataclass(slots=True)
class Share:
    """The rows of a decode step that lie in one pool: rows `start` to `stop` of the batch, in the order of `index`."""

    pool: Pool
    start: int
    stop: int
    index_P: torch.Tensor
    num_slots: int  # the highest live slot, and one
    length_P: torch.Tensor  # cells filled before this step: where its token goes
    num_cells: int = 0  # of the longest row, with this step's
    known: dict[object, torch.Tensor] = field(default_factory=dict)  # of the step at hand

    def look_at(self, num_cells: int) -> None:
        """Another step begins, whose longest row has so many cells with it."""
        self.num_cells = num_cells
        self.known.clear()

    @property
    def is_dense(self) -> bool:
        return self.num_slots == self.stop - self.start

    def by_slot(self, of_row: torch.Tensor) -> torch.Tensor:
        """What belongs to the rows of a step [B, ...] as the slots of this pool lie [num_slots, ...]; 0 where free."""
        mine = of_row[self.start : self.stop]
        if self.is_dense:
            return mine
        of_slot = mine.new_zeros(self.num_slots, *mine.shape[1:])
        of_slot[self.index_P] = mine
        return of_slot

    def by_row(self, of_slot: torch.Tensor) -> torch.Tensor:
        """The other way: of the rows of this pool alone [P, ...]."""
        return of_slot if self.is_dense else of_slot[self.index_P]

    def used_N(self) -> torch.Tensor:
        """Cells that a step's queries look at, its own among them; 1 for slots that are free. int32 [num_slots]."""
        if "used" not in self.known:
            length_N = self.length_P.new_zeros(self.num_slots)
            length_N[self.index_P] = self.length_P
            self.known["used"] = (length_N + 1).to(torch.int32)
        return self.known["used"]

    def starts(self) -> torch.Tensor:
        """0, 1 ... num_slots, as int32."""
        if "starts" not in self.known:
            self.known["starts"] = torch.arange(self.num_slots + 1, dtype=torch.int32, device=self.length_P.device)
        return self.known["starts"]

    def write(
        self, keys: torch.Tensor, values_KNHSD: torch.Tensor, key_BH1D: torch.Tensor, value_BH1D: torch.Tensor
    ) -> None:
        """Fill this step's cell of each row in a layer of the pool."""
        if self.pool.in_blocks:
            block_P, cell_P = self._places()
            keys[block_P, self.index_P, :, :, cell_P] = key_BH1D[self.start : self.stop, :, 0]
        else:
            self._write_vectors(keys, key_BH1D)
        self._write_vectors(values_KNHSD, value_BH1D)

    def _write_vectors(self, storage_KNHSD: torch.Tensor, new_BH1D: torch.Tensor) -> None:
        vector_C = self._vectors(storage_KNHSD)
        new_CD = new_BH1D[self.start : self.stop].reshape(len(vector_C), -1)
        table(storage_KNHSD).index_copy_(0, vector_C, new_CD)

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and cell there of this step's tokens, [P] each."""
        if "block" not in self.known:
            size = self.pool.num_block_cells
            self.known["block"] = self.length_P // size
            self.known["cell"] = self.length_P - self.known["block"] * size
        return self.known["block"], self.known["cell"]

    def _vectors(self, storage_KNHSD: torch.Tensor) -> torch.Tensor:
        """The numbers of these vectors in the table of the storage: [P * H]."""
        num_heads, width = storage_KNHSD.shape[2], storage_KNHSD.shape[4]
        if ("vectors", num_heads) not in self.known:
            per_block, per_slot, per_head, per_cell = (stride // width for stride in storage_KNHSD.stride()[:4])
            block_P, cell_P = self._places()
            head_H = torch.arange(num_heads, device=self.length_P.device) * per_head
            first_P = self.index_P * per_slot + block_P * per_block + cell_P * per_cell
            self.known["vectors", num_heads] = (first_P[:, None] + head_H).flatten()
        return self.known["vectors", num_heads]

    def mask(self, window: int | None = None) -> torch.Tensor:
        """What a step's queries may not look at, True there: [num_slots, 1, 1, S]."""
        if ("mask", window) not in self.known:
            cell_S = torch.arange(self.pool.num_read_cells(self.num_cells), device=self.length_P.device)
            length_N1 = (self.used_N() - 1)[:, None]
            hidden_NS = cell_S > length_N1
            if window is not None:
                hidden_NS |= cell_S <= length_N1 - window
            self.known["mask", window] = hidden_NS[:, None, None]
        return self.known["mask", window]

    def added_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """The same as a number to be added to scores."""
        if ("added", dtype) not in self.known:
            self.known["added", dtype] = _added(self.mask(), dtype)
        return self.known["added", dtype]


class PrefixShare:
    """The rows of a decode step that begin with prefixes of one pool, by families: the rows of one prefix.

    Args:
        families: of each live slot of the pool, its rows of the batch.
        lengths: of each live slot, its cells.
    """

    def __init__(self, pool: Pool, families: Mapping[int, Sequence[int]], lengths: Mapping[int, int]) -> None:
        self.pool = pool
        self.num_slots = max(families) + 1
        self.num_cells = max(lengths.values())
        self.max_rows = max(map(len, families.values()))
        num_read_cells = pool.num_read_cells(self.num_cells)
        row_NR = torch.zeros(self.num_slots, self.max_rows, dtype=torch.long)
        place_of: dict[int, int] = {}
        hidden_NS = torch.zeros(self.num_slots, num_read_cells, dtype=torch.bool)
        for index, rows in families.items():
            row_NR[index, : len(rows)] = torch.tensor(rows)
            place_of |= {row: index * self.max_rows + place for place, row in enumerate(rows)}
            hidden_NS[index, lengths[index] :] = True
        self.row_NR = row_NR  # row 0 where there is none; the result is not read
        self.row_P = torch.tensor(sorted(place_of))
        self.place_P = torch.tensor([place_of[row] for row in sorted(place_of)])  # of these rows, in row_NR
        self._hidden_N11S = hidden_NS[:, None, None] if hidden_NS.any() else None
        self._added: dict[torch.dtype, torch.Tensor] = {}
        self.index_P = self.place_P // self.max_rows  # slots, in the order of row_P, and their cells
        self.used_P = torch.tensor([lengths[index] for index in self.index_P.tolist()])

    def mask(self, window: int | None = None) -> torch.Tensor | None:
        """What queries may not look at, True there [num_slots, 1, 1, S]; None where they see all.

        Raises:
            NotImplementedError: there are no windows over prefixes.
        """
        if window is not None:
            raise NotImplementedError("a window over a shared prefix")
        return self._hidden_N11S

    def added_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The same as a number to be added to scores."""
        if self._hidden_N11S is None:
            return None
        if dtype not in self._added:
            self._added[dtype] = _added(self._hidden_N11S, dtype)
        return self._added[dtype]


def _added(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
