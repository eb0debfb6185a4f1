"""Numbered elements become few views, and the views become the elements again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.tensors.layout import Constant, Irregular, Layout, Split, View, layout_of


def filled(layout: Layout) -> np.ndarray:
    """Each element as the number of its place; constants as they are."""
    out = torch.full(layout.shape, -99, dtype=torch.int64)
    return layout.filled(out, torch.arange(1_000_000)).numpy()


def image(height: int, width: int, start: int = 0) -> np.ndarray:
    return start + np.arange(height * width * 3).reshape(height, width, 3).transpose(2, 0, 1)


def padded(picture: np.ndarray, height: int, width: int, constant: int = -1) -> np.ndarray:
    _, own_height, own_width = picture.shape
    return np.pad(picture, ((0, 0), (0, height - own_height), (0, width - own_width)), constant_values=constant)


def tiles(picture: np.ndarray, side: int) -> list[np.ndarray]:
    _, height, width = picture.shape
    return [
        picture[:, top : top + side, left : left + side]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def patches(picture: np.ndarray, side: int, merge: int) -> np.ndarray:
    """As Qwen-VL lists them: squares of merge x merge patches, each patch twice in time."""
    channels, height, width = picture.shape
    rows, columns = height // side, width // side
    split = picture.reshape(channels, rows // merge, merge, side, columns // merge, merge, side)
    split = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    return np.broadcast_to(split, (*split.shape[:5], 2, side, side)).reshape(rows * columns, -1)


def swapped(picture: np.ndarray) -> np.ndarray:
    picture = picture.copy()
    picture[1, 3, 3], picture[1, 3, 4] = picture[1, 3, 4], picture[1, 3, 3]
    return picture


CASES = {
    "whole": image(6, 9),
    "cropped": image(20, 30)[:, 3:12, 7:19],
    "tiles and the image": np.stack([*tiles(image(8, 12), 4), image(4, 4, 400)])[None],
    "the image before its tiles": np.stack([image(4, 4, 400), *tiles(image(8, 12), 4)]),
    "patches": patches(image(12, 16), 2, 2),
    "patches of two images": np.concatenate([patches(image(12, 16), 2, 2), patches(image(8, 4, 900), 2, 2)]),
    "images of three sizes": np.stack(
        [padded(image(6, 8), 12, 16), padded(image(6, 7, 200), 12, 16), image(12, 16, 500)]
    ),
    "a border of another constant in each channel": np.stack(
        [padded(image(5, 5)[[place]], 8, 8, -1 - place)[0] for place in range(3)]
    ),
    "mirrored": image(5, 7)[:, :, ::-1],
    "turned": image(5, 7).transpose(0, 2, 1),
    "nothing but a constant": np.full((1, 4, 9, 9), -2),
    "two pixels swapped within": swapped(image(10, 10)),
    "one pixel": np.array([[[5]]]),
}


@pytest.mark.parametrize("name", CASES)
def test_elements_come_back_from_where_they_were(name: str) -> None:
    numbers = np.ascontiguousarray(CASES[name]).astype(np.int32)
    layout = layout_of(numbers, [-1000, -2000, -3000])
    np.testing.assert_array_equal(filled(layout), np.where(numbers < 0, 1000 * numbers, numbers))


def test_tiles_are_one_view_and_the_whole_image_another() -> None:
    tree = layout_of(CASES["tiles and the image"].astype(np.int32), []).tree
    assert isinstance(tree, Split)
    assert len(tree.parts) == 2
    assert isinstance(tree.parts[1], View)


def test_a_constant_stays_what_it_is() -> None:
    assert layout_of(np.full((3, 3), -2, dtype=np.int32), [0.5, 0.25]) == Layout((3, 3), Constant(0.25))


def test_shuffled_pixels_are_refused() -> None:
    numbers = np.random.default_rng(0).permutation(100 * 100).reshape(100, 100).astype(np.int32)
    with pytest.raises(Irregular, match="more than 2048 pieces"):
        layout_of(numbers, [])
