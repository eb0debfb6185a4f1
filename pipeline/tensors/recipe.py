"""How an image processor's tensors are made of the pixels of its images.

    8-bit images -> resizes (Pillow's, exactly) -> levels become real numbers (a table) -> elements are put in place

A recipe is a few kilobytes, and travels with the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.tensors.layout import Layout
from pipeline.tensors.resize import Method, Resize

NUM_CHANNELS = 3
Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Pixels [height, width, 3] in the flat buffer: an image, or what a resize made."""

    offset: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.height, self.width, NUM_CHANNELS)

    @property
    def num_elements(self) -> int:
        return self.height * self.width * NUM_CHANNELS


@dataclass(frozen=True, slots=True)
class Step:
    """A resize: of a whole source, or of what a layout makes of several. Its result is the source `target`."""

    input: int | Layout
    resize: Resize
    target: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """See the module. Sources are what the resizes make, in order, and then the images."""

    sources: tuple[Source, ...]
    given: tuple[int, ...]  # which sources the shipped pixels are
    steps: tuple[Step, ...]
    layouts: Mapping[str, Layout]  # tensors by name
    dtypes: Mapping[str, str]  # theirs: float32 is made of pixels, all else of constants
    shown: tuple[int, ...]  # sources that the tensors show
    levels: Pixels  # [3, 256] float32: what an 8-bit level becomes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layout.shape for name, layout in self.layouts.items()}

    @property
    def num_elements(self) -> int:
        return sum(source.num_elements for source in self.sources)

    def shipped(self, images: Sequence[Image.Image], *, resized: bool) -> tuple[Recipe, tuple[Pixels, ...]]:
        """What travels of a row's images: pixels [height, width, 3], and the recipe for them.

        resized: Pillow does the resizes here. Otherwise images travel as they are.
        """
        if not resized:
            return self, tuple(np.asarray(image) for image in images)
        recipe = self.resized()
        made = dict(enumerate(images, len(self.sources) - len(images)))
        for step in self.steps:
            if not isinstance(step.input, int):
                buffer = self.buffer([torch.from_numpy(np.array(image)) for image in images], method=None)
                return recipe, tuple(self.image(buffer, number).numpy() for number in recipe.given)
            made[step.target] = _by_pillow(made[step.input], step.resize)
        return recipe, tuple(np.asarray(made[number]) for number in recipe.given)

    @property
    def given_bytes(self) -> int:
        """Of the pixels that travel."""
        return sum(self.sources[number].num_elements for number in self.given)

    @property
    def tensor_bytes(self) -> int:
        """Of the tensors that they become."""
        return sum(
            int(np.prod(layout.shape)) * np.dtype(self.dtypes[name]).itemsize for name, layout in self.layouts.items()
        )

    def resized(self) -> Recipe:
        """The same recipe with its resizes done: the shipped pixels are the sources that are shown."""
        return replace(self, given=self.shown, steps=())

    def tensors(
        self, pixels: Sequence[torch.Tensor], *, method: Method = "taps", dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """The image processor's tensors, on the pixels' device.

        Args:
            pixels: uint8 [height, width, 3], one for each given source.
            dtype: of the tensors made of pixels; other than float32 their float32 values are rounded to it.
        """
        device = pixels[0].device
        buffer = self.buffer(pixels, method)
        # One table for all channels: the n-th begins at 256 n.
        levels = torch.from_numpy(self.levels).to(device, dtype).flatten()
        channels = torch.arange(0, levels.numel(), 256, dtype=torch.int32, device=device)
        values = torch.empty(self.num_elements, dtype=dtype, device=device)
        for number in self.shown:
            places = (self.image(buffer, number) + channels).flatten()
            torch.index_select(levels, 0, places, out=self.image(values, number).view(-1))
        return {
            name: layout.filled(
                torch.empty(
                    layout.shape,
                    dtype=dtype if self.dtypes[name] == "float32" else getattr(torch, self.dtypes[name]),
                    device=device,
                ),
                values,
            )
            for name, layout in self.layouts.items()
        }

    def buffer(self, pixels: Sequence[torch.Tensor], method: Method | None = "taps") -> torch.Tensor:
        """Flat uint8 buffer with all sources in it. method: None = Pillow resizes (on a CPU)."""
        buffer = torch.empty(self.num_elements, dtype=torch.uint8, device=pixels[0].device)
        for number, image_HWC in zip(self.given, pixels, strict=True):
            self.image(buffer, number).copy_(image_HWC)
        for step in self.steps:
            if isinstance(step.input, int):
                image_HWC = self.image(buffer, step.input)
            else:
                image_HWC = step.input.filled(
                    torch.empty(step.input.shape, dtype=torch.uint8, device=buffer.device), buffer
                )
            self.image(buffer, step.target).copy_(
                torch.from_numpy(np.array(_by_pillow(Image.fromarray(image_HWC.numpy()), step.resize)))
                if method is None
                else step.resize(image_HWC.permute(2, 0, 1), method).permute(1, 2, 0)
            )
        return buffer

    def image(self, buffer: torch.Tensor, number: int) -> torch.Tensor:
        """A source [height, width, 3] as a view of a flat buffer."""
        source = self.sources[number]
        return buffer[source.offset : source.offset + source.num_elements].view(source.shape)


def _by_pillow(image: Image.Image, resize: Resize) -> Image.Image:
    return image.resize((resize.width, resize.height), Image.Resampling(resize.filter))
