"""The last decoder layer of a prompt: after its keys and values, only what the next token is chosen from is computed.

A prompt leaves its keys and values in every layer, and the logits of its last token. In the last layer nothing looks at
the feed-forward part of any other token: with L layers of which it is two thirds, that is 2 / 3L of the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_NAMES = ("mlp", "feed_forward")


@contextmanager
def computed_at(model: Any, places: Sequence[int]) -> Iterator[None]:
    """While it lasts, the last layer's feed-forward part is computed for these tokens of each row, counted in T.

    Its output for other tokens is zero. A model whose last layer has no such part computes as always.
    """
    part = _last_feed_forward(model)
    if part is None:
        yield
        return
    forward, own = part.forward, vars(part).get("forward")  # its own where a library (accelerate) has put one there

    def at_places(hidden_BTK: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or hidden_BTK.ndim != 3 or hidden_BTK.shape[1] <= len(places):
            return forward(hidden_BTK, *args, **kwargs)
        index = torch.tensor(places, device=hidden_BTK.device)
        found = forward(hidden_BTK[:, index])
        if not isinstance(found, torch.Tensor) or found.ndim != 3:  # experts may give their choices, too
            return forward(hidden_BTK)
        return torch.zeros_like(hidden_BTK, dtype=found.dtype).index_copy_(1, index % hidden_BTK.shape[1], found)

    part.forward = at_places
    try:
        yield
    finally:
        if own is None:
            del part.forward
        else:
            part.forward = own


def _last_feed_forward(model: Any) -> Any | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) == 0:
        return None
    return next(
        (found for name in _NAMES if isinstance(found := getattr(layers[-1], name, None), torch.nn.Module)), None
    )
