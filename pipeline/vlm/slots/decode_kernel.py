"""Kernels of decode steps: one new token in each slot looks at what its slot holds. No padding, no repeated heads.

`matmul` are matrix products (decode_products.py), `embedding_bag` weighted sums of vectors (row_attention.py). `sdpa`
is torch's fused kernel with a mask; on CPUs it is made for long queries and may take several times as long for one
query in bfloat16. `flash` is the FlashAttention that comes with torch, on CUDA in half precision: it is told how long
each row is and reads no further. Which is the fastest is tried (`fastest`).

Shapes: B rows, H heads of keys and values, G of queries that share one, T queries, N slots, K blocks of S cells each, D
of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from pipeline.vlm.failure import raise_fatal
from pipeline.vlm.slots import row_attention
from pipeline.vlm.slots.decode_products import Part, matmul, matmul_part
from pipeline.vlm.slots.pool import Pool
from pipeline.vlm.slots.prefix_attention import AttendToPart, attend_to_both
from pipeline.vlm.slots.race import best_seconds
from pipeline.vlm.slots.share import PrefixShare, Share
from pipeline.vlm.slots.step import Step, Stored

log = logging.getLogger(__name__)

_TRIED_BYTES = 1 << 28  # of keys, and as much of values
_COLD_BYTES, _MAX_LAYERS = 64 << 20, 16  # of keys, more than most caches hold: a step reads each layer from memory

# What varlen_attn calls; its own argument for the rows' lengths came after torch 2.11.
_flash_forward = torch.ops.aten._flash_attention_forward

# query [B, H, G, D], the step, a layer's keys and values by share, sliding window, scale, softcap -> [B, H, G, D]
Attend = Callable[[torch.Tensor, Step, Stored, int | None, float, float | None], torch.Tensor]
# query [N, H, G, D] of the slots of one pool, keys and values as they lie there, its share, and the same rest
AttendToSlots = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Share, int | None, float, float | None], torch.Tensor
]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to attend.

    in_blocks: whether it reads pools in blocks; others read pools of one block.
    shares_prefixes: whether rows may look at one copy of their prefix, where there is neither window nor softcap.
    """

    name: str
    attend: Attend
    in_blocks: bool = False
    shares_prefixes: bool = False


def kernels(device: torch.device) -> dict[str, Kernel]:
    """All that there are for a device, by name."""
    if device.type == "cpu":
        found = [
            Kernel("matmul", by_pool(matmul, matmul_part), in_blocks=True, shares_prefixes=True),
            Kernel("embedding_bag", row_attention.attend, in_blocks=True, shares_prefixes=True),
            Kernel("sdpa", by_pool(sdpa, sdpa_part), shares_prefixes=True),
        ]
    else:
        found = [Kernel("matmul", by_pool(matmul)), Kernel("sdpa", by_pool(sdpa))]
        found += [Kernel("flash", by_pool(flash))] * (device.type == "cuda")
    return {kernel.name: kernel for kernel in found}


