"""Pillow's pixels out of integer sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.tensors import resize
from pipeline.tensors.resize import METHODS, Method, Unmatched, matched

FILTERS = ["BILINEAR", "BICUBIC", "LANCZOS", "BOX", "HAMMING"]
# Width and height before and after: up, down, one way only, to a point, thin as a thread.
SIZES = [
    ((64, 48), (200, 150)),
    ((200, 131), (64, 48)),
    ((64, 48), (64, 20)),
    ((64, 48), (21, 48)),
    ((40, 90), (90, 40)),
    ((37, 5), (1, 1)),
    ((5, 900), (30, 40)),
    ((1, 1), (14, 14)),
    ((333, 500), (224, 336)),
]


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(pixels: np.ndarray, size: tuple[int, int], kind: str) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[kind]))


def ours(pixels: np.ndarray, found: resize.Resize, method: Method) -> np.ndarray:
    return found(torch.from_numpy(pixels).permute(2, 0, 1), method).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FILTERS)
def test_every_pixel_is_pillows(kind: str, method: Method) -> None:
    for number, (before, after) in enumerate(SIZES):
        pixels = noise(*before, seed=number)
        found = ours(pixels, matched(*before, *after, int(Image.Resampling[kind])), method)
        np.testing.assert_array_equal(found, by_pillow(pixels, after, kind), err_msg=f"{before} to {after}")


@pytest.mark.parametrize("extreme", [0, 255])
@pytest.mark.parametrize("method", METHODS)
def test_what_overshoots_is_cut_off_as_pillow_does(extreme: int, method: Method) -> None:
    pixels = np.full((40, 60, 3), 255 - extreme, dtype=np.uint8)
    pixels[::2, ::3] = extreme
    found = ours(pixels, matched(60, 40, 25, 77, Image.Resampling.LANCZOS), method)
    np.testing.assert_array_equal(found, by_pillow(pixels, (25, 77), "LANCZOS"))


def test_the_other_order_of_passes_gives_other_pixels() -> None:
    pixels = noise(200, 131)
    found = matched(200, 131, 64, 48, Image.Resampling.BICUBIC)
    other = replace(found, vertical_first=not found.vertical_first)
    assert not np.array_equal(ours(pixels, other, "taps"), by_pillow(pixels, (64, 48), "BICUBIC"))


def test_a_pillow_that_resizes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Image.Image.resize

    def shifted(self: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        return own(self, size, resample, box=(0.5, 0, *self.size))

    monkeypatch.setattr(Image.Image, "resize", shifted)
    with pytest.raises(Unmatched, match="70 x 50 to 31 x 33 in a way that is not known"):
        matched(70, 50, 31, 33, Image.Resampling.BICUBIC)


def test_filters_without_coefficients_are_refused() -> None:
    with pytest.raises(Unmatched, match="filter NEAREST is not known"):
        matched(70, 50, 31, 33, Image.Resampling.NEAREST)


@pytest.mark.slow
def test_photos_at_the_sizes_of_real_models_are_pillows_too() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos_qa"
    photos = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    if not photos:
        pytest.skip(f"{folder} is not there")
    for number, path in enumerate(photos[:6]):
        pixels = np.asarray(Image.open(path).convert("RGB")).copy()
        height, width = pixels.shape[:2]
        for size, kind in (((336, 448), "BICUBIC"), ((2048, 1536), "LANCZOS"), ((644, 476), "BICUBIC")):
            method = METHODS[number % len(METHODS)]
            found = ours(pixels, matched(width, height, *size, int(Image.Resampling[kind])), method)
            np.testing.assert_array_equal(found, by_pillow(pixels, size, kind))
