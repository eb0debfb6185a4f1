"""Pillow's resize as integer sums, on any device, with Pillow's pixels.

Pillow resizes 8-bit images in two passes. Each sums neighbouring pixels, weighted with fixed-point coefficients of 22
bits, and rounds to 8 bits (libImaging/Resample.c; the coefficients below follow it operation for operation). Integer
sums do not depend on their order, so the same pixels come out of any exact way to add them up:

    taps      one multiply-add in int32 for each neighbour: little arithmetic, exact everywhere, best on a CPU
    float64   a product with a dense matrix: sums stay below 2**53
    float32   two products with the coefficients' upper and lower 11 bits: for devices where float64 is slow

Rounding between the passes makes their order visible: one or the other may differ by 11 in 30 % of the pixels. Which
one the installed Pillow takes for a size is looked up in what it does, for its rule changed in 12.2 and 13.0.

Shapes: C channels, H x W pixels, K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

Numbers = np.ndarray[Any, Any]
Method = Literal["taps", "float64", "float32"]
METHODS: tuple[Method, ...] = ("taps", "float64", "float32")

_BITS = 22
_HALF = 1 << (_BITS - 1)
_LOW = 1 << 11  # the lower half of a coefficient, for products in float32
_HAMMING = (float(np.float32(0.54)), float(np.float32(0.46)))  # float32 in Pillow's source
_MAX_FLOAT32_TAPS = 32  # 255 * 2048 * 32 < 2**24: partial sums stay whole numbers
_NUM_PROBES = 24  # rows and columns of pixels that are compared with Pillow's
_MAX_TRIALS = 32  # pictures: the order of passes may not show in a few pixels


class Unmatched(Exception):
    """Pillow's pixels do not come out of either order of passes, or the filter is not known."""


@dataclass(frozen=True, slots=True)
class Resize:
    """One call of Pillow's resize on a whole RGB image. Sizes in pixels."""

    height: int
    width: int
    filter: int  # of PIL.Image.Resampling
    vertical_first: bool

    def __call__(self, pixels_CHW: torch.Tensor, method: Method = "taps") -> torch.Tensor:
        """uint8 [C, H, W] -> uint8 [C, height, width], on the pixels' device."""
        vertical, horizontal = (1, self.height), (2, self.width)
        for dim, num_out in (vertical, horizontal) if self.vertical_first else (horizontal, vertical):
            if pixels_CHW.shape[dim] != num_out:
                pixels_CHW = _pass(pixels_CHW, dim, num_out, self.filter, method)
        return pixels_CHW


@lru_cache(maxsize=4096)
def matched(width: int, height: int, new_width: int, new_height: int, filter: int) -> Resize:
    """The resize that gives the installed Pillow's pixels for these sizes.

    Raises:
        Unmatched: none does.
    """
    if filter not in _FILTERS:
        raise Unmatched(f"Pillow's filter {Image.Resampling(filter).name} is not known")
    rows, columns = _spread(new_height), _spread(new_width)
    orders = [True, False]
    for seed in range(_MAX_TRIALS):
        noise = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
        truth = np.asarray(Image.fromarray(noise).resize((new_width, new_height), filter))
        sample = truth[rows][:, columns]
        orders = [
            vertical_first
            for vertical_first in orders
            if np.array_equal(_sampled(noise, truth.shape, rows, columns, filter, vertical_first), sample)
        ]
        if len(orders) < 2 or width == new_width or height == new_height:
            break
    if not orders:
        raise Unmatched(f"Pillow resizes {width} x {height} to {new_width} x {new_height} in a way that is not known")
    return Resize(new_height, new_width, filter, orders[0])


def _pass(pixels_CHW: torch.Tensor, dim: int, num_out: int, filter: int, method: Method) -> torch.Tensor:
    num_in, device = pixels_CHW.shape[dim], str(pixels_CHW.device)
    if method == "taps" or (method == "float32" and taps(num_in, num_out, filter)[1].shape[1] > _MAX_FLOAT32_TAPS):
        total = _summed(pixels_CHW, dim, *_device_taps(num_in, num_out, filter, device))
        return total.add_(_HALF).bitwise_right_shift_(_BITS).clamp_(0, 255).to(torch.uint8)
    weights_OI = _dense(num_in, num_out, filter, device)
    if method == "float64":
        total = _product(pixels_CHW.double(), weights_OI, dim)
    else:
        upper_OI = torch.round(weights_OI / _LOW)
        pixels = pixels_CHW.float()
        total = _product(pixels, upper_OI.float(), dim).double() * _LOW
        total += _product(pixels, (weights_OI - upper_OI * _LOW).float(), dim)
    return total.add_(_HALF).mul_(2.0**-_BITS).floor_().clamp_(0, 255).to(torch.uint8)


def _summed(pixels_CHW: torch.Tensor, dim: int, places_KO: torch.Tensor, weights_KO: torch.Tensor) -> torch.Tensor:
    if dim == 2:  # rows are quicker to take than columns
        return _summed(pixels_CHW.transpose(1, 2), 1, places_KO, weights_KO).transpose(1, 2)
    wide_CHW = pixels_CHW.int().contiguous()
    total: torch.Tensor | None = None
    for places_O, weights_O in zip(places_KO, weights_KO, strict=True):
        taken = wide_CHW.index_select(1, places_O)
        weights = weights_O[:, None]
        total = taken.mul_(weights) if total is None else total.addcmul_(taken, weights)
    assert total is not None
    return total


