"""Our decode loop, called by `generate(custom_generate=...)` once transformers has prepared inputs and cache.

It drops finished rows from the batch with `Cache.reorder_cache`, so that a batch does not compute the tail of its
slowest row for all of them.

Shapes: B rows in the batch, T prompt tokens with padding (later: and answer tokens), V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.vlm.answer import Generation
from pipeline.vlm.base import EngineCounts

# Gives each row its next token, noted in seen_BV where that is there; ends rows by the rules.
Choose = Callable[[Sequence[Generation], torch.Tensor, torch.Tensor | None], torch.Tensor]

# Rows leave the batch when this share of it or less is still at work: moving the cache costs about a decode step.
_SHRINK_AT = 0.75
_OURS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")  # of a decode step
_NO_TOKEN = -1  # in place of padding, where the past of a row is looked at


class DecodeLoop:
    """One batch. `needs_history`: whether `choose` wants to know which tokens a row has had."""

    def __init__(
        self, generations: Sequence[Generation], choose: Choose, counts: EngineCounts, *, needs_history: bool
    ) -> None:
        self._generations, self._choose, self._counts = list(generations), choose, counts
        self._needs_history = needs_history

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        outputs = model(**inputs, return_dict=True)
        logits_BV = outputs.logits[:, -1]
        cache, mask_BT = kwargs["past_key_values"], kwargs.get("attention_mask")  # no mask where nothing is padded
        rows = list(self._generations)  # of the batch, in its order
        position = last_position(inputs, len(rows))
        seen_BV = seen_tokens(input_ids, mask_BT, logits_BV) if self._needs_history else None
        past_BT = _past(input_ids, mask_BT) if logits_processor else None
        carried: dict[str, torch.Tensor] | None = None
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        began = time.perf_counter()
        while True:
            if past_BT is not None:
                logits_BV = logits_processor(past_BT, logits_BV.float())
            token_B = self._choose(rows, logits_BV, seen_BV)
            live = [place for place, row in enumerate(rows) if not row.done]
            if not live:
                self._counts.decode_seconds += time.perf_counter() - began
                return input_ids
            if past_BT is not None:
                past_BT = torch.cat([past_BT, token_B[:, None]], dim=1)
            if carried is None:
                carried = _carried(model, outputs, torch.cat([input_ids, token_B[:, None]], dim=1), kwargs)
                del outputs, inputs
            if len(live) <= _SHRINK_AT * len(rows):
                keep = torch.tensor(live, device=token_B.device)
                rows = [rows[place] for place in live]
                cache.reorder_cache(keep)
                token_B = token_B[keep]
                mask_BT = None if mask_BT is None else mask_BT[keep]
                position = None if position is None else position[..., keep, :]
                carried = {name: tensor[keep] for name, tensor in carried.items()}
                seen_BV = None if seen_BV is None else seen_BV[keep]
                past_BT = None if past_BT is None else past_BT[keep]
            step = carried | {"input_ids": token_B[:, None], "past_key_values": cache}
            if mask_BT is not None:
                mask_BT = step["attention_mask"] = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            if position is not None:
                position = step["position_ids"] = position + 1
            logits_BV = model(**step, **last_only, use_cache=True, return_dict=True).logits[:, -1]
            self._counts.num_decode_steps += 1
            self._counts.num_decode_rows += len(rows)


def _carried(model: Any, outputs: Any, input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What else transformers gives the first decode step for each row; the same holds for all later ones.

    Such as Mllama's mask over the images, [B, 1, images, tiles], or the type of a text token.
    """
    kwargs = model._update_model_kwargs_for_generation(outputs, dict(kwargs), is_encoder_decoder=False)
    inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.shape[:1] == input_ids.shape[:1] and name not in _OURS
    }


def last_position(inputs: Mapping[str, Any], num_rows: int) -> torch.Tensor | None:
    """The position of the last prompt token, [..., B, 1]: 2-D as a rule, with more axes in front for M-RoPE."""
    position: torch.Tensor | None = inputs.get("position_ids")
    if position is None:
        return None
    position = position[..., -1:]
    return position.expand(*position.shape[:-2], num_rows, 1) if position.shape[-2] == 1 else position


def seen_tokens(input_ids: torch.Tensor, mask_BT: torch.Tensor | None, logits_BV: torch.Tensor) -> torch.Tensor:
    """Which tokens a row's prompt has. Padding does not count: it differs from batch to batch."""
    mask_BT = torch.ones_like(input_ids) if mask_BT is None else mask_BT
    counts_BV = torch.zeros(logits_BV.shape, dtype=torch.int32, device=logits_BV.device)
    counts_BV.scatter_add_(1, input_ids.clamp(max=logits_BV.shape[1] - 1), mask_BT.to(torch.int32))
    return counts_BV > 0


def _past(input_ids: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """The prompt for transformers' logits processors. A pair of padding tokens is no n-gram of the row."""
    return input_ids if mask_BT is None else input_ids.masked_fill(mask_BT == 0, _NO_TOKEN)
