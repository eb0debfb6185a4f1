"""Where the slots' keys and values lie: pools of slots of one capacity each, so that one long row does not size all.

A slot holds one row: its prompt without padding from cell 0 on, then its answer. A pool is one tensor per layer; the
rows of a pool are attended to together, over no more cells than its longest row has filled. Nothing is copied from step
to step: a step writes one cell of each row. Where rows may share a prefix (`shares_prefixes`), it has a slot of its own
in a pool of prefixes, as long as there are rows of it, and their slots hold what comes after it.

Shapes: N slots of a pool, S cells of each, B live rows, P of them in one pool, H heads of keys and values, D of a head.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pipeline.vlm.slots.decode_kernel import Kernel
from pipeline.vlm.slots.pool import KeysAndValues, Pool
from pipeline.vlm.slots.prefix import Prefix
from pipeline.vlm.slots.share import PrefixShare, Share
from pipeline.vlm.slots.step import Step

# Capacities 64, 96, 128, 192, 256, 384 ...: no more than half of a slot lies idle, and pools are few.
_CLASSES = sorted({64 << power for power in range(16)} | {96 << power for power in range(16)})
_FIRST_SLOTS = 4


@dataclass(slots=True, eq=False)
class Slot:
    """One row's cells."""

    pool: Pool
    index: int
    num_tokens: int = 0  # cells filled
    prefix: PrefixSlot | None = None  # what the row looks at before them


@dataclass(slots=True, eq=False)
class PrefixSlot:
    """The cells of a prefix, and how many rows look at them."""

    prefix: Prefix
    pool: Pool
    index: int
    num_rows: int = 0
    wiped: bool = False  # when the last of them goes


