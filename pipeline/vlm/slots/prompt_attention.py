"""Attention of prompts and of images on a CPU: some queries at a time, over no more cells than they may look at.

torch's fused kernel computes what a mask hides, and on a CPU without AMX takes longer in bfloat16 than in float32. Two
ways that may be faster; which one is, is tried (`fastest_way`):

`float32` is that kernel in float32. On two cores of a Xeon without AMX, a layer of 12 heads, milliseconds for two
prompts of 294 tokens, one of 600, and two packs of 280 tokens over prefixes of 262 (prefix.py): 4.8, 9.5, 8.5 by torch
in bfloat16; 4.0, 7.3, 6.5 in float32; 2.8, 5.3, 6.2 here.

`products` are matrix products in the model's dtype and a softmax that computes in float32: where products in bfloat16
are fast. On two cores of an EPYC, three prompts of 302 tokens, one of 600, one of 1,200: 7.5, 9.0, 30 by torch; 4.6,
5.7, 20 in float32; 2.5, 3.8, 14 here. Images, whose tokens all look at each other, attend so, too: three of 257 tokens
and 6 heads took 2.7 by torch and 1.3 here. A mask is added where it hides something, and scores stay in half precision:
another day, three prompts of 297 tokens, one of 600, two of 1,024: 4.1 -> 3.9, 5.5 -> 4.4, 27 -> 22.

Shapes: B rows, Q heads of queries, H of keys and values, G = Q / H, T queries, S cells, D of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.vlm.slots.final_layer import places_of, spread
from pipeline.vlm.slots.race import best_seconds
from pipeline.vlm.slots.stretch import Stretch, Stretches, causal_mask, stretches_of

# At a time. By torch's kernel 128 took 1.1 to 1.5 times as long; products of three prompts of 297 tokens 3.9 ms by 64,
# 3.7 by 100, 3.8 by 128, of one prompt of 600 4.8, 4.1, 4.1.
_QUERIES = {"float32": 64, "products": 128}
_QUERIES_OF_IMAGES = 512  # nothing is hidden: 64 of 257 took 1.2 times as long as all
# Of scores in float32, where they are kept; the memory of larger ones is slow to get (device.keep_freed_memory).
_SCORE_BYTES, _MIN_QUERIES = 16 << 20, 16
_WORTH = 1.05
TORCH = "torch"  # its own kernel

# query [B, Q, T, D], keys and values [B, H, S, D], stretches, scale -> [B, T, Q, D] in the dtype of the queries
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[Stretch], float | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute attention. keeps_scores: of all queries at a time. images: whether it is for images, too."""

    name: str
    doc: str
    compute: Compute
    keeps_scores: bool = False
    images: bool = False

    @property
    def function(self) -> str:
        """As transformers knows it."""
        return f"vlm_batch_prompts_{self.name}"


_of_this_forward = Stretches()


@contextmanager
def attended(model: Any, way: Way | None) -> Iterator[None]:
    """Prompts that `model` computes meanwhile attend so in its language model; None leaves it as it is."""
    with _attended([model.config.get_text_config(decoder=True)], way):
        yield


@contextmanager
def images_attended(model: Any, way: Way | None) -> Iterator[None]:
    """Images that `model` encodes meanwhile attend so, where the way is one for images."""
    with _attended(_image_configs(model) if way is not None and way.images else [], way):
        yield


@contextmanager
def _attended(configs: list[Any], way: Way | None) -> Iterator[None]:
    if way is None:
        yield
        return
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = {"": way.function}
        yield
    finally:
        for config, function in zip(configs, before, strict=True):
            config._attn_implementation = {"": function}
        _of_this_forward.forget()


def _image_configs(model: Any) -> list[Any]:
    """The configurations that modules beside the language model go by, where they attend by torch's kernel."""
    others = {id(model.config), id(model.config.get_text_config(decoder=True))}
    known = {id(found): found for module in model.modules() if (found := getattr(module, "config", None)) is not None}
    return [
        config
        for number, config in known.items()
        if number not in others and getattr(config, "_attn_implementation", None) == "sdpa"
    ]


