"""The memory of slots: capacities in classes, room that is kept, storage that grows with what is in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.vlm.slots.decode_kernel import Kernel, kernels
from pipeline.vlm.slots.memory import Slot, SlotMemory
from pipeline.vlm.slots.pool import KeysAndValues, Pool
from pipeline.vlm.slots.prefix import Prefix

HEADS, SIZE = 2, 4


MemoryOf = Callable[..., SlotMemory]


@pytest.fixture(params=["sdpa", "matmul"], ids=["one block", "in blocks"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return kernels(torch.device("cpu"))[request.param]


@pytest.fixture
def memory_of(kernel: Kernel) -> MemoryOf:
    def build(*, max_slots: int = 8, max_cells: int = 10_000, shares_prefixes: bool = False) -> SlotMemory:
        return SlotMemory(max_slots=max_slots, max_cells=max_cells, kernel=kernel, shares_prefixes=shares_prefixes)

    return build


def cells(num_tokens: int, fill: float = 1.0) -> KeysAndValues:
    shape = (HEADS, num_tokens, SIZE)
    return [(torch.full(shape, fill), torch.full(shape, -fill)) for _ in range(2)]


def prefix_of(num_tokens: int, fill: float = 1.0) -> Prefix:
    return Prefix(None, cells(num_tokens, fill), torch.zeros(1))


def enter(memory: SlotMemory, num_tokens: int, *, fill: float = 1.0, prefix: Prefix | None = None) -> Slot | None:
    """A row of so many tokens, half of them the answer's."""
    num_new_tokens = num_tokens // 2
    return memory.enter(cells(num_tokens - num_new_tokens, fill), prefix, num_new_tokens)