class SlotMemory:
    """All pools. Held by one loop.

    Args:
        max_slots: rows at a time.
        max_cells: tokens of all slots together; a prefix that rows share counts once.
        kernel: what attends to them in a decode step (attention.py); it may change while there are no pools.
        shares_prefixes: whether rows look at one copy of their prefix (prefix_attention.py), or each has its own.
    """

    def __init__(self, *, max_slots: int, max_cells: int, kernel: Kernel, shares_prefixes: bool = False) -> None:
        self.max_slots, self.max_cells, self.kernel = max_slots, max_cells, kernel
        self.shares_prefixes = shares_prefixes
        self._pools: dict[int, Pool] = {}  # by their capacity
        self._prefix_pools: dict[int, Pool] = {}
        self._prefixes: dict[Prefix, PrefixSlot] = {}
        self.step = Step()  # the one at hand
        self.cache: Cache | None = None

    @property
    def num_live(self) -> int:
        return sum(pool.num_live for pool in self._pools.values())

    @property
    def pools(self) -> list[Pool]:
        """All that there are of rows."""
        return list(self._pools.values())

    @property
    def num_cells(self) -> int:
        """Cells allocated."""
        both = (*self._pools.values(), *self._prefix_pools.values())
        return sum(pool.num_allocated_cells for pool in both)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values in all layers; 0 before the first row."""
        for pool in self._pools.values():
            if pool.keys:
                num_bytes = sum(tensor.nbytes for tensor in (*pool.keys, *pool.values))
                return num_bytes // pool.num_allocated_cells
        return 0

    def enter(self, tokens: KeysAndValues, prefix: Prefix | None, num_new_tokens: int) -> Slot | None:
        """A slot that holds a prompt and has room for an answer; None while there is none.

        A row larger than all the memory gets it when it is alone: whether it fits is the device's word.

        Args:
            tokens: the prompt, or what comes after its prefix.

        Raises:
            whatever the device raises; nothing is held then.
        """
        num_tokens = tokens[0][0].shape[1] + num_new_tokens
        parts = [tokens]
        if prefix is not None and not self.shares_prefixes:
            parts, num_tokens, prefix = [prefix.layers, tokens], num_tokens + prefix.num_tokens, None
        slot = self._reserve(num_tokens, prefix)
        if slot is None:
            return None
        try:
            for part in parts:
                slot.num_tokens = slot.pool.write(slot.index, slot.num_tokens, part)
        except BaseException:
            self.release(slot)
            raise
        if self.cache is None:
            self.cache = Cache(layers=[SlotLayer(self, number) for number in range(len(tokens))])
        return slot

    def release(self, slot: Slot, *, wipe: bool = False) -> None:
        """The row is done; its cells may be written anew.

        wipe: they may hold what is not finite. A later row of the slot would not look at it, but 0 times NaN is NaN.
        """
        if wipe:
            slot.pool.wipe(slot.index)
        bisect.insort(slot.pool.free, slot.index)
        if slot.prefix is not None:
            self._let_go(slot.prefix, wipe=wipe)

    def arrange(self, slots: Sequence[Slot], length_B: torch.Tensor) -> None:
        """Say which rows the next steps are of. The slots come ordered by pool, then by index.

        length_B: tokens that each holds, on the device; the loop counts it up.
        """
        shares = []
        start = 0
        while start < len(slots):
            pool, stop = slots[start].pool, start + 1
            while stop < len(slots) and slots[stop].pool is pool:
                stop += 1
            index_P = torch.tensor([slot.index for slot in slots[start:stop]], device=length_B.device)
            num_slots = slots[stop - 1].index + 1
            shares.append(Share(pool, start, stop, index_P, num_slots, length_B[start:stop]))
            start = stop
        families: dict[PrefixSlot, list[int]] = {}
        for row, slot in enumerate(slots):
            if slot.prefix is not None:
                families.setdefault(slot.prefix, []).append(row)
        prefix_shares = [
            PrefixShare(
                pool,
                {held.index: rows for held, rows in families.items() if held.pool is pool},
                {held.index: held.prefix.num_tokens for held in families if held.pool is pool},
            )
            for pool in {held.pool: None for held in families}
        ]
        self.step = Step(shares, prefix_shares)

    def begin_step(self, slots: Sequence[Slot]) -> None:
        """Before each forward: how far the queries look."""
        self.step.look_at(
            [1 + max(slot.num_tokens for slot in slots[share.start : share.stop]) for share in self.step.shares]
        )

    def _reserve(self, num_tokens: int, prefix: Prefix | None) -> Slot | None:
        if self.num_live >= self.max_slots:
            return None
        held = self._hold(prefix) if prefix is not None else None
        if prefix is not None and held is None:
            return None
        pool = None
        try:
            pool = self._with_room(self._pools, num_tokens)
        finally:
            if pool is None and held is not None:
                self._let_go(held)
        return Slot(pool, pool.free.pop(0), prefix=held) if pool is not None else None

    def _hold(self, prefix: Prefix) -> PrefixSlot | None:
        """One row more looks at it; it comes into the memory with the first."""
        held = self._prefixes.get(prefix)
        if held is None:
            pool = self._with_room(self._prefix_pools, prefix.num_tokens)
            if pool is None:
                return None
            pool.write(pool.free[0], 0, prefix.layers)
            held = self._prefixes[prefix] = PrefixSlot(prefix, pool, pool.free.pop(0))
        held.num_rows += 1
        return held

    def _let_go(self, held: PrefixSlot, *, wipe: bool = False) -> None:
        held.num_rows -= 1
        held.wiped |= wipe
        if held.num_rows:
            return
        if held.wiped:
            held.pool.wipe(held.index)
        bisect.insort(held.pool.free, held.index)
        del self._prefixes[held.prefix]

    def _with_room(self, pools: dict[int, Pool], num_tokens: int) -> Pool | None:
        """The pool of a length, with a free slot."""
        num_cells = _CLASSES[bisect.bisect_left(_CLASSES, num_tokens)] if num_tokens <= _CLASSES[-1] else num_tokens
        pool = pools.setdefault(num_cells, Pool(num_cells, in_blocks=self.kernel.in_blocks))
        return pool if pool.free or self._grow(pool) else None

    def _grow(self, pool: Pool) -> bool:
        wanted = min(max(_FIRST_SLOTS, 2 * pool.num_slots), self.max_slots)
        for num_slots in (wanted, pool.num_slots + 1):
            needed = (num_slots - pool.num_slots) * pool.num_slot_cells
            if num_slots > pool.num_slots and self._make_room(needed, pool):
                pool.grow(num_slots)
                return True
        if self.num_live == 0:
            pool.grow(pool.num_slots + 1)
            return True
        return False

    def _make_room(self, num_cells: int, wanting: Pool) -> bool:
        """Drop idle pools, as many as it takes."""
        for pools in (self._pools, self._prefix_pools):
            for capacity, pool in list(pools.items()):
                if self.num_cells + num_cells <= self.max_cells:
                    break
                if pool is not wanting and not pool.num_live:
                    del pools[capacity]
        return self.num_cells + num_cells <= self.max_cells


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of all slots, as transformers' attention modules see a cache. For decode steps alone."""

    is_sliding = False
    is_compileable = False

    def __init__(self, memory: SlotMemory, number: int) -> None:
        super().__init__()
        self.memory, self._number = memory, number
        self.is_initialized = True

    def stored(self, share: Share | PrefixShare) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a pool, as they lie there, up to its last live slot."""
        pool, slots = share.pool, slice(share.num_slots)
        return pool.keys[self._number][:, slots], pool.values[self._number][:, slots]

    def update(self, key_BH1D: torch.Tensor, value_BH1D: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write each row's cell; the attention function finds the rest through the key's `slot_layer`."""
        for share in self.memory.step.shares:
            pool = share.pool
            share.write(pool.keys[self._number], pool.values[self._number], key_BH1D, value_BH1D)
        key_BH1D.slot_layer = self  # type: ignore[attr-defined]
        return key_BH1D, value_BH1D

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Storage comes with the first row."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max((share.num_cells for share in self.memory.step.shares), default=1) - 1

    def get_max_length(self) -> int:
        return -1
