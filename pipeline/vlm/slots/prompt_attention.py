"""Attention of prompts on a CPU: some queries at a time, over no more cells than they may look at, in float32.

torch's fused kernel computes what a mask hides, and in bfloat16 takes longer than in float32 on a CPU without AMX. On
two cores of such a Xeon, a layer of 12 heads, milliseconds for two prompts of 294 tokens, one of 600, and two packs of
280 tokens over prefixes of 262 (prefix.py): 4.8, 9.5, 8.5 by torch in bfloat16; 4.0, 7.3, 6.5 in float32; 2.8, 5.3,
6.2 here. Which is faster is tried (`faster`).

Shapes: B rows, Q heads of queries, H of keys and values, T queries, S cells, D of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.vlm.slots.race import best_seconds

NAME = "vlm_batch_prompts"  # as transformers knows our attention function

_QUERIES = 64  # at a time; 128 took 1.1 to 1.5 times as long
_HIDDEN = torch.finfo(torch.float32).min  # not infinity: what sees nothing, padding, is a number then
_WORTH = 1.05


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Queries `start` to `stop`, and the cells `first` to `last` that any of them looks at."""

    start: int
    stop: int
    first: int
    last: int
    mask_B1TS: torch.Tensor  # added to scores


class _Stretches:
    """Of the masks of one forward: its layers share them."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[torch.Tensor | None, list[_Stretch]]] = {}

    def __call__(self, mask_B1TS: torch.Tensor | None, num_queries: int) -> list[_Stretch]:
        """mask: bool, True where a query looks, or a number to be added; None is causal, cells as many as queries."""
        key = id(mask_B1TS), num_queries
        if key not in self._known:
            shown_B1TS = _causal(num_queries) if mask_B1TS is None else mask_B1TS
            self._known[key] = mask_B1TS, _stretches(shown_B1TS)
        return self._known[key][1]

    def forget(self) -> None:
        self._known.clear()


def _stretches(mask_B1TS: torch.Tensor) -> list[_Stretch]:
    added_B1TS = mask_B1TS.float()
    if mask_B1TS.dtype == torch.bool:
        added_B1TS = torch.zeros(mask_B1TS.shape).masked_fill_(~mask_B1TS, _HIDDEN)
    found = []
    for start in range(0, mask_B1TS.shape[2], _QUERIES):
        part_B1TS = added_B1TS[:, :, start : start + _QUERIES]
        seen = (part_B1TS > _HIDDEN / 2).flatten(0, 2).any(0).nonzero()
        # Where nothing is seen all cells stay, as in the whole: it is padding, whose result nobody reads.
        first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, mask_B1TS.shape[3])
        found.append(_Stretch(start, start + part_B1TS.shape[2], first, last, part_B1TS[..., first:last].contiguous()))
    return found


def _causal(num_tokens: int) -> torch.Tensor:
    return torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril()


_of_this_forward = _Stretches()


@contextmanager
def attended(model: Any) -> Iterator[None]:
    """Prompts that `model` computes meanwhile attend so in its language model; vision towers keep their function."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    try:
        config._attn_implementation = {"": NAME}
        yield
    finally:
        config._attn_implementation = {"": before}
        _of_this_forward.forget()


def attend(
    module: Any,
    query_BQTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call; the result is [B, T, Q, D]."""
    num_queries, num_cells = query_BQTD.shape[2], key_BHSD.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        known = causal and num_queries == num_cells > 1
    else:
        known = attention_mask.shape[1:] == (1, num_queries, num_cells) and num_queries > 1
    if not known or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query_BQTD,
            key_BHSD,
            value_BHSD,
            attention_mask,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return found
    stretches = _of_this_forward(attention_mask, num_queries)
    return by_stretches(query_BQTD, key_BHSD, value_BHSD, stretches, scaling), None


def by_stretches(
    query_BQTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    stretches: list[_Stretch],
    scaling: float | None,
) -> torch.Tensor:
    """[B, T, Q, D], in the dtype of the queries."""
    group = query_BQTD.shape[1] // key_BHSD.shape[1]
    query_BQTD, dtype = query_BQTD.float(), query_BQTD.dtype
    key_BQSD, value_BQSD = repeat_kv(key_BHSD.float(), group), repeat_kv(value_BHSD.float(), group)
    num_rows, num_heads, num_queries, _ = query_BQTD.shape
    out_BTQD = query_BQTD.new_empty(num_rows, num_queries, num_heads, value_BHSD.shape[3], dtype=dtype)
    for one in stretches:
        part_BQTD = functional.scaled_dot_product_attention(
            query_BQTD[:, :, one.start : one.stop],
            key_BQSD[:, :, one.first : one.last],
            value_BQSD[:, :, one.first : one.last],
            attn_mask=one.mask_B1TS,
            scale=scaling,
        )
        out_BTQD[:, one.start : one.stop] = part_BQTD.transpose(1, 2)
    return out_BTQD


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.inference_mode()
def faster(text: Any, dtype: torch.dtype, *, num_tokens: int) -> bool:
    """Whether prompts of so many tokens are attended to faster so than by torch's kernel, on this CPU; a few calls.

    text: the configuration of a language model.
    """
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    query_BQTD = torch.ones(1, num_heads, num_tokens, width, dtype=dtype)
    key_BHSD = torch.ones(1, num_kv_heads, num_tokens, width, dtype=dtype)
    key_BQSD = repeat_kv(key_BHSD, num_heads // num_kv_heads)
    mask_B1TS = _causal(num_tokens)
    stretches = _stretches(mask_B1TS)
    seconds = best_seconds(
        {
            True: lambda: by_stretches(query_BQTD, key_BHSD, key_BHSD, stretches, None),
            False: lambda: functional.scaled_dot_product_attention(query_BQTD, key_BQSD, key_BQSD, attn_mask=mask_B1TS),
        }
    )
    return seconds[False] > _WORTH * seconds[True]
