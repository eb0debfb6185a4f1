"""Where the slots' keys and values lie: pools of slots of one capacity each, so that one long row does not size all.

A slot holds one row: its prompt without padding from cell 0 on, then its answer. A pool is one tensor per layer; the
rows of a pool are attended to together, over no more cells than its longest row has filled. Nothing is copied from step
to step: a step writes one cell of each row.

Shapes: N slots of a pool, S cells of each, B live rows, P of them in one pool, H heads of keys and values, D of a head.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

# Capacities 64, 96, 128, 192, 256, 384 ...: no more than half of a slot lies idle, and pools are few.
_CLASSES = sorted({64 << power for power in range(16)} | {96 << power for power in range(16)})
_FIRST_SLOTS = 4
_TOKEN_BY_TOKEN = {"cuda"}  # devices whose storage is [N, S, H, D]
_GENERATIONS = itertools.count()


@dataclass(slots=True, eq=False)
class Slot:
    """One row's cells."""

    pool: Pool
    index: int
    num_tokens: int = 0  # cells filled


class Pool:
    """Slots of one capacity."""

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self.num_slots = 0
        self.keys_NHSD: list[torch.Tensor] = []  # of each layer
        self.values_NHSD: list[torch.Tensor] = []
        self.free: list[int] = []  # sorted, so that live slots gather at the front
        self.generation = next(_GENERATIONS)  # another number for other storage

    @property
    def num_live(self) -> int:
        return self.num_slots - len(self.free)

    def grow(self, num_slots: int) -> None:
        """Make room for so many slots; what is there stays."""
        for tensors in (self.keys_NHSD, self.values_NHSD):
            for layer, old_NHSD in enumerate(tensors):
                new_NHSD = self.storage(old_NHSD, num_slots)
                new_NHSD[: self.num_slots] = old_NHSD
                tensors[layer] = new_NHSD
        self.free += range(self.num_slots, num_slots)
        self.num_slots, self.generation = num_slots, next(_GENERATIONS)

    def allocate(self, layers: Sequence[Any]) -> None:
        """Storage shaped like the layers of a cache [B, H, T, D]."""
        if not self.keys_NHSD:
            self.keys_NHSD = [self.storage(layer.keys, self.num_slots) for layer in layers]
            self.values_NHSD = [self.storage(layer.values, self.num_slots) for layer in layers]

    def storage(self, like_BHTD: torch.Tensor, num_slots: int) -> torch.Tensor:
        """Keys or values of a layer [N, H, S, D]; on CUDA token by token, as flash attention reads them.

        Zeros: what no row wrote is masked, but 0 times infinity is not 0.
        """
        num_heads, width = like_BHTD.shape[1], like_BHTD.shape[3]
        if like_BHTD.device.type in _TOKEN_BY_TOKEN:
            return like_BHTD.new_zeros(num_slots, self.num_cells, num_heads, width).transpose(1, 2)
        return like_BHTD.new_zeros(num_slots, num_heads, self.num_cells, width)


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

    @property
    def is_dense(self) -> bool:
        return self.num_slots == self.stop - self.start

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

    def cells(self, storage_NHSD: torch.Tensor) -> torch.Tensor:
        """Where a step's keys or values go: for each row and head the number of its vector in the pool. [P * H]."""
        num_heads, width = storage_NHSD.shape[1], storage_NHSD.shape[3]
        if ("cells", num_heads) not in self.known:
            per_slot, per_head, per_cell = (stride // width for stride in storage_NHSD.stride()[:3])
            head_H = torch.arange(num_heads, device=self.length_P.device) * per_head
            first_P1 = (self.index_P * per_slot + self.length_P * per_cell)[:, None]
            self.known["cells", num_heads] = (first_P1 + head_H).flatten()
        return self.known["cells", num_heads]

    def mask(self, window: int | None) -> torch.Tensor:
        """What a step's queries may not look at, True there: [num_slots, 1, 1, num_cells]."""
        if ("mask", window) not in self.known:
            cell_S = torch.arange(self.num_cells, device=self.length_P.device)
            length_N1 = (self.used_N() - 1)[:, None]
            hidden_NS = cell_S > length_N1
            if window is not None:
                hidden_NS |= cell_S <= length_N1 - window
            self.known["mask", window] = hidden_NS[:, None, None]
        return self.known["mask", window]


class SlotMemory:
    """All pools. Held by one loop.

    Args:
        max_slots: rows at a time.
        max_cells: tokens of all slots together.
        kernel: what attends to them in a decode step (attention.py).
    """

    def __init__(self, *, max_slots: int, max_cells: int, kernel: Any) -> None:
        self.max_slots, self.max_cells, self.kernel = max_slots, max_cells, kernel
        self._pools: dict[int, Pool] = {}
        self.shares: list[Share] = []  # of the step at hand
        self.cache: Cache | None = None

    @property
    def num_live(self) -> int:
        return sum(pool.num_live for pool in self._pools.values())

    @property
    def pools(self) -> list[Pool]:
        """All that there are."""
        return list(self._pools.values())

    @property
    def num_cells(self) -> int:
        """Cells allocated."""
        return sum(pool.num_slots * pool.num_cells for pool in self._pools.values())

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values in all layers; 0 before the first row."""
        for pool in self._pools.values():
            if pool.keys_NHSD:
                num_bytes = sum(tensor.nbytes for tensor in (*pool.keys_NHSD, *pool.values_NHSD))
                return num_bytes // (pool.num_slots * pool.num_cells)
        return 0

    def reserve(self, num_tokens: int) -> Slot | None:
        """A slot for a row of so many tokens, answer included; None while there is no room.

        A row larger than all the memory gets it when it is alone: whether it fits is the device's word.
        """
        if self.num_live >= self.max_slots:
            return None
        num_cells = _CLASSES[bisect.bisect_left(_CLASSES, num_tokens)] if num_tokens <= _CLASSES[-1] else num_tokens
        pool = self._pools.setdefault(num_cells, Pool(num_cells))
        if not pool.free and not self._grow(pool):
            return None
        return Slot(pool, pool.free.pop(0))

    def release(self, slot: Slot, *, wipe: bool = False) -> None:
        """The row is done; its cells may be written anew.

        wipe: they may hold what is not finite. A later row of the slot would not look at it, but 0 times NaN is NaN.
        """
        if wipe:
            for tensor_NHSD in (*slot.pool.keys_NHSD, *slot.pool.values_NHSD):
                tensor_NHSD[slot.index] = 0
        bisect.insort(slot.pool.free, slot.index)

    def insert(self, slot: Slot, layers: Sequence[Any], row: int, spans: Sequence[tuple[int, int]]) -> None:
        """A row's keys and values of [B, H, T, D] into an empty slot; spans: which of its tokens, in order."""
        slot.pool.allocate(layers)
        if self.cache is None:
            self.cache = Cache(layers=[SlotLayer(self, number) for number in range(len(layers))])
        slot.num_tokens = 0
        for first, last in spans:
            start, stop = slot.num_tokens, slot.num_tokens + last - first
            for number, layer in enumerate(layers):
                slot.pool.keys_NHSD[number][slot.index, :, start:stop] = layer.keys[row, :, first:last]
                slot.pool.values_NHSD[number][slot.index, :, start:stop] = layer.values[row, :, first:last]
            slot.num_tokens = stop

    def arrange(self, slots: Sequence[Slot], length_B: torch.Tensor) -> None:
        """Say which rows the next steps are of. The slots come ordered by pool, then by index.

        length_B: tokens that each holds, on the device; `advance` counts it up.
        """
        self.shares = []
        start = 0
        while start < len(slots):
            pool, stop = slots[start].pool, start + 1
            while stop < len(slots) and slots[stop].pool is pool:
                stop += 1
            index_P = torch.tensor([slot.index for slot in slots[start:stop]], device=length_B.device)
            num_slots = slots[stop - 1].index + 1
            self.shares.append(Share(pool, start, stop, index_P, num_slots, length_B[start:stop]))
            start = stop

    def begin_step(self, slots: Sequence[Slot]) -> None:
        """Before each forward: how far the queries look."""
        for share in self.shares:
            share.num_cells = 1 + max(slot.num_tokens for slot in slots[share.start : share.stop])
            share.known.clear()

    def _grow(self, pool: Pool) -> bool:
        wanted = min(max(_FIRST_SLOTS, 2 * pool.num_slots), self.max_slots)
        for num_slots in (wanted, pool.num_slots + 1):
            needed = (num_slots - pool.num_slots) * pool.num_cells
            if num_slots > pool.num_slots and self._make_room(needed, pool):
                pool.grow(num_slots)
                return True
        if self.num_live == 0:
            pool.grow(pool.num_slots + 1)
            return True
        return False

    def _make_room(self, num_cells: int, wanting: Pool) -> bool:
        """Drop idle pools, as many as it takes."""
        for capacity, pool in list(self._pools.items()):
            if self.num_cells + num_cells <= self.max_cells:
                break
            if pool is not wanting and not pool.num_live:
                del self._pools[capacity]
        return self.num_cells + num_cells <= self.max_cells


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of all slots, as transformers' attention modules see a cache. For decode steps alone."""

    is_sliding = False
    is_compileable = False

    def __init__(self, memory: SlotMemory, number: int) -> None:
        super().__init__()
        self.memory, self._number = memory, number
        self.is_initialized = True

    def parts(self, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a pool up to its last live slot: [num_slots, H, S, D]."""
        pool = share.pool
        return pool.keys_NHSD[self._number][: share.num_slots], pool.values_NHSD[self._number][: share.num_slots]

    def update(self, key_BH1D: torch.Tensor, value_BH1D: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write each row's cell; the attention function finds the rest through the key's `slot_layer`."""
        for share in self.memory.shares:
            for tensors, new_BH1D in ((share.pool.keys_NHSD, key_BH1D), (share.pool.values_NHSD, value_BH1D)):
                storage_NHSD = tensors[self._number]
                cell_C = share.cells(storage_NHSD)
                new_CD = new_BH1D[share.start : share.stop].reshape(len(cell_C), -1)
                _by_cell(storage_NHSD).index_copy_(0, cell_C, new_CD)
        key_BH1D.slot_layer = self  # type: ignore[attr-defined]
        return key_BH1D, value_BH1D

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Storage comes with the first row."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max((share.num_cells for share in self.memory.shares), default=1) - 1

    def get_max_length(self) -> int:
        return -1


def _by_cell(storage_NHSD: torch.Tensor) -> torch.Tensor:
    """The same memory as one vector after another [N * H * S, D], whichever way they lie (Pool.storage).

    A copy to places of one axis takes a third of the time of one to places of two (12 and 41 us on a CPU).
    """
    width = storage_NHSD.shape[3]
    return storage_NHSD.as_strided((storage_NHSD.numel() // width, width), (width, 1))