def by_pool(attend: AttendToSlots, part: AttendToPart | None = None) -> Attend:
    """All rows by what attends to the slots of one pool. part: the same over a part of what rows look at."""

    def attend_to_all(
        query_BHGD: torch.Tensor, step: Step, stored: Stored, window: int | None, scale: float, softcap: float | None
    ) -> torch.Tensor:
        if step.prefix_shares:
            assert part is not None
            return attend_to_both(query_BHGD, step, stored, scale, part)
        found = [
            share.by_row(attend(share.by_slot(query_BHGD), *stored(share), share, window, scale, softcap))
            for share in step.shares
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    return attend_to_all


def sdpa(
    query_NHGD: torch.Tensor,
    keys_KNHSD: torch.Tensor,
    values_KNHSD: torch.Tensor,
    share: Share,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """torch's fused kernel over the cells of the longest row, on any device."""
    if softcap is not None:
        return matmul(query_NHGD, keys_KNHSD, values_KNHSD, share, window, scale, softcap)
    keys_NHSD, values_NHSD = (cells_KNHSD[0, :, :, : share.num_cells] for cells_KNHSD in (keys_KNHSD, values_KNHSD))
    return functional.scaled_dot_product_attention(
        query_NHGD, keys_NHSD, values_NHSD, attn_mask=~share.mask(window), scale=scale
    )


def sdpa_part(
    query_NHTD: torch.Tensor,
    keys_KNHSD: torch.Tensor,
    values_KNHSD: torch.Tensor,
    share: Share | PrefixShare,
    scale: float,
) -> Part:
    """What scaled_dot_product_attention calls on a CPU, which keeps the sums to itself.

    Raises:
        AttributeError, RuntimeError: this torch, or the device, has no such kernel.
    """
    keys_NHSD, values_NHSD = (cells_KNHSD[0, :, :, : share.num_cells] for cells_KNHSD in (keys_KNHSD, values_KNHSD))
    found: Part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_NHTD, keys_NHSD, values_NHSD, 0.0, False, attn_mask=share.added_mask(query_NHTD.dtype), scale=scale
    )
    return found


def flash(
    query_NHGD: torch.Tensor,
    keys_KNHSD: torch.Tensor,
    values_KNHSD: torch.Tensor,
    share: Share,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """FlashAttention (Dao, 2023) over the cells that each row has filled; slots lie behind each other as sequences.

    Raises:
        RuntimeError: the device, the dtype or the size of a head is none that it knows.
    """
    if softcap is not None:
        return matmul(query_NHGD, keys_KNHSD, values_KNHSD, share, window, scale, softcap)
    [keys_NHSD], [values_NHSD] = keys_KNHSD, values_KNHSD
    num_slots, num_kv_heads, num_cells, width = keys_NHSD.shape
    starts = share.starts()
    # No copies where the memory is token by token, as it is on CUDA (pool.py).
    keys_THD, values_THD = (
        tensor_NHSD.transpose(1, 2).reshape(num_slots * num_cells, num_kv_heads, width)
        for tensor_NHSD in (keys_NHSD, values_NHSD)
    )
    found_NQD: torch.Tensor = _flash_forward(
        query_NHGD.reshape(num_slots, -1, width),
        keys_THD,
        values_THD,
        starts,
        starts * num_cells,
        1,
        num_cells,
        0.0,  # dropout
        False,  # one query sees all of its row
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=share.used_N(),
    )[0]
    return found_NQD.view(query_NHGD.shape)


def fastest(like_HTD: torch.Tensor, *, num_rows: int, num_heads: int, num_cells: int) -> str:
    """The name of the kernel that is fastest here, by the fastest of some calls of each.

    In float32 it is always `sdpa`: kernels differ in the last bits, another start may find another one the fastest, and
    who computes in float32 wants the same answers from both.

    Args:
        like_HTD: keys of the model.
        num_rows, num_cells: slots that are all taken, and how much each has filled.
        num_heads: of queries.

    Raises:
        RuntimeError: none works; what the last one said.
    """
    if like_HTD.dtype == torch.float32:
        return "sdpa"
    device, num_kv_heads, width = like_HTD.device, like_HTD.shape[0], like_HTD.shape[2]
    row_bytes = 2 * num_cells * num_kv_heads * width * like_HTD.element_size()
    num_rows = max(1, min(num_rows, _TRIED_BYTES // row_bytes))
    num_layers = max(1, min(_MAX_LAYERS, 2 * _COLD_BYTES // (num_rows * row_bytes)))
    query = like_HTD.new_ones(num_rows, num_kv_heads, max(1, num_heads // num_kv_heads), width)
    calls: dict[str, Callable[[], None]] = {}
    # By whether in blocks: kernels of one kind read the same memory.
    layers: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for kernel in kernels(device).values():
        pool = Pool(2 * num_cells, in_blocks=kernel.in_blocks)  # half full
        if kernel.in_blocks not in layers:
            layers[kernel.in_blocks] = [_filled(pool, like_HTD, num_rows) for _ in range(num_layers)]
        step = _full(pool, num_rows, num_cells, device)
        calls[kernel.name] = partial(_finished, kernel.attend, query, layers[kernel.in_blocks], step)
    for name, call in list(calls.items()):
        try:
            call()
        except RuntimeError as problem:
            raise_fatal(problem)
            log.info("slots: %s attention is not for this model: %s", name, str(problem).split("\n")[0])
            del calls[name]
            if not calls:
                raise
    seconds = best_seconds(calls)
    return min(seconds, key=lambda name: seconds[name])


def _finished(
    attend: Attend, query: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], step: Step
) -> None:
    for both in layers:
        attend(query, step, partial(_as_stored, both), None, query.shape[-1] ** -0.5, None)
    if query.is_cuda:
        torch.cuda.synchronize(query.device)


def _filled(pool: Pool, like_HTD: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = pool.storage(like_HTD, like_HTD, num_rows)
    return keys.fill_(1), values.fill_(1)


def _as_stored(both: tuple[torch.Tensor, torch.Tensor], _: Share | PrefixShare) -> tuple[torch.Tensor, torch.Tensor]:
    return both


def _full(pool: Pool, num_rows: int, num_cells: int, device: torch.device) -> Step:
    """So many rows that have each filled so many cells."""
    index = torch.arange(num_rows, device=device)
    return Step([Share(pool, 0, num_rows, index, num_rows, torch.full_like(index, num_cells - 1), num_cells)])
