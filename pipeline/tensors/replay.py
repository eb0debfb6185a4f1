"""Compact images become the processor's tensors, bit for bit, on the device that will look at them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from pipeline.records import CompactImages, EncodedSample
from pipeline.tensors.resize import METHODS, Method, matched

_TRIAL = (640, 480, 1024, 768, 1)  # Lanczos


class PixelReplay:
    """Makes image tensors of compact images.

    Args:
        device: where the tensors are made.
        method: how resizes are summed (pipeline.tensors.resize); None = the fastest there, of those that are exact.
    """

    def __init__(self, device: torch.device | str = "cpu", method: Method | None = None) -> None:
        self.device = torch.device(device)
        self.method = method or fastest(self.device)

    def expand(self, sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """The tensors in `sample.compact.shapes`, on the device; {} for a sample that is not compact.

        dtype: float32 gives the processor's own; another rounds these as `.to(dtype)` does.
        """
        return self.tensors(sample.compact, dtype) if sample.compact else {}

    def tensors(self, compact: CompactImages, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """See expand."""
        pixels = [torch.from_numpy(image if image.flags.writeable else image.copy()) for image in compact.pixels]
        if self.device.type == "cuda":
            pixels = [image.pin_memory() for image in pixels]
        on_device = [image.to(self.device, non_blocking=True) for image in pixels]
        made: dict[str, torch.Tensor] = compact.recipe.tensors(on_device, method=self.method, dtype=dtype)
        return made

    def expanded(self, sample: EncodedSample) -> EncodedSample:
        """The sample as the processor alone would have given it, with all tensors as arrays."""
        if sample.compact is None:
            return sample
        made = {name: tensor.cpu().numpy() for name, tensor in self.expand(sample).items()}
        return replace(sample, tensors={**sample.tensors, **made}, compact=None)


def fastest(device: torch.device) -> Method:
    """The quickest way to resize on a device, tried out; on a CPU it is known."""
    if device.type == "cpu":
        return "taps"
    width, height, new_width, new_height, filter = _TRIAL
    resize = matched(width, height, new_width, new_height, filter)
    image = torch.zeros(3, height, width, dtype=torch.uint8, device=device)
    seconds: dict[Method, float] = {}
    for method in METHODS:
        try:
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                resize(image, method).sum().item()
                seconds[method] = time.perf_counter() - start
        except (RuntimeError, TypeError):  # no float64 on this device
            seconds.pop(method, None)
    return min(seconds, key=lambda method: seconds[method], default="taps")


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether all tensors agree in name, type, shape and every bit."""
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        and np.array_equal(_bits(tensor), _bits(other[name]))
        for name, tensor in one.items()
    )


def _bits(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.ascontiguousarray(tensor.cpu().numpy()).view(np.uint8)
