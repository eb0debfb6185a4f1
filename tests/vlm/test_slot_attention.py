"""Attention of decode steps: every kernel gives what each row alone would get, over any memory."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_slots_engine import answers_of, engines_of, many

from pipeline.errors import UsageError
from pipeline.vlm.options import DecodeAttention
from pipeline.vlm.slots import attention, decode_kernel, pool, speedups
from pipeline.vlm.slots.decode_kernel import Kernel, by_pool, kernels
from pipeline.vlm.slots.pool import Pool
from pipeline.vlm.slots.share import Share
from pipeline.vlm.slots.step import Step

HEADS, CELLS, SIZE = 2, 24, 8
INDEX, LENGTHS = (0, 2, 3), (6, 1, 20)  # live slots of four, and how many cells each has filled before
CPU = torch.device("cpu")
FLASH = Kernel("flash", by_pool(decode_kernel.flash))


def flash_forward(
    query_NQD: torch.Tensor,
    keys_THD: torch.Tensor,
    values_THD: torch.Tensor,
    start_queries: torch.Tensor,
    start_keys: torch.Tensor,
    max_queries: int,
    max_keys: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int | None,
    window_size_right: int | None,
    seqused_k: torch.Tensor,
) -> tuple[torch.Tensor]:
    """What torch's operator is documented to do with one query a row, which no CPU can run."""
    assert {start_queries.dtype, start_keys.dtype, seqused_k.dtype} == {torch.int32}
    assert start_queries.tolist() == list(range(len(query_NQD) + 1)) and max_queries == 1 and not dropout
    group = query_NQD.shape[1] // keys_THD.shape[1]
    found = []
    for row, query_QD in enumerate(query_NQD):
        first = int(start_keys[row])
        assert int(start_keys[row + 1]) - first == max_keys
        stop = first + int(seqused_k[row])
        if window_size_left is not None:
            assert window_size_right == 0
            first = max(first, stop - 1 - window_size_left)
        keys_HSD, values_HSD = (
            tensor_THD[first:stop].transpose(0, 1).repeat_interleave(group, 0) for tensor_THD in (keys_THD, values_THD)
        )
        shares_QS = torch.softmax((keys_HSD @ query_QD[:, :, None])[:, :, 0] * scale, -1)
        found.append((shares_QS[:, None] @ values_HSD)[:, 0])
    return (torch.stack(found),)


