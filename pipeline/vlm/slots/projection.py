"""Matrix products of a model made faster on the same numbers: joined where they share an input, packed for a CPU.

Joined: q, k and v (and gate and up) of one layer are one product over their weights laid end to end; the others return
their parts of it. Separate products were the whole distance between transformers' modules and vLLM's (vllm#45284).

Activated: where a layer's output goes through SiLU or GELU and nowhere else, its packed product applies that, too
(product.py).

Packed, on a CPU: weights are laid out as oneDNN's kernels read them; and in float32 beside bfloat16, because on many
CPUs a large product in bfloat16 takes longer than the same in float32 (measured on a Xeon with AVX512-BF16 and no AMX,
GFLOP/s a core, plain bfloat16, packed bfloat16, packed float32: 56, 74, 63 with 16 rows; 72, 78, 114 with 64; 78, 84,
127 with 512). Products are exact in float32 either way and are rounded to the model's arithmetic at the end. Which
kernel serves how many rows is measured at the start (`probed`).

Shapes: M rows of input, K features of each, N of the output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipeline.vlm.failure import raise_fatal
from pipeline.vlm.slots.product import ACTIVATIONS, COPY_BYTES, KERNELS, Activation, Product, packed
from pipeline.vlm.slots.race import best_seconds

log = logging.getLogger(__name__)

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
# A layer and what its output goes through, by their names in one module; whether it does is tried (`_is_same`).
_ACTIVATED = (("gate_proj", "act_fn"), ("fc1", "activation_fn"))
_SAMPLE_ROWS = 8
_PROBED_ROWS = (16, 64, 512)
_BORDERS = (24, 128)  # rows from which on the next of them tells
_PROBED_OUTPUTS = 4096
_PROBED_BYTES = 96 << 20
_WORTH = 1.05  # a copy of all weights has to be faster by so much


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel for few rows, some and many."""

    names: tuple[str, ...] = ("plain",) * len(_PROBED_ROWS)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """From what it is as a text.

        Raises:
            ValueError: it is none.
        """
        names = tuple(part.partition(" rows: ")[2] for part in text.split(", "))
        choice = cls(names)
        if len(names) != len(_PROBED_ROWS) or not set(names) <= KERNELS.keys() or str(choice) != text:
            raise ValueError(f"{text!r} is no choice of products like {cls()}")
        return choice

    @property
    def copy_factor(self) -> int:
        """Bytes of all copies, over those of the weights."""
        return sum(COPY_BYTES[name] for name in set(self.names))

    def __str__(self) -> str:
        return ", ".join(f"{rows} rows: {name}" for rows, name in zip(_PROBED_ROWS, self.names, strict=False))


def probed(weights_NK: Sequence[torch.Tensor]) -> Choice:
    """Measure which kernel is fastest on this machine for each number of rows.

    weights_NK: of one shape; several, as a step reads each weight once, from memory and not from a cache.
    """
    weights_NK = [weight_NK[:_PROBED_OUTPUTS].contiguous() for weight_NK in weights_NK]
    kinds = ["plain", "packed"] + ["packed float32"] * (weights_NK[0].dtype != torch.float32)
    try:
        products = {name: [KERNELS[name](weight_NK, None) for weight_NK in weights_NK] for name in kinds}
        return _fastest([_seconds(products, weights_NK[0], num_rows) for num_rows in _PROBED_ROWS])
    except (RuntimeError, AttributeError, NotImplementedError) as problem:  # a torch built without oneDNN
        log.info("weights are not packed: %s", str(problem).split("\n")[0])
        return Choice()


def _seconds(products: dict[str, list[Product]], like_NK: torch.Tensor, num_rows: int) -> dict[str, float]:
    """What each kernel takes for so many rows."""
    x_MK = like_NK.new_ones(num_rows, like_NK.shape[1])

    def call(several: list[Product]) -> None:
        for product in several if num_rows < _BORDERS[1] else several[:1]:
            product(x_MK)

    return best_seconds({name: partial(call, several) for name, several in products.items()})


def _fastest(seconds: Sequence[dict[str, float]]) -> Choice:
    """Of kernels for few rows, some and many. A copy that is worth its memory for some rows serves all that it can."""
    best = [min(each, key=lambda name: each[name]) for each in seconds]
    copies = {name for name, each in zip(best, seconds, strict=True) if each["plain"] > _WORTH * each[name]}
    return Choice(tuple(min({"plain", *copies}, key=lambda name: each[name]) for each in seconds))


class Joint:
    """One product for several layers of the same input."""

    def __init__(self, layers: Sequence[nn.Linear], choice: Choice, activation: Activation | None = None) -> None:
        self.sizes = [layer.out_features for layer in layers]
        weight_NK: torch.Tensor = layers[0].weight.data
        bias_N: torch.Tensor | None = layers[0].bias
        if len(layers) > 1:
            weight_NK = torch.cat([layer.weight.data for layer in layers])
            if bias_N is not None:
                bias_N = torch.cat([layer.bias.data for layer in layers])
            start = 0
            for layer in layers:  # they are parts of it from here on: nothing is there twice
                layer.weight.data = weight_NK[start : start + layer.out_features]
                start += layer.out_features
        if activation is not None:
            self._products = [packed(weight_NK, bias_N, activation)] * len(choice.names)
        else:
            products = {name: KERNELS[name](weight_NK, bias_N) for name in set(choice.names)}
            self._products = [products[name] for name in choice.names]
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []

    def output(self, x: torch.Tensor, place: int) -> torch.Tensor | None:
        """The part of one layer; None where the input is not the one that the first layer had."""
        if len(self.sizes) == 1:
            return self._product(x)
        if place == 0:
            self._input, self._outputs = x, list(torch.split(self._product(x), self.sizes, -1))
        if x is not self._input:
            return None
        found = self._outputs[place]
        if place == len(self.sizes) - 1:
            self._input, self._outputs = None, []
        return found

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.numel() // x.shape[-1]
        place = 0 if num_rows < _BORDERS[0] else 1 if num_rows < _BORDERS[1] else 2
        return self._products[place](x)


