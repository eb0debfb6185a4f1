"""The last decoder layer of a prompt: after its keys and values, only what the next token is chosen from is computed.

A prompt leaves its keys and values in every layer, and the logits of its last token. In the last layer nothing looks at
any other token's attention, nor at its feed-forward part: about four fifths of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from pipeline.vlm.slots.stand_in import standing_in

_ATTENTION, _FEED_FORWARD = ("self_attn", "attention"), ("mlp", "feed_forward")
_OUTPUT = ("o_proj", "out_proj", "dense")  # of attention
_PLACES = "vlm_batch_places"  # an attribute of attention while it lasts


@contextmanager
def computed_at(model: Any, places: Sequence[int]) -> Iterator[None]:
    """While it lasts, the last layer is computed for these tokens of each row, counted in T, behind keys and values.

    What it gives for other tokens says nothing. A model whose last layer has no such parts computes as always.
    """
    with ExitStack() as stack:
        layer = _last_layer(model)
        attention = _part(layer, _ATTENTION)
        for part in (_part(layer, _FEED_FORWARD), _part(attention, _OUTPUT)):
            if part is not None:
                stack.enter_context(standing_in(part, partial(_at_places, part.forward, places)))
        if attention is not None:
            setattr(attention, _PLACES, places)
            stack.callback(delattr, attention, _PLACES)
        yield


def places_of(attention: Any) -> Sequence[int] | None:
    """The tokens whose attention is looked at; None for all."""
    found: Sequence[int] | None = getattr(attention, _PLACES, None)
    return found


def spread(found_BPK: torch.Tensor, index_P: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """What was computed for some tokens, and zeros for others: [B, T, ...]."""
    out_BTK = found_BPK.new_zeros(found_BPK.shape[0], num_tokens, *found_BPK.shape[2:])
    return out_BTK.index_copy_(1, index_P % num_tokens, found_BPK)


def _at_places(
    forward: Callable[..., Any], places: Sequence[int], hidden_BTK: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs or hidden_BTK.ndim != 3 or hidden_BTK.shape[1] <= len(places):
        return forward(hidden_BTK, *args, **kwargs)
    index_P = torch.tensor(places, device=hidden_BTK.device)
    found = forward(hidden_BTK[:, index_P])
    if not isinstance(found, torch.Tensor) or found.ndim != 3:  # experts may give their choices, too
        return forward(hidden_BTK)
    return spread(found, index_P, hidden_BTK.shape[1])


def _last_layer(model: Any) -> Any | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    return layers[-1] if isinstance(layers, torch.nn.ModuleList) and len(layers) else None


def _part(module: Any, names: Sequence[str]) -> Any | None:
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if isinstance(part, torch.nn.Module)), None)
