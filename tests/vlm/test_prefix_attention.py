"""Rows that read one copy of what they begin with: each gets what it would get with a copy of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_begun_rows import questions
from test_slots_engine import answers_of, engines_of, failing, many, tried  # noqa: F401

from pipeline.vlm.options import DecodeAttention
from pipeline.vlm.slots import attention, decode_kernel, prefix_attention, speedups
from pipeline.vlm.slots.decode_kernel import Kernel, by_pool, kernels
from pipeline.vlm.slots.loop import SlotLoop
from pipeline.vlm.slots.memory import Slot, SlotMemory
from pipeline.vlm.slots.prefix import Prefix

HEADS, SIZE = 2, 8
# Of each row: which prefix it has, how many tokens come after it, and room for how many more.
ROWS = ((0, 5, 9), (None, 70, 9), (1, 1, 9), (0, 3, 80), (0, 8, 9), (2, 4, 9), (None, 6, 9), (1, 60, 80))
# Cells: two of one pool and of different lengths, one of another and longer than torch's kernel takes at a time.
PREFIXES = (40, 23, 700)


def memory_of_rows(
    leaving: tuple[int, ...], dtype: torch.dtype, kernel: Kernel
) -> tuple[SlotMemory, list[Slot], list[Any]]:
    """A memory, the slots of its rows as a loop would order them, and each row's keys and values [H, T, D]."""

    def drawn(num_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        keys, values = torch.randn(2, HEADS, num_tokens, SIZE).to(dtype)
        return [(keys, values)]

    memory = SlotMemory(max_slots=16, max_cells=100_000, kernel=kernel, shares_prefixes=True)
    prefixes = [Prefix(None, drawn(num_tokens), torch.zeros(1)) for num_tokens in PREFIXES]
    entered = []
    for which, num_tokens, num_new_tokens in ROWS:
        prefix, rest = None if which is None else prefixes[which], drawn(num_tokens)
        slot = memory.enter(rest, prefix, num_new_tokens)
        assert slot is not None
        slot.num_tokens -= 1  # a step has just written its last token
        parts = rest if prefix is None else [prefix.layers[0], rest[0]]
        whole = [torch.cat([part[kind] for part in parts], 1) for kind in (0, 1)]
        entered.append((slot, whole))
    for row in leaving:
        memory.release(entered[row][0])
    staying = [one for row, one in enumerate(entered) if row not in leaving]
    staying.sort(key=lambda one: (one[0].pool.num_cells, one[0].index))
    slots = [slot for slot, _ in staying]
    memory.arrange(slots, torch.tensor([slot.num_tokens for slot in slots]))
    memory.begin_step(slots)
    return memory, slots, [whole for _, whole in staying]


@pytest.fixture(params=["matmul", "embedding_bag", "sdpa"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return kernels(torch.device("cpu"))[request.param]


def attended(memory: SlotMemory, query_BHGD: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    assert memory.cache is not None
    return kernel.attend(query_BHGD, memory.step, memory.cache.layers[0].stored, None, 0.3, None)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("leaving", [(), (1, 6), (0, 3, 4), (0,), (2, 5, 7)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_each_row_attends_to_its_prefix_and_its_own_cells(
    group: int, leaving: tuple[int, ...], dtype: torch.dtype, bound: float, kernel: Kernel
) -> None:
    torch.manual_seed(0)
    memory, slots, wholes = memory_of_rows(leaving, dtype, kernel)
    query_BHGD = torch.randn(len(slots), HEADS, group, SIZE).to(dtype)
    found_BHGD = attended(memory, query_BHGD, kernel)
    assert found_BHGD.shape == query_BHGD.shape and found_BHGD.dtype == dtype
    for row, (keys_HTD, values_HTD) in enumerate(wholes):
        scores_HGT = 0.3 * query_BHGD[row].float() @ keys_HTD.float().transpose(-1, -2)
        wanted_HGD = torch.softmax(scores_HGT, -1) @ values_HTD.float()
        torch.testing.assert_close(found_BHGD[row].float(), wanted_HGD, rtol=bound, atol=bound)


def test_what_is_infinite_in_one_familys_row_stays_there(kernel: Kernel) -> None:
    torch.manual_seed(0)
    memory, slots, _ = memory_of_rows((), torch.float32, kernel)
    query_BHGD = torch.randn(len(slots), HEADS, 1, SIZE)
    before = attended(memory, query_BHGD, kernel)
    slots[0].pool.by_cell(slots[0].pool.keys[0][0, slots[0].index])[:, 0] = torch.nan
    after = attended(memory, query_BHGD, kernel)
    assert after[0].isnan().all() and torch.equal(after[1:], before[1:])


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each decode step, how many rows look at a shared prefix."""
    found: list[int] = []
    step = SlotLoop.step

    def watching(self: SlotLoop) -> None:
        found.append(sum(len(share.row_P) for share in self._memory.step.prefix_shares))
        step(self)

    monkeypatch.setattr(SlotLoop, "step", watching)
    return found


def test_questions_about_one_picture_read_one_copy_of_it(families: list[int]) -> None:
    slots, static = engines_of(num_slots=4)
    given = [*questions(7), *many(count=9)]
    assert answers_of(slots, given) == answers_of(static, given)
    assert max(families) == 4 and 0 in families
    memory = slots.fit._memory
    assert memory is not None and memory.shares_prefixes and not memory._prefixes


def test_rows_taken_out_of_memory_leave_no_prefix_behind(failing: Any) -> None:  # noqa: F811
    slots, static = engines_of(num_slots=8)
    given = questions(20)
    wanted = answers_of(static, given)
    tried(slots, given)
    calls: list[int] = []

    def check(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    failing(SlotLoop, "step", check)
    assert answers_of(slots, given) == wanted
    assert slots.counts.num_out_of_memory == 1
    memory = slots.fit._memory
    assert memory is not None and memory.num_live == 0 and not memory._prefixes


@pytest.mark.parametrize("problem", ["it raises", "it is wrong"])
def test_where_it_does_not_fit_each_row_has_a_prefix_of_its_own(
    problem: str, families: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed = prefix_attention._weighed

    def bad(*parts: torch.Tensor) -> torch.Tensor:
        if problem == "it raises":
            raise RuntimeError("no such kernel")
        return 1.1 * weighed(*parts)

    monkeypatch.setattr(prefix_attention, "_weighed", bad)
    slots, static = engines_of()
    given = questions(7)
    assert answers_of(slots, given) == answers_of(static, given)
    assert max(families) > 0 and not any(families[-8:])  # in the trial, and no more
    assert slots.fit._shares is True and slots.fit._memory is not None and not slots.fit._memory.shares_prefixes


@pytest.mark.parametrize("by", ["request", "trial"])
@pytest.mark.parametrize("name", ["matmul", "embedding_bag", "sdpa", "flash"])
def test_kernels_that_give_no_sums_read_each_rows_own_copy(
    name: str, by: str, families: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = Kernel("flash", by_pool(decode_kernel.sdpa))
    monkeypatch.setattr(speedups, "kernels", lambda device: kernels(device) | {"flash": flash})
    options: dict[str, Any] = {}
    if by == "trial":
        monkeypatch.setattr(speedups, "fastest", lambda *args, **kwargs: name)
    else:
        options["decode_attention"] = DecodeAttention(name)
    slots, static = engines_of(**options)
    given = questions(7)
    assert answers_of(slots, given) == answers_of(static, given)
    assert slots.numerics["decode_attention"] == name and slots.fit._shares
    assert bool(max(families)) is (name != "flash")


@pytest.mark.parametrize("kind", [{"sliding_window": 5}, {"softcap": 2.0}])
def test_attention_of_another_kind_is_refused(kind: dict[str, Any], kernel: Kernel) -> None:
    memory, slots, _ = memory_of_rows((), torch.float32, kernel)
    assert memory.cache is not None
    key = torch.zeros(len(slots), HEADS, 1, SIZE)
    key.slot_layer = memory.cache.layers[0]  # type: ignore[attr-defined]
    query = torch.zeros(len(slots), HEADS, 1, SIZE)
    attention.attend(SimpleNamespace(), query, key, key, None, scaling=0.3)
    with pytest.raises(NotImplementedError, match="a window or a softcap"):
        attention.attend(SimpleNamespace(), query, key, key, None, scaling=0.3, **kind)
