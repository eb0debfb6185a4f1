"""Images encoded once, in groups of one shape, and handed to the model when it asks for them.

The model calls its own `get_image_features` while it prepares a prompt. Here it gets an answer that was computed
before: for all images of one shape together, so that none is padded, and once for images that come again. Whether a
model can be served so is not known from its name: the trial at the start compares logits (trial.py).
"""

from __future__ import annotations

import inspect
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from pipeline.records import EncodedSample
from pipeline.vlm.base import Batcher, EngineCounts
from pipeline.vlm.inputs import ModelInputs
from pipeline.vlm.slots.unread_layers import left_out, unread_layers

# Of pixels that go through the vision tower at once; more is no faster on a CPU, and its memory is slow to get.
_GROUP_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
_GROUP_ROWS = 256


class ImageFeatures:
    """What the vision tower made of each image, as long as there is room. Held by an engine, whose `counts` it keeps.

    Args:
        max_bytes: of features that are kept for images to come again.
    """

    def __init__(self, model: Any, batcher: Batcher, inputs: ModelInputs, *, max_bytes: int) -> None:
        self._batcher, self._inputs, self._max_bytes = batcher, inputs, max_bytes
        self._group_bytes = _GROUP_BYTES.get(model.device.type, _GROUP_BYTES["cuda"])
        self._owner = getattr(model, "base_model", model)
        self._original: Callable[..., Any] | None = getattr(self._owner, "get_image_features", None)
        self._names = set(inspect.signature(self._original).parameters) if self._original else set()
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._kept_bytes = 0
        self._group_rows = _GROUP_ROWS
        self._model = model
        self._unread_layers: list[torch.nn.Module] | None = None  # of the tower; not known yet
        self._constants: frozenset[str] | None = None  # of an output: the same however many images; not known yet
        self.counts = EngineCounts()

    def fits(self, sample: EncodedSample) -> bool:
        """Whether a sample has images that the model encodes by this one function."""
        return self._original is not None and bool(self.unread(sample))

    def unread(self, sample: EncodedSample) -> list[str]:
        """The tensors that nothing but the encoding of images looks at: pixels and their masks."""
        compact = sample.compact.shapes if sample.compact else {}
        return [
            name
            for name in self._taken(sample)
            if name in compact or sample.tensors[name].dtype.kind == "f" or sample.tensors[name].ndim > 3
        ]

    def stop_leaving_out(self) -> bool:
        """Encode by whole towers from here on; False where that is done anyway."""
        before, self._unread_layers = self._unread_layers, []
        self._kept.clear()
        self._kept_bytes = 0
        return bool(before)

    @contextmanager
    def serving(self, samples: Sequence[EncodedSample]) -> Iterator[None]:
        """While it lasts the model gets the features of these samples, in their order."""
        parts = self.encoded(samples)
        original = self._original

        def served(*args: Any, **kwargs: Any) -> Any:
            return _joined(parts, self._constants or frozenset())

        served.__signature__ = inspect.signature(original)  # type: ignore[attr-defined, arg-type]
        self._owner.get_image_features = served
        try:
            yield
        finally:
            del self._owner.get_image_features

    def encoded(self, samples: Sequence[EncodedSample]) -> list[Any]:
        """The features of each sample's images; what is new is encoded, equal shapes together."""
        found: dict[str, Any] = {}
        new: dict[str, EncodedSample] = {}
        for sample in samples:
            key = _key(sample)
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            else:
                new[key] = sample
        began = time.perf_counter()
        for group in self._groups(list(new.items())):
            parts = self._encode([sample for _, sample in group])
            for (key, sample), part in zip(group, parts, strict=True):
                found[key] = part
                if sample.image_key is not None:
                    self._keep(key, part)
        self.counts.vision_seconds += time.perf_counter() - began
        return [found[_key(sample)] for sample in samples]

    def _groups(self, new: Sequence[tuple[str, EncodedSample]]) -> Iterator[list[tuple[str, EncodedSample]]]:
        by_shape: dict[Any, list[tuple[str, EncodedSample]]] = {}
        for key, sample in new:
            shapes = sample.shapes
            shape = tuple((name, shapes[name]) for name in self._taken(sample))
            by_shape.setdefault(shape, []).append((key, sample))
        for alike in by_shape.values():
            _, first = alike[0]
            num_bytes = sum(4 * math.prod(first.shapes[name]) for name in self._taken(first))
            step = max(1, min(self._group_rows, self._group_bytes // max(1, num_bytes)))
            for start in range(0, len(alike), step):
                yield alike[start : start + step]

    @torch.inference_mode()
    def _encode(self, samples: Sequence[EncodedSample]) -> list[Any]:
        """The features of samples whose images have equal shapes, apart for each."""
        output = self._output(samples)
        if len(samples) == 1:
            self.counts.num_images_encoded += 1
            return [output]
        if self._constants is None:
            alone = self._output(samples[:1])
            self._constants = frozenset(
                name
                for name, value in output.items()
                if isinstance(value, torch.Tensor) and name in alone and value.shape == alone[name].shape
            )
        parts = _parted(output, len(samples), self._constants)
        if parts is None:  # its outputs do not run along the images: from here on each is encoded alone
            self._group_rows = 1
            return [self._encode([sample])[0] for sample in samples]
        self.counts.num_images_encoded += len(samples)
        return parts

    def _output(self, samples: Sequence[EncodedSample]) -> Any:
        encode = self._original
        assert encode is not None
        inputs = self._inputs_of(samples, self._taken(samples[0]))
        if self._unread_layers is None:
            self._unread_layers = unread_layers(self._model, partial(encode, **inputs, return_dict=True))
        with left_out(self._unread_layers):
            return encode(**inputs, return_dict=True)

    def _inputs_of(self, samples: Sequence[EncodedSample], names: Sequence[str]) -> dict[str, Any]:
        batch = self._inputs(self._batcher.collate(samples))
        return {name: batch[name] for name in names}

    def _taken(self, sample: EncodedSample) -> list[str]:
        return sorted(self._names & set(sample.shapes) - {"input_ids", "attention_mask"})

    def _keep(self, key: str, part: Any) -> None:
        self._kept[key] = part
        self._kept_bytes += _num_bytes(part)
        while self._kept_bytes > self._max_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= _num_bytes(dropped)


def _key(sample: EncodedSample) -> str:
    return sample.image_key or f"only {id(sample)}"


# What a vision tower returns: a ModelOutput, of which `pooler_output` is a tensor or one tensor for each image, and
# others are tensors or one tensor for each layer (deepstack_features).


def _parted(output: Any, num_parts: int, constants: frozenset[str]) -> list[Any] | None:
    """An output in equal parts along the images; None where it has none. What does not run along them is left out."""
    fields: dict[str, list[Any]] = {}
    for name, value in output.items():
        if name in constants:
            fields[name] = [value] * num_parts
            continue
        parts = _parted_value(value, num_parts, along_list=name == "pooler_output")
        if parts is not None:
            fields[name] = parts
        elif name == "pooler_output":
            return None
    return [type(output)(**{name: parts[place] for name, parts in fields.items()}) for place in range(num_parts)]


def _parted_value(value: Any, num_parts: int, *, along_list: bool) -> list[Any] | None:
    if isinstance(value, torch.Tensor):
        return list(value.chunk(num_parts)) if value.ndim and value.shape[0] % num_parts == 0 else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if along_list:
        step = len(value) // num_parts
        if len(value) % num_parts:
            return None
        return [list(value[start : start + step]) for start in range(0, len(value), step)]
    layers = [_parted_value(layer, num_parts, along_list=True) for layer in value]
    if any(layer is None for layer in layers):
        return None
    return [[layer[place] for layer in layers if layer is not None] for place in range(num_parts)]


def _joined(parts: Sequence[Any], constants: frozenset[str]) -> Any:
    """One output of several."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name in parts[0] if all(name in part for part in parts)]
    fields = {
        name: parts[0][name]
        if name in constants
        else _joined_values([part[name] for part in parts], along_list=name == "pooler_output")
        for name in names
    }
    return type(parts[0])(**fields)


def _joined_values(values: Sequence[Any], *, along_list: bool) -> Any:
    if all(isinstance(value, torch.Tensor) for value in values):
        if len({value.shape[1:] for value in values}) > 1:
            return None
        return torch.cat(list(values))
    if any(value is None for value in values):
        return None
    if along_list:
        return [image for value in values for image in value]
    return [_joined_values(layer, along_list=True) for layer in zip(*values, strict=True)]


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_num_bytes(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_num_bytes(entry) for entry in value)
    return 0
