"""The attention function of decode steps, as transformers' modules call it: one new token in each slot.

Shapes: B rows, Q heads, G = Q / H of them share keys and values, D of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from pipeline.errors import UsageError
from pipeline.vlm.options import DecodeAttention
from pipeline.vlm.slots.decode_kernel import kernels

NAME = "vlm_batch_slots"  # as transformers knows our attention function


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
    step = layer.memory.step
    if step.prefix_shares and (window is not None or softcap is not None):
        raise NotImplementedError(f"{type(module).__name__}: a window or a softcap over a shared prefix")
    out_BHGD = layer.memory.kernel.attend(query_BHGD, step, layer.stored, window, scale, softcap)
    return out_BHGD.reshape(len(out_BHGD), 1, num_heads, -1), None


AttentionInterface.register(NAME, attend)


def check_decode_attention(wanted: DecodeAttention, device: torch.device) -> None:
    """Before a model is loaded.

    Raises:
        UsageError: the kernel that was asked for is not for this device.
    """
    if wanted is not DecodeAttention.auto and wanted.value not in (found := kernels(device)):
        raise UsageError(
            f"engine.decode_attention={wanted.value} is not for {device.type}, where the model is; there are "
            f"{', '.join(found)}, and auto takes the fastest that works"
        )
