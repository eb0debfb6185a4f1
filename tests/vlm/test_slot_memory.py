"""The memory of slots: capacities in classes, room that is kept, storage that grows with what is in it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pipeline.vlm.slots.memory import SlotMemory

HEADS, SIZE = 2, 4


def layers(num_tokens: int, rows: int = 1, fill: float = 1.0) -> list[SimpleNamespace]:
    shape = (rows, HEADS, num_tokens, SIZE)
    return [SimpleNamespace(keys=torch.full(shape, fill), values=torch.full(shape, -fill)) for _ in range(2)]


def memory_of(*, max_slots: int = 8, max_cells: int = 10_000) -> SlotMemory:
    return SlotMemory(max_slots=max_slots, max_cells=max_cells, kernel=None)


def test_one_long_row_does_not_size_all_slots() -> None:
    memory = memory_of(max_slots=16, max_cells=100_000)
    rows = [memory.reserve(num_tokens) for num_tokens in [3000] + [60] * 15]
    assert all(rows)
    assert memory.num_cells <= 4 * 3072 + 16 * 64
    assert memory.reserve(10) is None  # all slots are taken


def test_no_slot_is_more_than_half_empty() -> None:
    for num_tokens in (33, 64, 65, 97, 129, 1000, 4097, 70_000, 3_000_000):
        slot = memory_of(max_cells=10_000_000).reserve(num_tokens)
        assert slot is not None and num_tokens <= slot.pool.num_cells < max(65, 1.5 * num_tokens)


def test_room_is_kept_and_a_row_larger_than_all_of_it_stands_alone() -> None:
    memory = memory_of(max_cells=256)
    first = memory.reserve(1000)
    assert first is not None
    assert memory.reserve(10) is None
    memory.release(first)
    few = [memory.reserve(64) for _ in range(5)]
    assert [slot is not None for slot in few] == [True] * 4 + [False]
    assert memory.num_cells <= 256  # the idle pool of the long row has made room


def test_growing_keeps_what_is_there_and_new_cells_are_zero() -> None:
    memory = memory_of(max_slots=32)
    slots = []
    for number in range(20):
        slot = memory.reserve(50)
        assert slot is not None
        memory.insert(slot, layers(10, fill=number + 1.0), 0, [(2, 10)])
        slots.append(slot)
    assert len({slot.index for slot in slots}) == 20
    for number, slot in enumerate(slots):
        for keys_NHSD, values_NHSD in zip(slot.pool.keys_NHSD, slot.pool.values_NHSD, strict=True):
            assert (keys_NHSD[slot.index, :, :8] == number + 1).all()
            assert (values_NHSD[slot.index, :, :8] == -number - 1).all()
            assert not keys_NHSD[slot.index, :, 8:].any()


def test_parts_of_a_prompt_are_laid_end_to_end() -> None:
    memory = memory_of()
    slot = memory.reserve(50)
    assert slot is not None
    found = layers(10)
    found[0].keys[0, :, :, 0] = torch.arange(10.0)
    memory.insert(slot, found, 0, [(1, 4), (7, 10)])
    assert slot.num_tokens == 6
    assert slot.pool.keys_NHSD[0][slot.index, 0, :6, 0].tolist() == [1, 2, 3, 7, 8, 9]


def test_a_wiped_slot_holds_nothing() -> None:
    memory = memory_of()
    slot = memory.reserve(50)
    assert slot is not None
    memory.insert(slot, layers(10, fill=float("nan")), 0, [(0, 10)])
    memory.release(slot, wipe=True)
    assert not any(tensor.any() for tensor in (*slot.pool.keys_NHSD, *slot.pool.values_NHSD))


def test_other_storage_has_another_generation() -> None:
    """Recorded steps go by it: they know the storage by its address."""
    memory = memory_of(max_slots=32)
    seen: dict[int, list[int]] = {}
    for _ in range(20):
        slot = memory.reserve(50)
        assert slot is not None
        memory.insert(slot, layers(10), 0, [(0, 10)])
        addresses = [tensor.data_ptr() for tensor in (*slot.pool.keys_NHSD, *slot.pool.values_NHSD)]
        assert seen.setdefault(slot.pool.generation, addresses) == addresses
    assert len(seen) > 2
    other = memory_of().reserve(50)
    assert other is not None and other.pool.generation not in seen