@pytest.fixture(params=[False, True], ids=["head by head", "token by token"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(pool, "_TOKEN_BY_TOKEN", {"cpu"})
    monkeypatch.setattr(decode_kernel, "_flash_forward", flash_forward)
    return bool(request.param)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", ["matmul", "matmul in blocks", "embedding_bag in blocks", "sdpa", "flash"])
def test_each_row_attends_to_its_own_cells(
    name: str,
    group: int,
    window: int | None,
    softcap: float | None,
    layout: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(pool, "_BLOCK_CELLS", 8)
    in_blocks = name.endswith("in blocks")
    slots = Pool(CELLS, in_blocks=in_blocks)
    like = torch.empty(HEADS, 1, SIZE)
    keys, values = (tensor.normal_() for tensor in slots.storage(like, like, 4))
    assert keys.is_contiguous() is (in_blocks or not layout) and len(keys) == (3 if in_blocks else 1)
    share = Share(slots, 0, 3, torch.tensor(INDEX), 4, torch.tensor(LENGTHS), max(LENGTHS) + 1)
    query = torch.randn(3, HEADS, group, SIZE)
    attend = by_pool(decode_kernel.flash) if name == "flash" else kernels(CPU)[name.partition(" ")[0]].attend
    found = attend(query, Step([share]), lambda _: (keys, values), window, 0.3, softcap)
    all_keys, all_values = torch.cat(list(slots.by_cell(keys)), 2), torch.cat(list(values), 2)
    for row, (index, length) in enumerate(zip(INDEX, LENGTHS, strict=True)):
        first = 0 if window is None else max(0, length + 1 - window)
        scores = 0.3 * query[row] @ all_keys[index, :, first : length + 1].transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        wanted = torch.softmax(scores, -1) @ all_values[index, :, first : length + 1]
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)


def test_flash_attention_reads_the_memory_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_TOKEN_BY_TOKEN", {"cpu"})
    seen: list[int] = []

    def watching(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend((keys.data_ptr(), values.data_ptr()))
        return flash_forward(query, keys, values, *args, **kwargs)

    monkeypatch.setattr(decode_kernel, "_flash_forward", watching)
    slots, like = Pool(CELLS), torch.empty(HEADS, 1, SIZE)
    keys, values = (tensor.normal_() for tensor in slots.storage(like, like, 4))
    share = Share(slots, 0, 3, torch.arange(3), 3, torch.tensor(LENGTHS), 21)
    decode_kernel.flash(torch.randn(3, HEADS, 1, SIZE), keys[:, :3], values[:, :3], share, None, 1.0, None)
    assert seen == [keys.data_ptr(), values.data_ptr()]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_answers_by_flash_attention_are_those_of_padded_batches(
    name: str, layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedups, "kernels", lambda device: kernels(device) | {"flash": FLASH})
    monkeypatch.setattr(speedups, "fastest", lambda *args, **kwargs: "flash")
    slots, static = engines_of(name)
    given = many(name)
    assert answers_of(slots, given) == answers_of(static, given)
    assert slots.numerics["decode_attention"] == "flash" and all(slots.fit.verdicts.values())


def changed(monkeypatch: pytest.MonkeyPatch, module: Any, **attends: Any) -> None:
    """Let a module find other functions in these kernels of a CPU."""
    found = {name: replace(kernel, attend=attends.get(name, kernel.attend)) for name, kernel in kernels(CPU).items()}
    monkeypatch.setattr(module, "kernels", lambda device: found)


def test_of_the_kernels_the_fastest_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> torch.Tensor:
        raise RuntimeError("head of 12 dimensions\nand a long story")

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(0.005)
        return matmul(*args)

    like = torch.zeros(HEADS, 1, SIZE, dtype=torch.bfloat16)
    names, matmul = list(kernels(CPU)), by_pool(decode_kernel.matmul)
    for wanted in names:
        for other in (refuses, slow):
            with monkeypatch.context() as patch:
                changed(patch, decode_kernel, **{name: other for name in names if name != wanted})
                assert decode_kernel.fastest(like, num_rows=4, num_heads=HEADS, num_cells=10) == wanted
                found = decode_kernel.fastest(like.float(), num_rows=4, num_heads=HEADS, num_cells=10)
                assert found == "sdpa"  # at every start


@pytest.mark.parametrize("problem", ["it raises", "it is wrong"])
def test_a_kernel_is_tried_on_the_model_before_it_is_used(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*args: Any) -> torch.Tensor:
        if problem == "it raises":
            raise RuntimeError("head of 12 dimensions")
        return right(*args) * 1.1

    right = kernels(CPU)["matmul"].attend
    monkeypatch.setattr(speedups, "fastest", lambda *args, **kwargs: "matmul")
    changed(monkeypatch, speedups, matmul=bad)
    slots, static = engines_of()
    given = many()
    assert answers_of(slots, given) == answers_of(static, given)
    assert slots.numerics["decode_attention"] == "sdpa" and slots.fit._speedups.features is not None


def test_where_no_kernel_is_fit_to_be_timed_the_tried_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise torch.OutOfMemoryError("no room for 256 MiB")

    monkeypatch.setattr(speedups, "fastest", full)
    slots, static = engines_of()
    given = many()
    assert answers_of(slots, given) == answers_of(static, given)
    assert slots.numerics["decode_attention"] == "sdpa" and all(slots.fit.verdicts.values())


def test_the_last_kernel_to_fail_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> torch.Tensor:
        raise RuntimeError("head of 12 dimensions")

    changed(monkeypatch, decode_kernel, **dict.fromkeys(kernels(CPU), refuses))
    with pytest.raises(RuntimeError, match="head of 12 dimensions"):
        decode_kernel.fastest(torch.zeros(HEADS, 1, SIZE).bfloat16(), num_rows=4, num_heads=HEADS, num_cells=10)


def test_a_step_over_blocks_copies_no_keys() -> None:
    """oneDNN's products copy what is not contiguous: neither slots that are free nor cells not yet filled may be."""
    slots, like = Pool(1024, in_blocks=True), torch.empty(HEADS, 1, SIZE)
    keys, values = slots.storage(like, like, 8)
    for blocks, shape in (
        (slots.key_blocks(keys[:, :3], 301), (3, HEADS, SIZE, 128)),
        (slots.value_blocks(values[:, :3], 301), (3, HEADS, 128, SIZE)),
    ):
        assert [tuple(block.shape) for block in blocks] == [shape] * 3
        assert all(block.is_contiguous() for block in blocks)
    assert [block.data_ptr() for block in slots.key_blocks(keys, 301)] == [keys[place].data_ptr() for place in range(3)]


def test_what_a_row_has_not_filled_is_not_read() -> None:
    """By embedding_bag: cells of other rows and of blocks that none has begun may hold anything."""
    torch.manual_seed(0)
    slots, like = Pool(512, in_blocks=True), torch.empty(HEADS, 1, SIZE)
    keys, values = (tensor.normal_() for tensor in slots.storage(like, like, 5))
    share = Share(slots, 0, 3, torch.tensor(INDEX), 4, torch.tensor((6, 200, 20)), 201)
    query = torch.randn(3, HEADS, 1, SIZE)
    attend, step = kernels(CPU)["embedding_bag"].attend, Step([share])
    before = attend(query, step, lambda _: (keys[:, :4], values[:, :4]), None, 0.3, None)
    keys[1, 0], keys[2:], values[1, 0], values[2:], values[0, 0, :, 7:] = [torch.nan] * 5
    step.look_at([201])
    assert torch.equal(before, attend(query, step, lambda _: (keys[:, :4], values[:, :4]), None, 0.3, None))


@pytest.mark.parametrize(("device", "foreign"), [("cpu", "flash"), ("cuda", "embedding_bag"), ("mps", "flash")])
def test_a_kernel_of_another_device_is_refused(device: str, foreign: str) -> None:
    with pytest.raises(UsageError, match=f"decode_attention={foreign} is not for {device}, .* there are .*matmul"):
        attention.check_decode_attention(DecodeAttention(foreign), torch.device(device))
    for kernel in (DecodeAttention.auto, DecodeAttention.matmul, DecodeAttention.sdpa):
        attention.check_decode_attention(kernel, torch.device(device))
