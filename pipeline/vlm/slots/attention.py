"""Attention of one new token in each slot over what its slot holds: no padding, no repeated heads, no copied cache.

Two kernels. `matmul` are two matrix products and a softmax in float32; heads that share keys and values are the rows of
one product. On CPUs torch's scaled_dot_product_attention (`sdpa`) is made for long queries and may take several times
as long for a single one in bfloat16; which is faster is tried (`fastest`).

Shapes: B rows, Q heads, G = Q / H of them share keys and values, N slots, S cells, D of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from pipeline.vlm.slots.memory import SlotMemory

NAME = "vlm_batch_slots"  # as transformers knows our attention function

# query [N, H, G, D], keys and values [N, H, S, D], mask of what is hidden [N, 1, 1, S], scale, softcap -> [N, H, G, D]
Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, float | None],
    torch.Tensor,
]


def matmul(
    query_NHGD: torch.Tensor,
    keys_NHSD: torch.Tensor,
    values_NHSD: torch.Tensor,
    hidden_N11S: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Two matrix products, the softmax between them in float32."""
    scores_NHGS = torch.matmul(query_NHGD * scale, keys_NHSD.transpose(-1, -2))
    if softcap is not None:
        scores_NHGS = softcap * torch.tanh(scores_NHGS / softcap)
    scores_NHGS.masked_fill_(hidden_N11S, -torch.inf)
    shares_NHGS = torch.softmax(scores_NHGS, -1, dtype=torch.float32).to(values_NHSD.dtype)
    return torch.matmul(shares_NHGS, values_NHSD)


def sdpa(
    query_NHGD: torch.Tensor,
    keys_NHSD: torch.Tensor,
    values_NHSD: torch.Tensor,
    hidden_N11S: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """torch's fused kernel, on any device."""
    if softcap is not None:
        return matmul(query_NHGD, keys_NHSD, values_NHSD, hidden_N11S, scale, softcap)
    return functional.scaled_dot_product_attention(
        query_NHGD, keys_NHSD, values_NHSD, attn_mask=~hidden_N11S, scale=scale
    )


KERNELS: dict[str, Kernel] = {"matmul": matmul, "sdpa": sdpa}


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
    kernel: Kernel = layer.memory.kernel
    found = []
    for share in layer.memory.shares:
        query_NHGD = query_BHGD[share.start : share.stop]
        if not share.is_dense:
            query_NHGD = query_BHGD.new_zeros(share.num_slots, *query_BHGD.shape[1:])
            query_NHGD[share.index_P] = query_BHGD[share.start : share.stop]
        keys_NHSD, values_NHSD = layer.parts(share)
        out_NHGD = kernel(query_NHGD, keys_NHSD, values_NHSD, share.mask(window), scale, softcap)
        found.append(out_NHGD if share.is_dense else out_NHGD[share.index_P])
    out_BHGD = found[0] if len(found) == 1 else torch.cat(found)
    return out_BHGD.reshape(len(out_BHGD), 1, num_heads, -1), None


AttentionInterface.register(NAME, attend)


def fastest(memory: SlotMemory, *, num_heads: int, num_cells: int) -> str:
    """The name of the kernel that is faster here for a full memory of rows of such a length; a few calls of each."""
    like_NHSD = next(pool.keys_NHSD[0] for pool in memory.pools if pool.keys_NHSD)
    num_rows, num_kv_heads, width = memory.max_slots, like_NHSD.shape[1], like_NHSD.shape[3]
    keys = like_NHSD.new_ones(num_rows, num_kv_heads, num_cells * 2, width)[:, :, :num_cells]  # strided, as in a pool
    values = torch.ones_like(keys)
    query = like_NHSD.new_ones(num_rows, num_kv_heads, max(1, num_heads // num_kv_heads), width)
    hidden = torch.zeros(num_rows, 1, 1, num_cells, dtype=torch.bool, device=keys.device)
    seconds: dict[str, list[float]] = {name: [] for name in KERNELS}
    for _ in range(5):
        for name, kernel in KERNELS.items():
            began = time.perf_counter()
            kernel(query, keys, values, hidden, width**-0.5, None)
            if keys.device.type == "cuda":
                torch.cuda.synchronize(keys.device)
            seconds[name].append(time.perf_counter() - began)
    return min(seconds, key=lambda name: min(seconds[name]))
