"""Layers of a vision tower whose output nothing looks at, left out when images are encoded.

LLaVA and its kin take the features of the last layer but one, and compute the last one as well. Which layers these are
is not read from a configuration: what a layer gives is replaced by numbers that spoil whatever looks at them (NaN), and
where the features stay the same, bit by bit, nothing does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pipeline.vlm.slots.stand_in import standing_in

_OF_LAYERS = {"last_hidden_state", "hidden_states", "attentions"}  # fields that tell of layers, and not of images


def unread_layers(model: Any, encode: Callable[[], Any]) -> list[torch.nn.Module]:
    """The last layers of the largest tower of `model` that its features do not depend on.

    encode: images to the ModelOutput of a tower; called some times.

    Raises:
        whatever the model raises.
    """
    layers = _tower(model)
    if not layers:
        return []
    wanted = _features(encode())
    found: list[torch.nn.Module] = []
    for layer in reversed(layers[1:]):
        seen: list[bool] = []

        def spoil(_: Any, inputs: Any, output: Any, seen: list[bool] = seen) -> Any:
            fits = isinstance(output, torch.Tensor) and _is_like(inputs, output)
            seen.append(fits)
            return torch.full_like(output, torch.nan) if fits else output

        handle = layer.register_forward_hook(spoil, prepend=True)  # before those that capture hidden states
        try:
            with left_out(found):
                spoilt = _features(encode())
        finally:
            handle.remove()
        # Of a tower that draws random numbers nothing can be told: its features are never the same.
        if not seen or not all(seen) or not _same(wanted, spoilt):
            break
        found.append(layer)
    return found


@contextmanager
def left_out(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While it lasts these layers give what they are given."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(standing_in(layer, _unchanged))
        yield


def _unchanged(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden


def _is_like(inputs: Sequence[Any], output: torch.Tensor) -> bool:
    """Whether the first input could stand in the place of the output."""
    return bool(inputs) and isinstance(inputs[0], torch.Tensor) and inputs[0].shape == output.shape


def _tower(model: Any) -> list[torch.nn.Module]:
    """The layers of the largest stack of alike ones outside the language model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList)
        and id(module) not in inside
        and len({type(one) for one in module}) == 1
    ]
    return max(
        stacks, key=lambda stack: sum(part.numel() for layer in stack for part in layer.parameters()), default=[]
    )


def _features(output: Any) -> list[torch.Tensor]:
    """All tensors of an output but those that tell of layers."""
    found: list[torch.Tensor] = []
    rest = [value for name, value in output.items() if name not in _OF_LAYERS]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            rest.extend(value)
    return found


def _same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(map(torch.equal, some, others))