def filled(slot: Slot) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [H, S, D] of a slot in each layer."""
    pool = slot.pool
    both = zip(map(pool.by_cell, pool.keys), pool.values, strict=True)
    return [(whole(keys_KNHSD, slot.index), whole(values_KNHSD, slot.index)) for keys_KNHSD, values_KNHSD in both]


def whole(cells_KNHSD: torch.Tensor, index: int) -> torch.Tensor:
    """The cells of a slot [H, S, D], one block behind the other."""
    return torch.cat(list(cells_KNHSD[:, index]), 1)


def test_one_long_row_does_not_size_all_slots(memory_of: MemoryOf) -> None:
    memory = memory_of(max_slots=16, max_cells=100_000)
    rows = [enter(memory, num_tokens) for num_tokens in [3000] + [60] * 15]
    assert all(rows)
    assert memory.num_cells <= 4 * 3072 + 16 * 64
    assert enter(memory, 10) is None  # all slots are taken


def test_no_slot_is_more_than_half_empty(memory_of: MemoryOf) -> None:
    for num_tokens in (33, 64, 65, 97, 129, 1000, 4097, 70_000, 3_000_000):
        slot = memory_of(max_cells=10_000_000).enter(cells(2), None, num_tokens - 2)
        assert slot is not None and num_tokens <= slot.pool.num_cells < max(65, 1.5 * num_tokens)


def test_room_is_kept_and_a_row_larger_than_all_of_it_stands_alone(memory_of: MemoryOf) -> None:
    memory = memory_of(max_cells=256)
    first = enter(memory, 1000)
    assert first is not None
    assert enter(memory, 10) is None
    memory.release(first)
    few = [enter(memory, 64) for _ in range(5)]
    assert [slot is not None for slot in few] == [True] * 4 + [False]
    assert memory.num_cells <= 256  # the idle pool of the long row has made room


def test_growing_keeps_what_is_there_and_new_cells_are_zero(memory_of: MemoryOf) -> None:
    memory = memory_of(max_slots=32)
    slots = []
    for number in range(20):
        slot = memory.enter(cells(8, number + 1.0), None, 42)
        assert slot is not None and slot.num_tokens == 8
        slots.append(slot)
    assert len({slot.index for slot in slots}) == 20
    for number, slot in enumerate(slots):
        for keys_HSD, values_HSD in filled(slot):
            assert (keys_HSD[:, :8] == number + 1).all()
            assert (values_HSD[:, :8] == -number - 1).all()
            assert not keys_HSD[:, 8:].any()


def test_rows_longer_than_a_block_lie_in_several(memory_of: MemoryOf, kernel: Kernel) -> None:
    memory = memory_of(max_cells=100_000)
    for num_tokens in (127, 128, 129, 300, 1000):
        keys, values = torch.randn(2, HEADS, num_tokens, SIZE)
        slot = memory.enter([(keys, values)], prefix_of(200), 50) if num_tokens < 1000 else None
        slot = slot or memory.enter([(keys, values)], None, 50)
        assert slot is not None
        assert (slot.pool.num_blocks > 1) is kernel.in_blocks
        first = slot.num_tokens - num_tokens
        [(keys_HSD, values_HSD)] = filled(slot)[:1]
        assert torch.equal(keys_HSD[:, first : slot.num_tokens], keys)
        assert torch.equal(values_HSD[:, first : slot.num_tokens], values)
        assert not keys_HSD[:, slot.num_tokens :].any() and (keys_HSD[:, :first] == 1).all()
        assert keys_HSD.shape[1] >= slot.num_tokens + 50


def test_a_step_writes_one_cell_of_each_row(memory_of: MemoryOf) -> None:
    memory = memory_of(max_slots=4, max_cells=100_000)
    slots = [memory.enter(cells(num_tokens), None, 200) for num_tokens in (100, 127, 128, 140)]
    rows = sorted((slot for slot in slots if slot), key=lambda slot: (slot.pool.num_cells, slot.index))
    assert len(rows) == 4 and memory.cache is not None
    memory.arrange(rows, torch.tensor([slot.num_tokens for slot in rows]))
    memory.begin_step(rows)
    keys, values = torch.randn(2, 4, HEADS, 1, SIZE)
    memory.cache.layers[1].update(keys, values)
    for row, slot in enumerate(rows):
        (before_HSD, _), (keys_HSD, values_HSD) = filled(slot)
        assert torch.equal(keys_HSD[:, slot.num_tokens], keys[row, :, 0])
        assert torch.equal(values_HSD[:, slot.num_tokens], values[row, :, 0])
        keys_HSD[:, slot.num_tokens] = 0
        assert torch.equal(before_HSD, keys_HSD)  # of the other layer


def test_a_wiped_slot_holds_nothing(memory_of: MemoryOf) -> None:
    memory = memory_of()
    slot = enter(memory, 20, fill=float("nan"))
    assert slot is not None
    memory.release(slot, wipe=True)
    assert not any(tensor.any() for layer in filled(slot) for tensor in layer)


def test_other_storage_has_another_generation(memory_of: MemoryOf) -> None:
    """Recorded steps go by it: they know the storage by its address."""
    memory = memory_of(max_slots=32)
    seen: dict[int, list[int]] = {}
    for _ in range(20):
        slot = enter(memory, 50)
        assert slot is not None
        addresses = [tensor.data_ptr() for tensor in (*slot.pool.keys, *slot.pool.values)]
        assert seen.setdefault(slot.pool.generation, addresses) == addresses
    assert len(seen) > 2
    other = enter(memory_of(), 50)
    assert other is not None and other.pool.generation not in seen


# Prefixes ------------------------------------------------------------------------------------------------------------


def test_a_row_of_its_own_has_its_prefix_before_the_rest(memory_of: MemoryOf) -> None:
    slot = enter(memory_of(), 20, fill=2.0, prefix=prefix_of(100, 1.0))
    assert slot is not None and slot.prefix is None and slot.num_tokens == 110
    for keys_HSD, _ in filled(slot):
        assert keys_HSD[0, :, 0].tolist() == [1.0] * 100 + [2.0] * 10 + [0.0] * (slot.pool.num_cells - 110)


def test_rows_of_one_prefix_have_it_once_and_as_long_as_there_is_one_of_them(memory_of: MemoryOf) -> None:
    memory = memory_of(shares_prefixes=True)
    prefix, other = prefix_of(100, 1.0), prefix_of(100, 3.0)
    rows = [enter(memory, 20, fill=2.0, prefix=one) for one in (prefix, prefix, prefix, other)]
    assert len(rows) == 4
    slots = [slot for slot in rows if slot is not None and slot.prefix is not None]
    assert len(slots) == 4
    assert memory.num_cells == 4 * 64 + 4 * 128 and {slot.num_tokens for slot in slots} == {10}
    held = slots[0].prefix
    assert held is not None and slots[1].prefix is slots[2].prefix is held
    assert slots[3].prefix is not None and slots[3].prefix.index != held.index and slots[3].prefix.pool is held.pool
    for slot, fill in ((slots[0], 1.0), (slots[3], 3.0)):
        assert slot.prefix is not None
        for keys in slot.prefix.pool.keys:
            assert (
                whole(slot.prefix.pool.by_cell(keys), slot.prefix.index)[0, :, 0].tolist() == [fill] * 100 + [0.0] * 28
            )
    for slot in slots[:2]:
        memory.release(slot)
        assert held.pool.num_live == 2
    memory.release(slots[2])
    assert held.pool.num_live == 1
    again = enter(memory, 20, prefix=prefix)
    assert again is not None and again.prefix is not held and held.pool.num_live == 2


def test_what_is_not_finite_in_a_prefix_goes_with_its_last_row(memory_of: MemoryOf) -> None:
    memory = memory_of(shares_prefixes=True)
    prefix = prefix_of(100, float("nan"))
    first, second = enter(memory, 20, prefix=prefix), enter(memory, 20, prefix=prefix)
    assert first is not None and second is not None and first.prefix is not None
    keys_KNHSD = first.prefix.pool.by_cell(first.prefix.pool.keys[0])
    memory.release(first, wipe=True)
    assert whole(keys_KNHSD, first.prefix.index).isnan().any()  # the other row's answer is as wrong with it as without
    memory.release(second)
    assert not keys_KNHSD.any()


def test_prefixes_count_as_what_the_slots_hold(memory_of: MemoryOf) -> None:
    memory = memory_of(max_cells=64 * 4 + 128, shares_prefixes=True)
    prefix = prefix_of(100)
    first = enter(memory, 20, prefix=prefix)
    assert first is not None and memory.num_cells == 64 * 4 + 128
    assert enter(memory, 20, prefix=prefix_of(100)) is None  # no room for another prefix
    rows = [enter(memory, 20, prefix=prefix) for _ in range(4)]
    assert [slot is not None for slot in rows] == [True] * 3 + [False]
    for slot in (first, *rows):
        if slot is not None:
            memory.release(slot)
    assert not any(pool.num_live for pool in memory._prefix_pools.values())
    assert memory.num_live == 0 and enter(memory, 370) is not None
    assert memory.num_cells == 384  # idle pools have made room, those of prefixes, too


def test_a_row_for_which_there_is_no_room_leaves_its_prefix_behind(memory_of: MemoryOf) -> None:
    memory = memory_of(max_cells=128, shares_prefixes=True)
    alone = enter(memory, 20, prefix=prefix_of(1000))
    assert alone is not None  # larger than all the memory, and alone
    memory.release(alone)
    other = enter(memory, 20)
    assert other is not None
    assert enter(memory, 90, prefix=prefix_of(20)) is None
    assert memory._prefixes == {}


def test_a_device_that_fails_on_the_way_leaves_nothing_held(
    memory_of: MemoryOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memory_of(shares_prefixes=True)
    prefix = prefix_of(100)
    for failing, time in (("write", 1), ("write", 2), ("grow", 1), ("grow", 2)):
        original, calls = getattr(Pool, failing), []

        def full(self: Pool, *args: object, original=original, calls=calls, time=time) -> object:  # type: ignore[no-untyped-def]
            calls.append(1)
            if len(calls) == time:
                raise torch.OutOfMemoryError("no room for 256 MiB")
            return original(self, *args)

        memory = memory_of(shares_prefixes=True)
        monkeypatch.setattr(Pool, failing, full)
        with pytest.raises(torch.OutOfMemoryError):
            enter(memory, 20, prefix=prefix)
        assert len(calls) == time
        monkeypatch.undo()
        assert memory.num_live == 0 and memory._prefixes == {}
        assert not any(pool.num_live for pool in memory._prefix_pools.values())
        assert enter(memory, 20, prefix=prefix) is not None
