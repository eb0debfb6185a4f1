"""Matrix products of a model made faster on the same numbers: joined where they share an input, packed for a CPU.

Joined: q, k and v (and gate and up) of one layer are one product over their weights laid end to end; the others return
their parts of it. Separate products were the whole distance between transformers' modules and vLLM's (vllm#45284).

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

from pipeline.vlm.slots.race import best_seconds

log = logging.getLogger(__name__)

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
_PROBED_ROWS = (16, 64, 512)
_BORDERS = (24, 128)  # rows from which on the next of them tells
_PROBED_OUTPUTS = 4096
_PROBED_BYTES = 96 << 20
_WORTH = 1.05  # a copy of all weights has to be faster by so much

# input [M, K] -> output [M, N]
Product = Callable[[torch.Tensor], torch.Tensor]


def _plain(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Product:
    return lambda x_MK: functional.linear(x_MK, weight_NK, bias_N)


def _packed(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x_MK: multiply(x_MK, packed, bias_N, "none", [], "")


def _packed_float32(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Product:
    dtype = weight_NK.dtype
    product = _packed(weight_NK.float(), None if bias_N is None else bias_N.float())
    return lambda x_MK: product(x_MK.float()).to(dtype)


_KERNELS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], Product]] = {
    "plain": _plain,
    "packed": _packed,
    "packed float32": _packed_float32,
}
_COPY_BYTES = {"plain": 0, "packed": 1, "packed float32": 2}  # times those of a weight in half precision


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
        if len(names) != len(_PROBED_ROWS) or not set(names) <= _KERNELS.keys() or str(choice) != text:
            raise ValueError(f"{text!r} is no choice of products like {cls()}")
        return choice

    @property
    def copy_factor(self) -> int:
        """Bytes of all copies, over those of the weights."""
        return sum(_COPY_BYTES[name] for name in set(self.names))

    def __str__(self) -> str:
        return ", ".join(f"{rows} rows: {name}" for rows, name in zip(_PROBED_ROWS, self.names, strict=False))


def probed(weights_NK: Sequence[torch.Tensor]) -> Choice:
    """Measure which kernel is fastest on this machine for each number of rows.

    weights_NK: of one shape; several, as a step reads each weight once, from memory and not from a cache.
    """
    weights_NK = [weight_NK[:_PROBED_OUTPUTS].contiguous() for weight_NK in weights_NK]
    kinds = ["plain", "packed"] + ["packed float32"] * (weights_NK[0].dtype != torch.float32)
    try:
        products = {name: [_KERNELS[name](weight_NK, None) for weight_NK in weights_NK] for name in kinds}
        return Choice(tuple(_fastest(products, weights_NK[0], num_rows) for num_rows in _PROBED_ROWS))
    except (RuntimeError, AttributeError, NotImplementedError) as problem:  # a torch built without oneDNN
        log.info("weights are not packed: %s", str(problem).split("\n")[0])
        return Choice()


def _fastest(products: dict[str, list[Product]], like_NK: torch.Tensor, num_rows: int) -> str:
    x_MK = like_NK.new_ones(num_rows, like_NK.shape[1])

    def call(several: list[Product]) -> None:
        for product in several if num_rows < _BORDERS[1] else several[:1]:
            product(x_MK)

    seconds = best_seconds({name: partial(call, several) for name, several in products.items()})
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds["plain"] > _WORTH * seconds[best] else "plain"


class Joint:
    """One product for several layers of the same input."""

    def __init__(self, layers: Sequence[nn.Linear], choice: Choice) -> None:
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
        products = {name: _KERNELS[name](weight_NK, bias_N) for name in set(choice.names)}
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
        self._replaced: list[tuple[nn.Module, str, nn.Linear]] = []
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
            for names in _groups(parent) if fuse else ():
                self._replace(parent, names)
            for name, layer in list(parent.named_children()) if packs else ():
                if _is_plain(layer):
                    self._replace(parent, (name,))
        if packs:
            log.info("products on this CPU: %s", self.choice)

    def restore(self) -> None:
        """The model as it was."""
        for parent, name, layer in self._replaced:
            setattr(parent, name, layer)
        self._replaced = []

    def _replace(self, parent: nn.Module, names: Sequence[str]) -> None:
        layers: list[Any] = [getattr(parent, name) for name in names]
        joint = Joint(layers, self.choice)
        for place, (name, layer) in enumerate(zip(names, layers, strict=True)):
            self._replaced.append((parent, name, layer))
            setattr(parent, name, Projection(layer, joint, place))


def _largest_alike(linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
    """Weights of the shape that most of the work is done with, as many as a cache does not hold."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for layer in linears:
        by_shape.setdefault(layer.weight.shape, []).append(layer.weight)
    weights = max(by_shape.values(), key=lambda alike: sum(weight.numel() for weight in alike))
    return weights[: max(1, _PROBED_BYTES // weights[0].nbytes)]


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    for names in _GROUPS:
        layers = [getattr(parent, name, None) for name in names]
        if not all(_is_plain(layer) for layer in layers):
            continue
        if len({(layer.in_features, layer.bias is None) for layer in layers if layer is not None}) == 1:
            yield names


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and not module.weight.is_meta
