"""Attention of one new token in each slot over what its slot holds: no padding, no repeated heads, no copied cache.

Three kernels. `matmul` are two matrix products and a softmax in float32; heads that share keys and values are the rows
of one product. `sdpa` is torch's fused kernel with a mask; on CPUs it is made for long queries and may take several
times as long for a single one in bfloat16. `flash` is the FlashAttention that comes with torch, on CUDA in half
precision: it is told how long each row is and reads no further. Which is the fastest is tried (`fastest`).

Shapes: B rows, Q heads, G = Q / H of them share keys and values, N slots, S cells of each, D of a head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from pipeline.errors import UsageError
from pipeline.vlm.failure import raise_fatal
from pipeline.vlm.options import DecodeAttention
from pipeline.vlm.slots.pool import Pool
from pipeline.vlm.slots.prefix_attention import attend_to_both
from pipeline.vlm.slots.share import Share

log = logging.getLogger(__name__)

_TRIED_BYTES = 1 << 28  # of keys, and as much of values
NAME = "vlm_batch_slots"  # as transformers knows our attention function

# What varlen_attn calls; its own argument for the rows' lengths came after torch 2.11.
_flash_forward = torch.ops.aten._flash_attention_forward

# query [N, H, G, D], keys and values [N, H, S, D], the rows, sliding window, scale, softcap -> [N, H, G, D]
Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Share, int | None, float, float | None],
    torch.Tensor,
]


def matmul(
    query_NHGD: torch.Tensor,
    keys_NHSD: torch.Tensor,
    values_NHSD: torch.Tensor,
    share: Share,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Two matrix products over the cells of the longest row, the softmax between them in float32."""
    keys_NHSD, values_NHSD = keys_NHSD[:, :, : share.num_cells], values_NHSD[:, :, : share.num_cells]
    scores_NHGS = torch.matmul(query_NHGD * scale, keys_NHSD.transpose(-1, -2))
    if softcap is not None:
        scores_NHGS = softcap * torch.tanh(scores_NHGS / softcap)
    scores_NHGS.masked_fill_(share.mask(window), -torch.inf)
    shares_NHGS = torch.softmax(scores_NHGS, -1, dtype=torch.float32).to(values_NHSD.dtype)
    return torch.matmul(shares_NHGS, values_NHSD)


def sdpa(
    query_NHGD: torch.Tensor,
    keys_NHSD: torch.Tensor,
    values_NHSD: torch.Tensor,
    share: Share,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """torch's fused kernel over the cells of the longest row, on any device."""
    if softcap is not None:
        return matmul(query_NHGD, keys_NHSD, values_NHSD, share, window, scale, softcap)
    return functional.scaled_dot_product_attention(
        query_NHGD,
        keys_NHSD[:, :, : share.num_cells],
        values_NHSD[:, :, : share.num_cells],
        attn_mask=~share.mask(window),
        scale=scale,
    )


def flash(
    query_NHGD: torch.Tensor,
    keys_NHSD: torch.Tensor,
    values_NHSD: torch.Tensor,
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
        return matmul(query_NHGD, keys_NHSD, values_NHSD, share, window, scale, softcap)
    num_slots, num_kv_heads, num_cells, width = keys_NHSD.shape
    starts = share.starts()
    # No copies where the memory is token by token, as it is on CUDA (memory.py).
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


KERNELS: dict[str, Kernel] = {"matmul": matmul, "sdpa": sdpa, "flash": flash}


def attend(
    module: Any,
    query_BQ1D: torch.Tensor,
    key_BH1D: torch.Tensor,
    value_BH1D: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call in a decode step; the result is [B, 1, Q, D].

    Raises:
        NotImplementedError: the model's attention is of a kind that is not computed here.
    """
    layer = getattr(key_BH1D, "slot_layer", None)
    if layer is None or query_BQ1D.shape[2] != 1 or s_aux is not None or position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention that is not of one token over a slot")
    num_heads, num_kv_heads, width = query_BQ1D.shape[1], key_BH1D.shape[1], query_BQ1D.shape[3]
    query_BHGD = query_BQ1D.reshape(-1, num_kv_heads, num_heads // num_kv_heads, width)
    scale = width**-0.5 if scaling is None else scaling
    window = sliding_window or getattr(module, "sliding_window", None)
    if layer.memory.prefix_shares:
        if window is not None or softcap is not None:
            raise NotImplementedError(f"{type(module).__name__}: a window or a softcap over a shared prefix")
        out_BHGD = attend_to_both(layer, query_BHGD, scale)
        return out_BHGD.reshape(len(out_BHGD), 1, num_heads, -1), None
    kernel: Kernel = layer.memory.kernel
    found = []
    for share in layer.memory.shares:
        query_NHGD = query_BHGD[share.start : share.stop]
        if not share.is_dense:
            query_NHGD = query_BHGD.new_zeros(share.num_slots, *query_BHGD.shape[1:])
            query_NHGD[share.index_P] = query_BHGD[share.start : share.stop]
        keys_NHSD, values_NHSD = layer.parts(share)
        out_NHGD = kernel(query_NHGD, keys_NHSD, values_NHSD, share, window, scale, softcap)
        found.append(out_NHGD if share.is_dense else out_NHGD[share.index_P])
    out_BHGD = found[0] if len(found) == 1 else torch.cat(found)
    return out_BHGD.reshape(len(out_BHGD), 1, num_heads, -1), None


AttentionInterface.register(NAME, attend)


def check_decode_attention(wanted: DecodeAttention, device: torch.device) -> None:
    """Before a model is loaded.

    Raises:
        UsageError: the kernel that was asked for is not for this device.
    """
    if wanted is DecodeAttention.flash and device.type != "cuda":
        raise UsageError(
            "engine.decode_attention=flash needs a CUDA device, and the model is on "
            f"{device.type}; auto takes the fastest that works"
        )


def fastest(like_HTD: torch.Tensor, *, num_rows: int, num_heads: int, num_cells: int) -> str:
    """The name of the kernel that is fastest here; a few calls of each.

    Args:
        like_HTD: keys of the model.
        num_rows, num_cells: slots that are all taken, and how much each has filled.
        num_heads: of queries.

    Raises:
        RuntimeError: none works; what the last one said.
    """
    device, num_kv_heads, width = like_HTD.device, like_HTD.shape[0], like_HTD.shape[2]
    row_bytes = 2 * num_cells * num_kv_heads * width * like_HTD.element_size()
    num_rows = max(1, min(num_rows, _TRIED_BYTES // row_bytes))
    pool = Pool(2 * num_cells)  # half full
    keys = pool.storage(like_HTD, num_rows).fill_(1)
    values = pool.storage(like_HTD, num_rows).fill_(1)
    query = like_HTD.new_ones(num_rows, num_kv_heads, max(1, num_heads // num_kv_heads), width)
    length = torch.full((num_rows,), num_cells - 1, device=device)
    share = Share(pool, 0, num_rows, torch.arange(num_rows, device=device), num_rows, length, num_cells)
    seconds: dict[str, float] = {}
    names = [name for name in KERNELS if name != "flash" or device.type == "cuda"]
    for _ in range(5):
        for name in list(names):
            began = time.perf_counter()
            try:
                KERNELS[name](query, keys, values, share, None, width**-0.5, None)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except RuntimeError as problem:
                raise_fatal(problem)
                log.info("slots: %s attention is not for this model: %s", name, str(problem).split("\n")[0])
                names.remove(name)
                if not names:
                    raise
                continue
            taken = time.perf_counter() - began
            seconds[name] = min(taken, seconds.get(name, taken))
    return min(names, key=lambda name: seconds[name])
