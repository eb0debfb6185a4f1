"""Kernels of decode steps: one new token in each slot looks at what its slot holds. No padding, no repeated heads.

`matmul` and `embedding_bag` compute products in two ways, with a softmax in float32 (decode_products.py). `sdpa` is
torch's fused kernel with a mask; on CPUs it is made for long queries and may take several times as long for one query
in bfloat16. `flash` is the FlashAttention that comes with torch, on CUDA in half precision: it is told how long each
row is and reads no further. Which is the fastest is tried (`fastest`).

Shapes: B rows, H heads of keys and values, G of queries that share one, T queries, N slots, K blocks of S cells each, L
cells that are looked at, D of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from pipeline.vlm.failure import raise_fatal
from pipeline.vlm.slots.decode_products import Bags, Matmul, Part, attend, attend_to_part
from pipeline.vlm.slots.pool import Pool
from pipeline.vlm.slots.race import best_seconds
from pipeline.vlm.slots.share import PrefixShare, Share

log = logging.getLogger(__name__)

_TRIED_BYTES = 1 << 28  # of keys, and as much of values
_COLD_BYTES, _MAX_LAYERS = 64 << 20, 16  # of keys, more than most caches hold: a step reads each layer from memory

# What varlen_attn calls; its own argument for the rows' lengths came after torch 2.11.
_flash_forward = torch.ops.aten._flash_attention_forward

# query [N, H, G, D], keys and values as they lie in a pool, the rows, sliding window, scale, softcap -> [N, H, G, D]
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Share, int | None, float, float | None],
    torch.Tensor,
]
# query [N, H, T, D], keys and values as they lie, the rows or their prefixes, scale -> [N, H, T, D] and [N, H, T]
AttendToPart = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Share | PrefixShare, float], Part]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to attend.

    in_blocks: whether it reads pools in blocks; others read pools of one block.
    attend_to_part: the same over a part of what rows look at, without window or softcap; None where there is none.
    """

    name: str
    attend: Attend
    in_blocks: bool = False
    attend_to_part: AttendToPart | None = None


def kernels(device: torch.device) -> dict[str, Kernel]:
    """All that there are for a device, by name."""
    if device.type == "cpu":
        found = [
            Kernel(
                name,
                partial(attend, products=products),
                in_blocks=True,
                attend_to_part=partial(attend_to_part, products=products),
            )
            for name, products in (("matmul", Matmul()), ("embedding_bag", Bags()))
        ]
        found += [Kernel("sdpa", sdpa, attend_to_part=sdpa_part)]
    else:
        found = [Kernel("matmul", matmul), Kernel("sdpa", sdpa)]
        found += [Kernel("flash", flash)] * (device.type == "cuda")
    return {kernel.name: kernel for kernel in found}


matmul = partial(attend, products=Matmul())


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
    layers: dict[bool, list[list[torch.Tensor]]] = {}  # by whether in blocks: kernels of one kind read the same memory
    for kernel in kernels(device).values():
        pool = Pool(2 * num_cells, in_blocks=kernel.in_blocks)  # half full
        if kernel.in_blocks not in layers:
            layers[kernel.in_blocks] = [
                [tensor.fill_(1) for tensor in pool.storage(like_HTD, like_HTD, num_rows)] for _ in range(num_layers)
            ]
        share = _full(pool, num_rows, num_cells, device)
        calls[kernel.name] = partial(_finished, kernel.attend, query, layers[kernel.in_blocks], share)
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


def _finished(attend: Attend, query: torch.Tensor, layers: Sequence[Sequence[torch.Tensor]], share: Share) -> None:
    for keys, values in layers:
        attend(query, keys, values, share, None, query.shape[-1] ** -0.5, None)
    if query.is_cuda:
        torch.cuda.synchronize(query.device)


def _full(pool: Pool, num_rows: int, num_cells: int, device: torch.device) -> Share:
    """So many rows that have each filled so many cells."""
    index = torch.arange(num_rows, device=device)
    return Share(pool, 0, num_rows, index, num_rows, torch.full_like(index, num_cells - 1), num_cells)