def _product(pixels_CHW: torch.Tensor, weights_OI: torch.Tensor, dim: int) -> torch.Tensor:
    return weights_OI @ pixels_CHW if dim == 1 else pixels_CHW @ weights_OI.T


@lru_cache(maxsize=512)
def _device_taps(num_in: int, num_out: int, filter: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    starts_O, weights_OK = taps(num_in, num_out, filter)
    places_OK = np.minimum(starts_O[:, None] + np.arange(weights_OK.shape[1]), num_in - 1)  # beyond it weights are 0
    return (
        torch.from_numpy(places_OK.T.astype(np.int32)).contiguous().to(device),
        torch.from_numpy(weights_OK.T.astype(np.int32)).contiguous().to(device),
    )


def _dense(num_in: int, num_out: int, filter: int, device: str) -> torch.Tensor:
    """[num_out, num_in] float64: made anew each time, as kept matrices would fill the device."""
    places_KO, weights_KO = _device_taps(num_in, num_out, filter, device)
    dense = torch.zeros(num_out, num_in, dtype=torch.float64, device=device)
    return dense.scatter_add_(1, places_KO.T.long(), weights_KO.T.double())


@lru_cache(maxsize=2048)
def taps(num_in: int, num_out: int, filter: int) -> tuple[Numbers, Numbers]:
    """Pillow's coefficients: the first neighbour of each pixel [num_out], and the weights [num_out, K] as integers."""
    reach, weight = _FILTERS[filter]
    scale = num_in / num_out
    stretch = max(scale, 1.0)
    support = reach * stretch
    centres_O = (np.arange(num_out) + 0.5) * scale
    # C's conversion to int cuts off, towards zero.
    starts_O = np.maximum(np.trunc(centres_O - support + 0.5), 0).astype(np.int64)
    stops_O = np.minimum(np.trunc(centres_O + support + 0.5), num_in).astype(np.int64)
    steps_OK = starts_O[:, None] + np.arange(int((stops_O - starts_O).max()))
    inside_OK = steps_OK < stops_O[:, None]
    weights_OK = np.where(inside_OK, weight((steps_OK - centres_O[:, None] + 0.5) * (1.0 / stretch)), 0.0)
    total_O = np.cumsum(weights_OK, axis=1)[:, -1:]  # one after the other, as Pillow adds
    weights_OK = np.divide(weights_OK, total_O, out=weights_OK, where=total_O != 0)
    scaled_OK = weights_OK * (1 << _BITS)
    return starts_O, np.trunc(np.where(weights_OK < 0, scaled_OK - 0.5, scaled_OK + 0.5)).astype(np.int64)


def _bilinear(x: Numbers) -> Numbers:
    x = np.abs(x)
    return np.where(x < 1, 1 - x, 0.0)


def _bicubic(x: Numbers) -> Numbers:
    x, a = np.abs(x), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: Numbers) -> Numbers:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


def _box(x: Numbers) -> Numbers:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _hamming(x: Numbers) -> Numbers:
    x = np.abs(x)
    return np.where(x < 1, _sinc(x) * (_HAMMING[0] + _HAMMING[1] * _each(math.cos, x * math.pi)), 0.0)


def _sinc(x: Numbers) -> Numbers:
    x = x * math.pi
    return np.where(x == 0, 1.0, _each(math.sin, x) / np.where(x == 0, 1.0, x))


def _each(function: Callable[[float], float], x: Numbers) -> Numbers:
    """The C library's own function, which Pillow calls: numpy's may differ in the last bit."""
    return np.array([function(value) for value in x.ravel().tolist()]).reshape(x.shape)


_FILTERS: dict[int, tuple[float, Callable[[Numbers], Numbers]]] = {
    Image.Resampling.BILINEAR: (1.0, _bilinear),
    Image.Resampling.BICUBIC: (2.0, _bicubic),
    Image.Resampling.LANCZOS: (3.0, _lanczos),
    Image.Resampling.BOX: (0.5, _box),
    Image.Resampling.HAMMING: (1.0, _hamming),
}


def _spread(extent: int) -> Numbers:
    return np.unique(np.linspace(0, extent - 1, min(extent, _NUM_PROBES)).round().astype(int))


def _sampled(
    image_HW: Numbers,
    new_shape: tuple[int, ...],
    rows: Numbers,
    columns: Numbers,
    filter: int,
    vertical_first: bool,
) -> Numbers:
    """Pixels of a resized grey image, at these rows and columns alone."""
    (height, width), (new_height, new_width) = image_HW.shape, new_shape
    wide_HW = image_HW.astype(np.int64)

    def vertical(picture: Numbers) -> Numbers:
        return _at(picture, rows, height, new_height, filter)

    def horizontal(picture: Numbers) -> Numbers:
        return _at(picture.T, columns, width, new_width, filter).T

    return horizontal(vertical(wide_HW)) if vertical_first else vertical(horizontal(wide_HW))


def _at(picture: Numbers, places: Numbers, num_in: int, num_out: int, filter: int) -> Numbers:
    """Rows of a picture after one pass."""
    if num_in == num_out:
        return picture.take(places, axis=0)
    starts_O, weights_OK = taps(num_in, num_out, filter)
    num_taps = weights_OK.shape[1]
    neighbours = np.minimum(starts_O[places][:, None] + np.arange(num_taps), num_in - 1)
    total: Numbers = np.einsum("ok,okw->ow", weights_OK[places], picture[neighbours])
    return ((total + _HALF) >> _BITS).clip(0, 255)