class Projection(nn.Module):
    """Stands in the place of one nn.Linear."""

    def __init__(self, layer: nn.Linear, joint: Joint, place: int) -> None:
        super().__init__()
        self.layer, self._joint, self._place = layer, joint, place
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self) -> torch.Tensor:
        """Some models look at its dtype."""
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self._joint.output(x, self._place)
        return functional.linear(x, self.layer.weight, self.layer.bias) if found is None else found


class Projections:
    """The replaced layers of a model; `restore` puts the old ones back.

    Args:
        fuse: join layers of one input.
        pack: on a CPU, keep copies of weights as its kernels read them, as far as memory allows.
        free_bytes: what the copies may take.
        choose: finds the kernels for weights of one shape.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fuse: bool,
        pack: bool,
        free_bytes: int,
        choose: Callable[[list[torch.Tensor]], Choice] = probed,
    ) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self.choice = Choice()
        linears: list[Any] = [module for module in model.modules() if _is_plain(module)]
        if pack and linears and linears[0].weight.device.type == "cpu":
            self.choice = choose(_largest_alike(linears))
            needed = self.choice.copy_factor * sum(layer.weight.nbytes for layer in linears)
            if needed > free_bytes:
                log.info("weights are not packed: copies take %.1f GiB, and there is less", needed / (1 << 30))
                self.choice = Choice()
        packs = self.choice != Choice()
        for parent in list(model.modules()):
            for name, function in _ACTIVATED if self.choice.names[-1] == "packed" else ():
                self._activate(parent, name, function)
            for names in _groups(parent) if fuse else ():
                self._replace(parent, names)
            for name, layer in list(parent.named_children()) if packs else ():
                if _is_plain(layer):
                    self._replace(parent, (name,))
        if packs:
            log.info("products on this CPU: %s", self.choice)

    def restore(self) -> None:
        """The model as it was."""
        self._restore(0)

    def _restore(self, num_replaced: int) -> None:
        """All that was replaced after so many."""
        for parent, name, module in self._replaced[num_replaced:]:
            setattr(parent, name, module)
        del self._replaced[num_replaced:]

    def _activate(self, parent: nn.Module, name: str, function_name: str) -> None:
        """Have a layer's product apply what its output goes through, if `parent` computes the same with that."""
        layer: Any = getattr(parent, name, None)
        activation = ACTIVATIONS.get(type(getattr(parent, function_name, None)))
        if activation is None or not _is_plain(layer):
            return
        wanted, num_replaced = _sample_output(parent, layer), len(self._replaced)
        if wanted is None:
            return
        self._put(parent, name, Projection(layer, Joint([layer], self.choice, activation), 0))
        self._put(parent, function_name, nn.Identity())
        if not _is_same(wanted, _sample_output(parent, layer)):
            self._restore(num_replaced)

    def _put(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        self._replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, module)

    def _replace(self, parent: nn.Module, names: Sequence[str]) -> None:
        layers: list[Any] = [getattr(parent, name) for name in names]
        joint = Joint(layers, self.choice)
        for place, (name, layer) in enumerate(zip(names, layers, strict=True)):
            self._put(parent, name, Projection(layer, joint, place))


def _largest_alike(linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
    """Weights of the shape that most of the work is done with, as many as a cache does not hold."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for layer in linears:
        by_shape.setdefault(layer.weight.shape, []).append(layer.weight)
    weights = max(by_shape.values(), key=lambda alike: sum(weight.numel() for weight in alike))
    return weights[: max(1, _PROBED_BYTES // weights[0].nbytes)]


@torch.inference_mode()
def _sample_output(parent: nn.Module, layer: Any) -> torch.Tensor | None:
    """What a module makes of some rows; None where it takes or gives other things than a tensor."""
    rows_MK = torch.arange(_SAMPLE_ROWS * layer.in_features).sin().view(1, _SAMPLE_ROWS, -1).to(layer.weight.dtype)
    try:
        found = parent(rows_MK)
    except Exception as problem:  # whatever a model finds to say about our way of calling its parts
        raise_fatal(problem)
        return None
    return found if isinstance(found, torch.Tensor) else None


def _is_same(wanted: torch.Tensor, found: torch.Tensor | None) -> bool:
    if found is None or found.shape != wanted.shape:
        return False
    allowed = 1e-5 if wanted.dtype == torch.float32 else 2e-2
    return bool((found - wanted).abs().max() <= allowed * wanted.abs().max())


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    for names in _GROUPS:
        layers = [getattr(parent, name, None) for name in names]
        if not all(_is_plain(layer) for layer in layers):
            continue
        if len({(layer.in_features, layer.bias is None) for layer in layers if layer is not None}) == 1:
            yield names


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and not module.weight.is_meta