def attend(
    module: Any,
    query_BQTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    way: Way,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call; the result is [B, T, Q, D]."""
    num_queries, num_cells = query_BQTD.shape[2], key_BHSD.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None:
        known = (causal or way.images) and num_queries == num_cells > 1
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
    if causal and (places := places_of(module)) is not None and len(places) < num_queries:
        return _attended_at(places, query_BQTD, key_BHSD, value_BHSD, attention_mask, scaling, way), None
    at_a_time = _QUERIES[way.name] if causal or attention_mask is not None else _QUERIES_OF_IMAGES
    if way.keeps_scores:
        query_bytes = 4 * query_BQTD.shape[0] * query_BQTD.shape[1] * num_cells
        at_a_time = min(at_a_time, max(_MIN_QUERIES, _SCORE_BYTES // query_bytes))
    stretches = _of_this_forward(attention_mask, num_queries, causal=causal, at_a_time=at_a_time)
    return way.compute(query_BQTD, key_BHSD, value_BHSD, stretches, scaling), None


def _attended_at(
    places: Sequence[int],
    query_BQTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    mask_B1TS: torch.Tensor | None,
    scaling: float | None,
    way: Way,
) -> torch.Tensor:
    """What these queries attend to, and zeros for all others."""
    num_queries = query_BQTD.shape[2]
    index_P = torch.tensor(places, device=query_BQTD.device)
    mask_B1PS = (causal_mask(num_queries) if mask_B1TS is None else mask_B1TS)[:, :, index_P]
    of_places = stretches_of(mask_B1PS, len(places))
    return spread(
        way.compute(query_BQTD[:, :, index_P], key_BHSD, value_BHSD, of_places, scaling), index_P, num_queries
    )


def in_float32(
    query_BQTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    stretches: list[Stretch],
    scaling: float | None,
) -> torch.Tensor:
    """By torch's kernel."""
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


def by_products(
    query_BQTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    stretches: list[Stretch],
    scaling: float | None,
) -> torch.Tensor:
    """By matrix products; heads that share keys and values are the rows of one."""
    num_rows, num_heads, num_queries, width = query_BQTD.shape
    num_kv_heads = key_BHSD.shape[1]
    group = num_heads // num_kv_heads
    # Once, and not for each stretch: the products take what is contiguous, and would copy.
    query_BQTD = (query_BQTD * (width**-0.5 if scaling is None else scaling)).contiguous()
    key_BHSD, value_BHSD = key_BHSD.contiguous(), value_BHSD.contiguous()
    out_BTQD = query_BQTD.new_empty(num_rows, num_queries, num_heads, value_BHSD.shape[3])
    for one in stretches:
        shape = (num_rows, num_kv_heads, group, one.stop - one.start)
        part_BHLD = query_BQTD[:, :, one.start : one.stop].reshape(*shape[:2], -1, width)  # L = G * queries
        scores_BHLS = torch.matmul(part_BHLD, key_BHSD[:, :, one.first : one.last].transpose(-1, -2))
        # Of scores in half precision it computes in float32 and rounds once: bit by bit what one to float32 gives that
        # is rounded behind it, in a third of the time.
        scores_BHLS = scores_BHLS if one.hides_only else scores_BHLS.float()
        for columns, added_B1TC in one.added(scores_BHLS.dtype):
            scores_BHLS.view(*shape, -1)[..., columns] += added_B1TC[:, :, None]
        shares_BHLS = torch.softmax(scores_BHLS, -1).to(value_BHSD.dtype)
        mixed_BHLD = torch.matmul(shares_BHLS, value_BHSD[:, :, one.first : one.last])
        mixed_BQTD = mixed_BHLD.view(num_rows, num_heads, shape[3], -1)
        out_BTQD[:, one.start : one.stop] = mixed_BQTD.transpose(1, 2)
    return out_BTQD


WAYS = {
    way.name: way
    for way in (
        Way("float32", "torch's kernel in float32", in_float32),
        Way("products", "matrix products", by_products, keeps_scores=True, images=True),
    )
}
for _way in WAYS.values():
    AttentionInterface.register(_way.function, partial(attend, way=_way))
    AttentionMaskInterface.register(_way.function, sdpa_mask)


@torch.inference_mode()
def fastest_way(text: Any, dtype: torch.dtype, *, num_rows: int, num_tokens: int) -> str:
    """How so many prompts of so many tokens are attended to the fastest on this CPU: a name of WAYS, or TORCH.

    As many as are computed at a time, laid out as a model has them. One prompt of 302 tokens took 1.6 ms by products
    and 1.8 in float32, three 3.8 and 5.3: what is that close for one goes wrong on a busy machine.

    A model in float32 has one way at every start, so that its answers are the same (decode_kernel.fastest).

    text: the configuration of a language model.
    """
    if dtype == torch.float32:
        return "float32"
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    query_BQTD = torch.ones(num_rows, num_tokens, num_heads, width, dtype=dtype).transpose(1, 2)
    key_BHSD = torch.ones(num_rows, num_tokens, num_kv_heads, width, dtype=dtype).transpose(1, 2)
    key_BQSD = repeat_kv(key_BHSD, num_heads // num_kv_heads)
    mask_B1TS = causal_mask(num_tokens)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        way.name: partial(
            way.compute, query_BQTD, key_BHSD, key_BHSD, stretches_of(mask_B1TS, _QUERIES[way.name]), None
        )
        for way in WAYS.values()
    }
    calls[TORCH] = lambda: functional.scaled_dot_product_attention(query_BQTD, key_BQSD, key_BQSD, attn_mask=mask_B1TS)
    seconds = best_seconds(calls)
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[TORCH] > _WORTH * seconds[best] else TORCH
